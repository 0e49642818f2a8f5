"""nnx.plans: ready plans that know the layers of `nnx`. They are combined by `&`."""

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from refax.core.annotation import (
  Rules,
  axes_of,
  checked_rules,
  get_logical_axis_rules,
  logical_axis_rules,
)
from refax.core.gather import gather_again
from refax.core.node import Node
from refax.core.variable import Cache
from refax.errors import InvalidArgumentError
from refax.nn.attention.multi_head import MultiHeadAttention
from refax.nn.block.transformer import FeedForward
from refax.nn.conv.conv import Conv
from refax.nn.linear.embed import Embed
from refax.nn.linear.linear import Linear
from refax.nn.lora.lora import LoRA
from refax.nn.lora.lora import sizes as lora_sizes
from refax.nn.quantization.quantized import QuantizedWeight
from refax.sharding.plan import WEIGHTS, Axes, Place, Plan, annotated_spec

__all__ = ["annotated", "fsdp", "gather_again", "pipeline", "replicated", "tensor_parallel"]

replicated = Plan.of_rule("nnx.plans.replicated", lambda *_: None)
"""Each device has all of the model: data parallel training divides the batch only."""


def fsdp(axis: str | tuple[str, ...] = "data", *, min_size: int = 2**14) -> Plan:
  """Each device keeps a part of every large parameter, and gathers the others when it needs them.

  Divided is the largest axis of a parameter that the devices divide evenly and that no other plan
  divides, never the axis of layers of a `nnx.Stack`: the weights of one layer are gathered at a
  time. What an optimizer keeps for it is divided in the same way (ZeRO-3). The memory of attention
  is divided by its first batch axis.

  A call of a Module gathers what it reads of a divided parameter, while JAX traces; a function that
  reads a parameter outside of such a call leaves it to XLA. A `nnx.Stack` gathers once more for the
  backward pass, see `nnx.plans.gather_again`.

  Args:
    axis: the axis of the mesh, or several, the one that the batch is divided over.
    min_size: parameters of fewer elements are on each device as a whole: to gather them costs more
      than they take.

  Source: S. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
  Models", 2020, https://arxiv.org/abs/1910.02054.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> nnx.plans.fsdp(min_size=0).specs(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), mesh)
  {'bias': P('data',), 'kernel': P(None, 'data')}
  """

  def rule(place: Place, taken: Axes, sizes: Mapping[str, int]) -> PartitionSpec | None:
    count = math.prod(sizes[a] for a in axes_of(axis))
    if any(a in names for names in taken for a in axes_of(axis)):
      return None
    if _is_memory(place):
      fits = not taken[0] and place.shape[0] % count == 0
      return PartitionSpec(axis) if fits else None
    shapes = _parts(place)
    if not isinstance(place.variable, WEIGHTS) or math.prod(shapes[0]) < min_size:
      return None
    fits = lambda i: all(shape[i] and shape[i] % count == 0 for shape in shapes)
    free = [i for i in range(len(shapes[0])) if not taken[i] and fits(i)]
    if not free:
      return None
    return _at(max(free, key=lambda i: shapes[0][i]), axis)

  return Plan.of_rule(f"nnx.plans.fsdp({axis!r}, min_size={min_size})", rule, axes=axis, fills=True)


