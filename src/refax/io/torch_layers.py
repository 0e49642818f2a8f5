"""What a tensor of torch is in a layer of ours: the name of its Variable, and what is done to it.

It is the type of the layer that decides and never a shape: a square matrix has the same shape in
either orientation. A shape that is not that of torch's layer is refused, also where a reshape would
make it fit.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from refax.core.module import Module
from refax.io.rename import LayoutError, Transform
from refax.nn.conv.conv import Conv
from refax.nn.conv.conv_transpose import ConvTranspose
from refax.nn.linear.embed import Embed
from refax.nn.linear.linear import Linear, LinearGeneral
from refax.nn.norm.batch_norm import BatchNorm
from refax.nn.norm.layer_norm import Norm
from refax.nn.norm.weight_norm import WeightNorm
from refax.nn.prelu import PReLU


class Layout(NamedTuple):
  """What is done to a tensor of torch that has this shape."""

  shape: tuple[int, ...]
  function: Transform
  layer: str
  is_same: bool = False
  """Whether the function does nothing."""

  def __call__(self, x: Any) -> Any:
    if tuple(x.shape) == self.shape:
      return self.function(x)
    want = f"{self.layer} here takes {list(self.shape)} of torch"
    if tuple(x.shape) == self.shape[::-1]:
      raise LayoutError(f"{want}: rename to (name, np.transpose) if the file has [in, out]")
    raise LayoutError(f"build the model with this size: {want}")


def in_layer(layer: Any, leaf: str, lead: int) -> tuple[str | None, Layout | None] | None:
  """The name here of a tensor of a layer, and its layout; None if it is not known.

  Args:
    layer: the layer.
    leaf: the last name of the tensor in torch.
    lead: how many axes count the layers of Stacks.

  Returns:
    None for the name means that the tensor is not wanted.
  """
  known = _in_weight_norm if isinstance(layer, WeightNorm) else _in_layer
  return known(layer, leaf, lead)


def _in_layer(layer: Any, leaf: str, lead: int) -> tuple[str | None, Layout | None] | None:
  if not isinstance(layer, Module):
    return None
  if isinstance(layer, BatchNorm) and leaf == "num_batches_tracked":
    return None, None
  for kind, names in _NAMES:
    if isinstance(layer, kind):
      new = names.get(leaf)
      variable = None if new is None else getattr(layer, new, None)
      if new is None or variable is None:
        return None
      shape = tuple(variable.shape)[lead:]
      # Another number of axes is that of something else: of many layers, mapped without a Stack.
      return (new, _layout(layer, new, shape)) if len(shape) == _rank(layer, new) else None
  return None


def _rank(layer: Any, name: str) -> int:
  """How many axes a Variable of one layer has; -1 for what torch does not have."""
  if isinstance(layer, LinearGeneral):
    outputs = len(layer.out_features)
    inputs = len(layer.in_features) if name == "kernel" else 0
    return -1 if layer.batch_axis else inputs + outputs
  if isinstance(layer, Conv | ConvTranspose) and name == "kernel":
    return len(layer.kernel_shape)
  return {"kernel": 2, "embedding": 2, "negative_slope": 0}.get(name, 1)


def _in_weight_norm(layer: WeightNorm, leaf: str, lead: int) -> Any:
  """As `_in_layer`; torch has a length for each output, which is the last axis here."""
  inner = layer.layer_instance
  if leaf == "bias":
    parts = _in_layer(inner, leaf, lead)
  elif not isinstance(inner, Linear | Conv) or layer.feature_axes not in ((-1,), (_last(inner),)):
    return None
  elif leaf == "weight_g" and layer.scales is not None and ("kernel",) in layer.scales:
    (size,) = tuple(layer.scales["kernel",].shape)[lead:]
    ones = (1,) * _last(inner)
    return "scales.kernel", Layout((size, *ones), lambda x: x.reshape(-1), "WeightNorm")
  else:
    parts = _in_layer(inner, "weight", lead) if leaf == "weight_v" else None
  return None if parts is None else (f"layer_instance.{parts[0]}", parts[1])


def _last(layer: Linear | Conv) -> int:
  """The number of the last axis of a kernel."""
  return _rank(layer, "kernel") - 1


_NAMES: list[tuple[type, dict[str, str]]] = [
  (Linear, {"weight": "kernel", "bias": "bias"}),
  (LinearGeneral, {"weight": "kernel", "bias": "bias"}),
  (Conv, {"weight": "kernel", "bias": "bias"}),
  (ConvTranspose, {"weight": "kernel", "bias": "bias"}),
  (Embed, {"weight": "embedding"}),
  (
    BatchNorm,
    {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
  ),
  (Norm, {"weight": "scale", "bias": "bias"}),
  (PReLU, {"weight": "negative_slope"}),
]


def _layout(layer: Any, name: str, shape: tuple[int, ...]) -> Layout:
  """What becomes of a tensor on its way to the Variable `name`, which has this shape in a layer."""
  kind = type(layer).__name__
  if name == "kernel" and isinstance(layer, Linear | LinearGeneral):
    inputs = len(layer.in_features) if isinstance(layer, LinearGeneral) else 1
    matrix = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    return Layout(matrix, lambda x: x.T.reshape(shape), kind)
  if name == "kernel":
    return _convolution(layer, shape)
  if isinstance(layer, LinearGeneral):
    return Layout((math.prod(shape),), lambda x: x.reshape(shape), kind)
  if isinstance(layer, PReLU):
    return Layout((1,), lambda x: x.reshape(shape), kind)
  return Layout(shape, lambda x: x, kind, is_same=True)


def _convolution(layer: Any, shape: tuple[int, ...]) -> Layout:
  """Torch has channels first: those of the output, but of a ConvTranspose those of the input."""
  space, (first, second) = shape[:-2], shape[-2:]
  rank = len(space)
  kind = type(layer).__name__
  last = lambda x, *channels: x.transpose(*range(2, 2 + rank), *channels)
  if not isinstance(layer, ConvTranspose):
    return Layout((second, first, *space), lambda x: last(x, 1, 0), kind)
  if layer.transpose_kernel:
    return Layout((second, first, *space), lambda x: last(x, 1, 0), kind)
  # `jax.lax.conv_transpose` slides the kernel as it is; torch slides it turned around.
  turned = lambda x: np.flip(last(x, 0, 1), tuple(range(rank)))
  return Layout((first, second, *space), turned, kind)
