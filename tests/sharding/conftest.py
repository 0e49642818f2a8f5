"""The tests in `eight/` need eight devices: `test_eight_devices.py` gives them a process."""

import os

collect_ignore_glob = [] if "device_count=8" in os.environ.get("XLA_FLAGS", "") else ["eight/*"]