def tensor_parallel(
  axis: str | tuple[str, ...] = "model",
  *,
  layers: Mapping[type, Mapping[str, PartitionSpec]] | None = None,
) -> Plan:
  """Each device computes some heads, hidden features and words, as Megatron does.

  | layer | divided |
  |---|---|
  | `MultiHeadAttention` | queries, keys, values, memory and the output projection by heads |
  | `FeedForward` | `up` and `gate` by their outputs, `down` by its inputs |
  | `Embed` | the words; if the devices do not divide them evenly, the features |
  | other `Linear`, `Conv` | the outputs |

  So a block of a transformer needs one sum over the devices behind attention, and one behind the
  feed-forward part. Keys and values that have fewer heads than there are devices, and outputs
  that the devices do not divide evenly (ten classes), are on each device as a whole. Integers and
  scales of `nnx.quantize`, and the factors of a LoRA, are divided as the weight would be, along the
  axes that they have.

  Args:
    axis: the axis of the mesh.
    layers: for classes of one's own, a spec for each of their Variables.

  Source: M. Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using
  Model Parallelism", 2019, https://arxiv.org/abs/1909.08053.

  Raises:
    ShardingError: on use, where heads or hidden features are no multiple of the devices.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("model",))
  >>> specs = nnx.plans.tensor_parallel().specs(nnx.FeedForward(2, rngs=nnx.Rngs(0)), mesh)
  >>> specs["up.kernel"], specs["down.kernel"]
  (P(None, 'model'), P('model', None))
  """
  own = layers or {}
  for cls in own:
    if not (isinstance(cls, type) and issubclass(cls, Node)):
      raise InvalidArgumentError.value("tensor_parallel", "layers", cls, "classes of Modules")

  def rule(place: Place, taken: Axes, sizes: Mapping[str, int]) -> PartitionSpec | None:
    count = math.prod(sizes[a] for a in axes_of(axis))
    if isinstance(place.owner, QuantizedWeight):
      return _of_quantized(rule(_weight(place), taken, sizes), place, sizes)
    place = _without_lora(place)
    lora = place.owner
    is_own = isinstance(lora, tuple(own))
    if isinstance(lora, LoRA) and place.path[-1] in ("lora_a", "lora_b") and not is_own:
      return _of_factor(rule(_kernel_beside(place, lora), taken, sizes), place, lora)
    for cls, specs in own.items():
      if isinstance(place.owner, cls) and place.path[-1] in specs:
        return specs[place.path[-1]]
    if _is_memory(place):
      heads = len(place.shape) - 2
      return _at(heads, axis, of=len(place.shape)) if place.shape[heads] % count == 0 else None
    if not isinstance(place.variable, WEIGHTS):
      return None
    found = _in_block(place, count)
    if found is None:
      found = _alone(place, count)
    return None if found is None else _at(found, axis, of=len(place.shape))

  return Plan.of_rule(f"nnx.plans.tensor_parallel({axis!r})", rule, axes=axis)


def pipeline(axis: str = "stage") -> Plan:
  """Each device has some of the layers of every `nnx.Stack`: for `nnx.pipeline`.

  Args:
    axis: the axis of the mesh.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("stage",))
  >>> stack = nnx.Stack(nnx.Linear, 4, 2, 2, rngs=nnx.Rngs(0))
  >>> nnx.plans.pipeline().specs(stack, mesh)["layers.kernel"]
  P('stage', None, None)
  """
  return Plan.of_rule(f"nnx.plans.pipeline({axis!r})", lambda *_: None, axes=axis, layers=axis)


def annotated(rules: Rules = ()) -> Plan:
  """Each Variable lies as its own metadata `out_sharding` says.

  Args:
    rules: which axes of the mesh logical names mean, beside those of `nnx.logical_axis_rules`.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("model",))
  >>> model = nnx.Linear(2, 3, kernel_metadata={"out_sharding": (None, "mlp")}, rngs=nnx.Rngs(0))
  >>> nnx.plans.annotated([("mlp", "model")]).specs(model, mesh)["kernel"]
  P(None, 'model')
  """
  rules = checked_rules(rules)

  def rule(place: Place, taken: Axes, sizes: Mapping[str, int]) -> PartitionSpec | None:
    with logical_axis_rules((*rules, *(r for r in get_logical_axis_rules() if r not in rules))):
      spec = annotated_spec(place)
    if not hasattr(place.variable.get_raw_value(), "shape"):
      return None  # a pytree: its arrays have ranks of their own
    return None if spec is None else PartitionSpec(*spec[place.stacked :])

  return Plan.of_rule(f"nnx.plans.annotated({list(rules)})", rule)


def _at(index: int, axis: Any, of: int = 0) -> PartitionSpec:
  """The spec of an array with one axis divided."""
  return PartitionSpec(*[axis if i == index else None for i in range(max(of, index + 1))])


def _weight(place: Place) -> Place:
  """Integers or scales as the weight that they stand for: an attribute of the layer."""
  return place._replace(path=place.path[:-1], parents=place.parents[:-1])


def _parts(place: Place) -> list[tuple[int, ...]]:
  """The shapes that are divided alike: those of integers and scales, or that of the Variable."""
  if not isinstance(place.owner, QuantizedWeight):
    return [place.shape]
  return [x.shape[place.stacked :] for x in (place.owner.values, place.owner.scale)]


