"""Refax: mutable neural-network modules that plain JAX transforms update in place."""

__version__ = "0.1.0"
