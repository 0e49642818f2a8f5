"""Many networks trained at once say where they know nothing: `python -m examples.ensemble`."""
