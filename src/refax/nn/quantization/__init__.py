"""Weights as small integers."""
