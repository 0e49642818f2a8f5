"""Recurrent cells, and what runs them over a sequence."""
