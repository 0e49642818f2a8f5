"""nnx.quantize: the weights of a live model become small integers.

Symmetric: a number is an integer times a scale. Also for 4 bits, where a zero point for each group
would help: in groups of 64 with one, which take 5 bits a number, the sentence vectors of MiniLM
(`examples/minilm`) have a mean cosine of 0.943 to those in float32; in groups of 32 without one,
which take as many, 0.927. The gain was not worth a third array, and another term in each product.
With 8 bits the mean is 0.999.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import variable_places, walk_nodes
from refax.core.gather import GATHERED
from refax.core.node import Node
from refax.core.variable import Variable, borrowed, identity
from refax.errors import InvalidArgumentError
from refax.graph.split import set_entry
from refax.nn.linear.einsum import Einsum, summed_axes
from refax.nn.linear.embed import Embed
from refax.nn.linear.linear import Linear, LinearGeneral
from refax.nn.norm.weight_norm import wrapper_above
from refax.nn.quantization.quantized import Form, Packed, QuantizedWeight, grouped
from refax.typing import Path, describe, wide_dtype

T = TypeVar("T")

_NAME = "nnx.quantize"
_GROUP = 32
"""How many numbers share a scale by default, with 4 bits."""


class _Found(NamedTuple):
  """A weight that is to be quantized."""

  path: Path
  weight: Any
  axes: tuple[int, ...]  # what an output is a sum over, counted from the end


def quantize(model: T, bits: int = 8, *, group_size: int | None = None, only: Filter = ...) -> T:
  """Keep the weights of a live model as integers of 8 or 4 bits, in place.

  The weights are those of `nnx.Linear` (and so of `nnx.LoRALinear` and of what `nnx.LoRA` stands
  beside), `nnx.LinearGeneral` (the projections of attention), `nnx.Einsum` and `nnx.Embed`. In the
  place of each there is a `nnx.QuantizedWeight`, with the Variables `kernel.values` and
  `kernel.scale`, which reads as the array `values * scale`: a layer computes in the dtype that it
  computed in. Biases stay as they are. A weight that is shared stays so, also with a layer that
  `only` leaves out.

  The weights are no Params any more. Gradients flow through them to what comes before, and to a
  LoRA beside. A checkpoint of a quantized model goes into a model that was quantized alike:
  `nnx.eval_shape(lambda: nnx.quantize(build(), 4))` is one without values.

  Args:
    model: a Module, or any pytree of Modules.
    bits: 8 or 4. Of 4 bits, two numbers lie in a byte.
    group_size: how many numbers share a scale: numbers next to each other along the axis that
      outputs are sums over. By default, with 8 bits, all that one output is a sum of; with 4 bits
      32, or all where the axis is no multiple of 32.
    only: which layers; a filter of paths and layers, such as `nnx.Not(nnx.Embed)` or
      `nnx.PathContains("feed_forward")`.

  Returns:
    `model` itself.

  Raises:
    InvalidArgumentError: `bits` is neither 8 nor 4, `only` matches no layer with a weight, or a
      weight is quantized already, is not made of floats, has a NaN or an infinity, is no multiple
      of `group_size`, or is computed by a `nnx.WeightNorm`. Nothing has changed. (In a transform,
      no number is known: there a NaN makes its group NaN.)
    TraceContextError: a model from outside a transform is quantized inside it.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Embed(10, 64, rngs=rngs), nnx.Linear(64, 3, rngs=rngs))
  >>> before = model(jnp.arange(10))
  >>> after = nnx.quantize(model, 8)(jnp.arange(10))
  >>> bool(abs(after - before).max() < 0.02), model.layers[1].kernel.values.dtype
  (True, dtype('int8'))
  """
  if isinstance(bits, bool) or bits not in (4, 8):
    raise InvalidArgumentError.value(_NAME, "bits", bits, "8 or 4")
  is_size = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
  if group_size is not None and not is_size:
    want = "a number of weights that share a scale: 32; None for the usual one"
    raise InvalidArgumentError.value(_NAME, "group_size", group_size, want)
  found = list(_weights(model, only))
  forms = [_form(each, int(bits), group_size) for each in found]
  _check_found(model, only, found)
  owners = _owners(model, found)
  for each, form in zip(found, forms, strict=True):
    new = _quantized_weight(each, form)
    for owner, key in owners[identity(each.weight)]:
      set_entry(owner, key, new)
  return model


def weight_of(layer: Any) -> tuple[str, tuple[int, ...]] | None:
  """The attribute with the weight of a layer, and the axes that an output is a sum over.

  They are counted from the end: in a `nnx.Stack` there are others in front.
  """
  if isinstance(layer, Linear):
    return "kernel", (-2,)
  if isinstance(layer, LinearGeneral):
    last = -len(layer.out_features)
    return "kernel", tuple(range(last - len(layer.in_features), last))
  if isinstance(layer, Embed):
    return "embedding", (-1,)
  if isinstance(layer, Einsum) and (axes := summed_axes(layer)):
    return "kernel", axes
  return None


def _weights(model: Any, only: Filter) -> Iterator[_Found]:
  """The weights of the layers that a filter matches, each once; raises InvalidArgumentError."""
  predicate, nodes, seen = to_predicate(only), dict(walk_nodes(model)), set()
  for path, layer in nodes.items():
    known = weight_of(layer)
    if known is None or not predicate(path, layer):
      continue
    name, axes = known
    at, weight = (*path, name), getattr(layer, name, None)
    if isinstance(weight, QuantizedWeight):
      raise _error(at, "is quantized already", repr(weight.form), "only=... to leave its layer out")
    if not isinstance(weight, Variable) or identity(weight) in seen:
      continue
    seen.add(identity(weight))
    wrapper = wrapper_above(nodes, path)
    if wrapper is not None:
      kind = type(wrapper).__name__
      fix = "only=... to leave its layer out, or write the weights to a layer without the wrapper"
      raise _error(at, f"is computed anew in each call, by {kind}", f"a layer in {kind}", fix)
    yield _Found(at, weight, axes)


def _form(found: _Found, bits: int, group_size: int | None) -> Form:
  """How a weight will be kept; raises InvalidArgumentError if it cannot be."""
  path, weight, axes = found
  if not hasattr(weight.get_raw_value(), "dtype") or not jnp.issubdtype(weight.dtype, jnp.floating):
    raise _error(path, "is not made of floats", describe(weight), "only=... to leave its layer out")
  value = borrowed(weight)
  is_known = isinstance(value, jax.Array) and not _jax.is_tracer(value)
  if is_known and not bool(jnp.isfinite(value).all()):
    number = int(value.size - jnp.isfinite(value).sum())
    got = f"{number} numbers that are NaN or infinite, of {value.size}"
    raise _error(path, "cannot be quantized", got, "the model as it was before it diverged")
  size = weight.shape[axes[-1]]
  if group_size is not None and size % group_size:
    got = f"group_size={group_size} for axis {axes[-1]} of {describe(weight)}"
    fix = f"group_size=None, or a divisor of {size}"
    raise _error(path, "does not divide into such groups", got, fix)
  if group_size is None and bits == 4:
    group_size = _GROUP if size % _GROUP == 0 else size
  return Form(bits, axes[-1], group_size or 0, jnp.dtype(weight.dtype))


def _check_found(model: Any, only: Filter, found: list[_Found]) -> None:
  if found:
    return
  layers = [(path, x) for path, x in walk_nodes(model) if weight_of(x) is not None]
  shown = ", ".join(
    f"{'.'.join(map(str, p)) or 'the model'} ({type(x).__name__})" for p, x in layers
  )
  kinds = "nnx.Linear, nnx.LinearGeneral, nnx.Einsum or nnx.Embed"
  want = f"a filter that matches one of {shown}" if shown else f"a model that has a {kinds}"
  name, value = ("only", only) if shown else ("model", model)
  raise InvalidArgumentError.value(_NAME, name, value, want)


def _owners(model: Any, found: list[_Found]) -> dict[int, list[tuple[Node, Any]]]:
  """The objects that hold each weight, and the names under which they do."""
  owners: dict[int, list[tuple[Node, Any]]] = {identity(each.weight): [] for each in found}
  for path, owner, variable in variable_places(model):
    if identity(variable) not in owners:
      continue
    if owner is None:
      fix = "only=... to leave its layer out, or nnx.List and nnx.Dict for what holds it there"
      raise _error(path, "is shared with a layer, and cannot be replaced here", "a tuple", fix)
    owners[identity(variable)].append((owner, path[-1]))
  return owners


def _quantized_weight(found: _Found, form: Form) -> QuantizedWeight:
  _, weight, axes = found
  value = weight.get_raw_value()
  if isinstance(value, jax.ShapeDtypeStruct):
    packed = jax.eval_shape(lambda x: _packed(x, form, axes), value)
  else:
    packed = _packed(borrowed(weight), form, axes)
  metadata = {name: x for name, x in weight.get_metadata().items() if name != GATHERED}
  # In a transform, what is made has the storage of whatever is made there.
  hijax = weight.is_hijax if _jax.no_trace_active() else None
  return QuantizedWeight(packed, is_hijax=hijax, **metadata)


@functools.partial(jax.jit, static_argnames=("form", "axes"))
def _packed(x: jax.Array, form: Form, axes: tuple[int, ...]) -> Packed:
  """A weight as integers and scales.

  A scale is the largest number of its group, divided by the largest integer. It is in float32, or
  better, and never so small that 1 / scale is none, or so large that the largest integer times the
  scale is none.
  """
  top, wide = 2 ** (form.bits - 1) - 1, wide_dtype(x.dtype)
  limits = jnp.finfo(wide)
  values = x.astype(wide)
  if form.group:
    values, axes = grouped(values, x.shape[form.axis] // form.group, form.axis), (form.axis,)
  scale = abs(values).max(axes, keepdims=True) / top
  scale = jnp.clip(scale, limits.tiny, limits.max / top * (1 - 8 * limits.eps))
  integers = jnp.clip(jnp.round(values / scale), -top, top).astype(jnp.int8)
  if form.per_byte == 2:
    low, high = jnp.split(integers.astype(jnp.uint8), 2, form.axis)
    integers = (low & 15) | (high << 4)
  shape = list(x.shape)
  shape[form.axis] //= form.per_byte
  return Packed(integers.reshape(shape), scale.squeeze(form.axis) if form.group else scale, form)


def _error(path: Path, problem: str, got: str, fix: str) -> InvalidArgumentError:
  return InvalidArgumentError(
    f"{_NAME}: the weight {problem}",
    at=".".join(map(str, path)),
    got=got,
    fix=f"pass {fix}",
  )
