"""What `make release` does: it builds Refax, tests the wheel, and publishes nothing."""
