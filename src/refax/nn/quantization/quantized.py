"""QuantizedWeight: the weight of a layer as small integers and scales, which reads as an array.

A weight is replaced, and not its layer: `layer.kernel` then is a `QuantizedWeight`, an object with
two Variables in the place of one. Whatever reads a kernel as a layer does, `self.kernel[...]`, gets
the numbers that the integers stand for; so every layer works, one of the user's too. Both Variables
hold plain arrays with the axes of the weight in their order. So a Stack cuts them into layers,
plans divide them, files and checkpoints keep them, and none of these knows about quantization. (One
Variable with a pair as its value would be one name less, and each of these would have to.)

Integers of 4 bits lie two in a byte: of a group, the first half in the low bits, the second in the
high ones. A product then needs no step that mixes them: it is the sum of two products, of halves
of the input. JAX has a dtype for them, `int4`, which takes a byte each on a CPU and has no name in
a safetensors file.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from refax import _jax
from refax.core import brief, text
from refax.core.array_protocol import ArrayProtocol, unwrap
from refax.core.pytree import Pytree
from refax.core.variable import Variable, borrowed
from refax.errors import UnwantedWriteError
from refax.nn import explicit
from refax.typing import Dtype, describe, wide_dtype

_BLOCK = 2**18
"""How many numbers of a weight are computed at a time on a CPU: 1 MB, which its cache holds."""


class QuantizedParam(Variable):
  """What a `QuantizedWeight` holds: no Param, so that no optimizer and no `nnx.grad` takes it.

  >>> from refax import nnx
  >>> model = nnx.quantize(nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), 8)
  >>> sorted(nnx.state(model, nnx.QuantizedParam)["kernel"]), len(nnx.state(model, nnx.Param))
  (['scale', 'values'], 0)
  """


@dataclasses.dataclass(frozen=True)
class Form:
  """How the numbers of a weight are kept.

  Attributes:
    bits: 8 or 4.
    axis: the axis that groups divide, counted from the end.
    group: how many numbers along this axis have a scale of their own; 0 for one scale for all that
      one output is a sum of.
    dtype: the dtype of the weight.
  """

  bits: int
  axis: int
  group: int
  dtype: Dtype

  @property
  def per_byte(self) -> int:
    """How many numbers a byte holds: an odd group is not packed."""
    return 2 if self.bits == 4 and self.group % 2 == 0 else 1

  def shape(self, values: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the weight, from that of the integers."""
    shape = list(values)
    shape[self.axis] *= self.per_byte
    return tuple(shape)

  def __repr__(self) -> str:
    return f"{self.bits} bits" + (f", groups of {self.group}" if self.group else "")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("form",)
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """The arrays of a QuantizedWeight, for a product."""

  values: jax.Array
  scale: jax.Array
  form: Form

  def planes(self, dtype: Dtype) -> list[jax.Array]:
    """The weight; where a byte holds two numbers, the first halves of groups and the second."""
    form, values = self.form, self.values
    kept = [values]
    if form.per_byte == 2:  # a shift of signed integers keeps the sign
      kept = [(values << 4).astype(jnp.int8) >> 4, values.astype(jnp.int8) >> 4]
    return [self._scaled(x, dtype) for x in kept]

  def _scaled(self, x: jax.Array, dtype: Dtype) -> jax.Array:
    # In float32 or better: a float16 scale may be 0, and bfloat16 would round once more.
    wide = wide_dtype(dtype)
    x, scale = x.astype(wide), self.scale.astype(wide)
    if not self.form.group:
      return (x * scale).astype(dtype)
    groups = grouped(x, scale.shape[self.form.axis], self.form.axis)
    return (groups * jnp.expand_dims(scale, self.form.axis)).reshape(x.shape).astype(dtype)

  def array(self) -> jax.Array:
    """The weight as an array."""
    form, planes = self.form, self.planes(self.form.dtype)
    if len(planes) == 1:
      return planes[0]
    halves = [grouped(x, self.scale.shape[form.axis], form.axis) for x in planes]
    return jnp.concatenate(halves, form.axis).reshape(form.shape(self.values.shape))

  def astype(self, dtype: Dtype) -> "Packed":
    """The same, as a weight of another dtype."""
    return Packed(self.values, self.scale, dataclasses.replace(self.form, dtype=jnp.dtype(dtype)))

  def part(self, axis: int, start: Any, size: int) -> "Packed":
    """A part of the weight: along the axis of groups, whole groups."""
    whole = self.form.shape(self.values.shape)[axis]

    def cut(x: jax.Array) -> jax.Array:
      if x.shape[axis] == 1:
        return x
      each = whole // x.shape[axis]
      return lax.dynamic_slice_in_dim(x, start // each, size // each, axis)

    return Packed(cut(self.values), cut(self.scale), self.form)

  def at(self, indices: jax.Array) -> "Packed":
    """The rows at these indices; NaNs for a row that there is not."""
    values = self.values.at[indices].get(mode="fill", fill_value=1)
    return Packed(values, self.scale.at[indices].get(mode="fill"), self.form)


def grouped(x: jax.Array, groups: int, axis: int) -> jax.Array:
  """An array with an axis as two: the groups, and what is in a group.

  Args:
    x: the array.
    groups: how many groups there are.
    axis: the axis; counted from the end, it then is the one of what is in a group.
  """
  end = axis % x.ndim + 1  # of an empty batch, `-1` would not say the size
  return x.reshape(*x.shape[: end - 1], groups, x.shape[end - 1] // groups, *x.shape[end:])


class QuantizedWeight(ArrayProtocol, Pytree):
  """A weight of a layer as integers of 8 or 4 bits and scales; made by `nnx.quantize`.

  It reads as the array that the integers stand for, and cannot be written.

  Args:
    weight: the integers and scales.
    **metadata: metadata of both Variables.

  >>> from refax import nnx
  >>> model = nnx.quantize(nnx.Linear(64, 3, rngs=nnx.Rngs(0)), 4)
  >>> model.kernel.values.dtype, model.kernel.values.shape, model.kernel.scale.shape
  (dtype('uint8'), (32, 3), (2, 3))
  >>> model.kernel.shape, model.kernel[...].dtype
  ((64, 3), dtype('float32'))
  """

  __hash__ = object.__hash__  # of an object, not of an array: a traversal keeps objects in sets

  def __init__(self, weight: Packed, **metadata: Any):
    self.values = QuantizedParam(weight.values, **metadata)
    self.scale = QuantizedParam(weight.scale, **_fitting(metadata, weight.scale.shape))
    self.form = weight.form

  def packed(self, *, lent: bool = False) -> Packed:
    """The arrays of the weight.

    Args:
      lent: whether nothing of them is handed out: then they are not copied.
    """
    # In what `nnx.pure` returns, they are arrays.
    read = lambda x: borrowed(x) if lent and isinstance(x, Variable) else unwrap(x)
    return Packed(read(self.values), read(self.scale), self.form)

  def get_value(self, *, index: Any = ...) -> jax.Array:
    """The weight as an array, or its part at `index`."""
    value = _array(self.packed(lent=True))
    return value if index is ... else value[unwrap(index)]

  def set_value(self, value: Any, *, index: Any = ...) -> None:
    """A weight that is quantized cannot be written.

    Raises:
      UnwantedWriteError: always.
    """
    raise UnwantedWriteError(
      "a quantized weight is not trained, and cannot be written",
      at=self.values._def.origin,
      got=f"a write to a weight of {self.form}",
      fix="train a nnx.LoRA beside the layer, or put a nnx.Param in the place of the weight",
    )

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the weight."""
    return self.form.shape(self.values.shape)

  @property
  def dtype(self) -> Dtype:
    """The dtype that it reads as."""
    return self.form.dtype

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.values.shape)

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The number of bytes of integers and scales."""
    return self.values.nbytes + self.scale.nbytes

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_") or not hasattr(jax.Array, name) or "form" not in vars(self):
      raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
    return getattr(self.get_value(), name)

  def __repr_line__(self, style: Any) -> text.Line | None:
    if style.full:
      return super().__repr_line__(style)
    words = f"{type(self).__name__}({describe(self)} of {self.form})"
    return text.Line(words, brief.summary(brief.leaves(self)))


def _fitting(metadata: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
  """The metadata of a weight for its scales: an axis of size 1 is not divided."""
  names = metadata.get("out_sharding")
  if not isinstance(names, tuple):
    return metadata
  names = tuple(None if n == 1 else name for name, n in zip(names, shape, strict=False))
  return metadata | {"out_sharding": names}


@functools.partial(jax.jit, inline=True)
def _array(weight: Packed) -> jax.Array:
  return explicit.call(Packed.array, weight, out=lambda: names(weight))


# what layers do with a weight, quantized or not
Weight = jax.Array | Packed


def read(weight: Any, lent: bool) -> Weight:
  """A weight for a product of JAX's own; of what a user has put in its place, the value.

  Args:
    weight: a Variable, a QuantizedWeight or an array.
    lent: whether no function of the user gets it.
  """
  if lent and isinstance(weight, QuantizedWeight):
    return weight.packed(lent=True)
  return borrowed(weight) if lent and isinstance(weight, Variable) else weight[...]


def promoted(promote_dtype: Callable[..., Any], args: tuple, **options: Any) -> tuple[Any, ...]:
  """`promote_dtype(args, **options)`, where a quantized weight may be among the arguments."""
  is_packed = [isinstance(x, Packed) for x in args]
  if not any(is_packed):
    return promote_dtype(args, **options)
  stand_ins = (jnp.zeros((), x.form.dtype) if isinstance(x, Packed) else x for x in args)
  done = promote_dtype(tuple(stand_ins), **options)
  return tuple(
    x.astype(y.dtype) if isinstance(x, Packed) else y for x, y in zip(args, done, strict=True)
  )


def names(weight: Weight) -> explicit.Names:
  """The mesh axes that each axis of a weight is split over."""
  return explicit.names(weight.values if isinstance(weight, Packed) else weight)


_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""A function that a backward pass computes again: it would else keep the weight as floats."""


def product_of(weight: Weight, product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The function that multiplies with a weight: `product` if it is an array."""
  return dot_general if isinstance(weight, Packed) else product


def placed(fn: Callable[..., Any], x: Any, y: Any, out_sharding: Any) -> Any:
  """`fn(x, y)`, with the sharding that a user has asked for."""
  if out_sharding is None:
    return fn(x, y)
  spec = list(getattr(out_sharding, "spec", out_sharding))
  return jax.sharding.reshard(explicit.call(fn, x, y, out=lambda: spec), out_sharding)


@functools.partial(
  jax.jit,
  inline=True,
  static_argnames=("dimension_numbers", "precision", "preferred_element_type", "out_sharding"),
)
def dot_general(
  x: jax.Array,
  weight: Packed,
  dimension_numbers: Any,
  *,
  precision: Any = None,
  preferred_element_type: Any = None,
  out_sharding: Any = None,
) -> jax.Array:
  """As `jax.lax.dot_general`, of an array and a weight.

  XLA for accelerators reads the integers and multiplies what they stand for as they come. For a
  CPU it would write the whole weight to memory first, which takes ten times as long as a product
  with one token (`benchmarks/quantized.py`); so there, a loop takes a block after the other.
  """
  out = preferred_element_type or x.dtype
  numbers = dimension_numbers

  def whole(x: jax.Array, weight: Packed) -> jax.Array:
    parts = zip(_halves(x, weight, numbers), weight.planes(x.dtype), strict=True)
    wide: Any = wide_dtype(out) if weight.form.per_byte == 2 else out
    product = functools.partial(lax.dot_general, precision=precision, preferred_element_type=wide)
    return functools.reduce(jnp.add, (product(a, b, numbers) for a, b in parts))

  def compute(x: jax.Array, weight: Packed) -> jax.Array:
    default = _recomputed(lambda x, weight: whole(x, weight).astype(out))
    loop = _loop(whole, x, weight, numbers)
    if loop is None:
      return default(x, weight)
    on_cpu = lambda x, weight: loop(x, weight).astype(out)
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=default)

  return placed(compute, x, weight, out_sharding)


def _halves(x: jax.Array, weight: Packed, dimension_numbers: Any) -> list[jax.Array]:
  """What of an input the planes of a weight are multiplied with."""
  ((axes, contracted), _), form = dimension_numbers, weight.form
  if form.per_byte == 1:
    return [x]
  axis = axes[contracted.index(form.axis % weight.values.ndim)]
  groups = grouped(x, x.shape[axis] // form.group, axis)
  halves = jnp.split(groups, 2, axis + 1)
  shape = [n // 2 if i == axis else n for i, n in enumerate(x.shape)]
  return [half.reshape(shape) for half in halves]


def _loop(
  whole: Callable[..., jax.Array], x: jax.Array, weight: Packed, dimension_numbers: Any
) -> Callable[..., jax.Array] | None:
  """A product as a loop over blocks of a weight; None where one block is all of it.

  A block is a range of the first axis of the weight, so that it is contiguous in memory.
  """
  (axes, contracted), (batch, _) = dimension_numbers
  shape = weight.form.shape(weight.values.shape)
  if batch or math.prod(shape) <= _BLOCK:
    return None
  length, want = shape[0], max(_BLOCK // math.prod(shape[1:]), 1)
  is_grouped = weight.form.axis % len(shape) == 0
  unit = max(weight.form.group, 1) if is_grouped else 1
  result = jax.eval_shape(whole, x, weight)

  if 0 not in contracted:  # the rows of a table, each of which gives an output
    size = min(want, length)
    where = x.ndim - len(axes)

    def by_outputs(x: jax.Array, weight: Packed) -> jax.Array:
      product = _recomputed(lambda x, weight, i: whole(x, weight.part(0, i, size)))

      def step(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        i = jnp.minimum(i * size, length - size)  # the last block begins where it fits
        return lax.dynamic_update_slice_in_dim(y, product(x, weight, i), i, where), None

      return lax.scan(step, _zeros(result, x, weight), jnp.arange(-(-length // size)))[0]

    return by_outputs

  count = length // unit
  fitting = [n for n in range(1, count + 1) if count % n == 0 and n * unit <= max(want, unit)]
  size = max(fitting) * unit
  if size * 8 < want:  # a length that is a prime
    return None
  axis = axes[contracted.index(0)]

  def by_inputs(x: jax.Array, weight: Packed) -> jax.Array:
    blocks = x.reshape(*x.shape[:axis], length // size, size, *x.shape[axis + 1 :])
    product = _recomputed(lambda x, weight, i: whole(x, weight.part(0, i * size, size)))

    def step(y: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
      x, i = block
      return y + product(x, weight, i), None

    ranges = (jnp.moveaxis(blocks, axis, 0), jnp.arange(length // size))
    return lax.scan(step, _zeros(_wide(result), x, weight), ranges)[0]

  return by_inputs


def _wide(x: Any) -> jax.ShapeDtypeStruct:
  """The shape of a sum of many, in a dtype that does not round each of them."""
  return jax.ShapeDtypeStruct(x.shape, wide_dtype(x.dtype))


def _zeros(result: Any, x: jax.Array, weight: Packed) -> jax.Array:
  """Zeros to start from; in `jax.shard_map` they differ from device to device as a product does."""
  zeros = jnp.zeros(result.shape, result.dtype)
  axes = {name for y in jax.tree.leaves((x, weight)) for name in _jax.varying(y)}
  return lax.pcast(zeros, tuple(axes), to="varying") if axes else zeros
