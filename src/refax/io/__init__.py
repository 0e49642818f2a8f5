"""Files: state that goes to a disk and comes back."""
