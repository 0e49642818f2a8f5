"""The epoch: a count of the changes to Variables that a kept walk could miss.

Objects tell their watches what has changed (`refax.core.watch`). A Variable has none: that its cell
or its metadata is replaced, and not written, is rare, and all that is kept of any model is made
anew.
"""


class Epoch:
  """A counter. What was kept of a walk is of use while the counter stands where it was."""

  __slots__ = ("value",)

  def __init__(self):
    self.value = 0

  def bump(self) -> None:
    """A Variable has another cell, or other metadata."""
    self.value += 1


epoch = Epoch()