def _of_quantized(
  spec: PartitionSpec | None, place: Place, sizes: Mapping[str, int]
) -> PartitionSpec | None:
  """The spec of a weight for its integers or scales, where an axis is not too short for it."""
  if spec is None:
    return None
  count = lambda part: math.prod(sizes[a] for a in axes_of(part))
  fits = lambda part, n: n == 1 or n % count(part) == 0
  together = zip(spec, place.shape, *_parts(place), strict=False)
  is_kept = lambda part, own, ns: own % count(part) == 0 and all(fits(part, n) for n in ns)
  return PartitionSpec(*[part if is_kept(part, own, ns) else None for part, own, *ns in together])


def _without_lora(place: Place) -> Place:
  """The weight of a layer that a LoRA holds, as if the layer were alone."""
  if len(place.parents) < 2 or not isinstance(place.parents[-2], LoRA):
    return place
  if place.path[-2] != "base_module":
    return place
  path, parents = (*place.path[:-2], place.path[-1]), (*place.parents[:-2], place.parents[-1])
  return _without_lora(place._replace(path=path, parents=parents))


def _kernel_beside(place: Place, lora: LoRA) -> Place:
  """A factor of a LoRA as the kernel that the product of both factors is added to."""
  inputs, outputs = lora_sizes(lora.in_features), lora_sizes(lora.out_features)
  own = len(inputs if place.path[-1] == "lora_a" else outputs) + 1
  shape = (*place.shape[: len(place.shape) - own], *inputs, *outputs)
  path, parents, layer = place.path[:-1], place.parents[:-1], lora.base_module
  while isinstance(layer, LoRA):
    layer = layer.base_module
  if layer is None and parents and isinstance(parents[-1], Linear):
    path = path[:-1]  # a LoRALinear, whose attribute the LoRA is
  elif isinstance(layer, Node):
    parents = (*parents, layer)
  place = place._replace(path=(*path, "kernel"), parents=parents, shape=shape)
  return _without_lora(place)


def _of_factor(spec: PartitionSpec | None, place: Place, lora: LoRA) -> PartitionSpec | None:
  """The spec of a kernel for a factor, which has its inputs or its outputs, and the rank."""
  if spec is None:
    return None
  inputs, outputs = lora_sizes(lora.in_features), lora_sizes(lora.out_features)
  if place.path[-1] == "lora_a":
    lead = len(place.shape) - len(inputs) - 1
    return PartitionSpec(*spec[: lead + len(inputs)], None)
  lead = len(place.shape) - len(outputs) - 1
  return PartitionSpec(*spec[:lead], None, *spec[lead + len(inputs) :])


def _is_memory(place: Place) -> bool:
  """Whether this is attention's memory of keys or values, `[batch..., length, heads, size]`."""
  is_attention = isinstance(place.owner, MultiHeadAttention)
  return is_attention and isinstance(place.variable, Cache) and len(place.shape) > 3


def _in_block(place: Place, count: int) -> int | None:
  """The axis of a projection in attention or in a feed-forward part; None for anything else.

  A bias that is added to a sum over the devices is not divided: None, too.
  """
  if len(place.parents) < 2 or len(place.path) < 2:
    return None
  block, (layer, name) = place.parents[-2], place.path[-2:]
  if isinstance(block, MultiHeadAttention):
    # Counted from the last axis: in an ensemble there are others in front.
    last = len(place.shape) - 1
    if layer in ("query", "key", "value"):
      heads = last - 1
      is_few = layer != "query" and place.shape[heads] % count
      return None if is_few or name not in ("kernel", "bias") else heads
    return last - 2 if (layer, name) == ("out", "kernel") else None
  if isinstance(block, FeedForward):
    if layer in ("up", "gate"):
      return len(place.shape) - 1 if name in ("kernel", "bias") else None
    return len(place.shape) - 2 if (layer, name) == ("down", "kernel") else None
  return None


def _alone(place: Place, count: int) -> int | None:
  """The axis of a layer that is no part of a known block, if the devices divide it evenly."""
  if any(isinstance(x, MultiHeadAttention | FeedForward) for x in place.parents):
    return None
  name = place.path[-1]
  if isinstance(place.owner, Embed) and name == "embedding":
    words = len(place.shape) - 2
    return next((i for i in (words, words + 1) if place.shape[i] % count == 0), None)
  if isinstance(place.owner, Linear | Conv) and name in ("kernel", "bias"):
    return len(place.shape) - 1 if place.shape[-1] % count == 0 else None
  return None
