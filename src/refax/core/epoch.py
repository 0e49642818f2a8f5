"""The structure epoch: a count of structural changes that any cached flattening could miss."""


class Epoch:
  """A counter. A cached flattening is valid while the counter stands where it was."""

  __slots__ = ("value",)

  def __init__(self):
    self.value = 0

  def bump(self) -> None:
    """A structure that some cached flattening has visited has changed."""
    self.value += 1


epoch = Epoch()
