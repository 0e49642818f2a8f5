"""Training by several processes, each with devices and data of its own: `make multihost`."""
