"""Every public name of Flax NNX 0.12, on Refax; lojax until `nnx.use_hijax(True)`."""

from refax import nnx as _nnx
from refax.compat import extension as _extension
from refax.compat.namespace import fill as _fill

_extension.extend()
_fill(globals(), __name__)


def __getattr__(name: str):
  """A name that Flax NNX has not; the clean namespace says what there is."""
  return getattr(_nnx, name)
