"""The memory of attention of a whole model: made, measured and cut back in all layers at once."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.core.variable import BatchStat, Param, Variable
from refax.errors import InvalidArgumentError
from refax.graph.inspect import iter_graph, iter_modules
from refax.nn import check as nn_check
from refax.nn.attention.kv_cache import Memory
from refax.nn.attention.multi_head import MultiHeadAttention
from refax.nn.block.stack import Stack
from refax.nn.block.transformer import TransformerBlock
from refax.nn.lora.lora import LoRA
from refax.nn.quantization.quantized import QuantizedParam
from refax.rngs import RngState
from refax.transforms.jit import jit
from refax.transforms.mapping import vmap
from refax.typing import ArrayLike, Dtype


def init_cache(
  model: Any,
  batch_size: int,
  max_length: int,
  *,
  dtype: Dtype | None = None,
  per_sequence: bool = False,
  spare: int = 0,
) -> None:
  """Make an empty memory of keys and values in every self-attention of a model.

  `model(tokens, decode=True)` then adds to it. `nnx.generate` calls this itself.

  Args:
    model: a Module that holds `nnx.MultiHeadAttention` at any depth, in a `nnx.Stack` too.
    batch_size: how many sequences are decoded together.
    max_length: how many positions a sequence can have.
    dtype: of keys and values; by default that of the layer's keys.
    per_sequence: whether the sequences may be of different lengths.
    spare: with a sliding window, how many positions `nnx.truncate_cache` can take back.

  Raises:
    InvalidArgumentError: a size is not a positive int, or the model has no attention.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> decoder = nnx.TransformerDecoder(2, 8, num_heads=2, rngs=nnx.Rngs(0))
  >>> nnx.init_cache(decoder, batch_size=1, max_length=16)
  >>> _ = decoder(jnp.ones((1, 5, 8)), decode=True); nnx.cache_length(decoder)
  5
  >>> nnx.truncate_cache(decoder, 3); nnx.cache_length(decoder)
  3
  """
  batch_size = nn_check.size("init_cache", "batch_size", batch_size)
  max_length = nn_check.size("init_cache", "max_length", max_length)
  options = {"per_sequence": per_sequence, "spare": spare}
  if not _make(model, batch_size, max_length, dtype, options):
    want = "a model with nnx.MultiHeadAttention"
    raise InvalidArgumentError.value("init_cache", "model", type(model).__name__, want)


def _make(node: Any, batch: int, length: int, dtype: Any, options: dict[str, Any]) -> bool:
  """Make the memories in a part of a model; returns whether there is one to make."""
  modules = list(iter_modules(node))
  stacks = {path: module for path, module in modules if isinstance(module, Stack)}
  crossed = _crossed(module for _, module in modules)
  made = False
  for path, module in modules:
    if any(path[: len(outer)] == outer for outer in stacks if outer != path):
      continue
    if isinstance(module, Stack):
      made |= _make_in_stack(module, batch, length, dtype, options)
    elif isinstance(module, MultiHeadAttention) and id(module) not in crossed:
      module.init_cache((batch, length, 0), dtype or _dtype_of(module), **options)
      made = True
  return made


def _crossed(objects: Iterable[Any]) -> set[int]:
  """The identities of attention to another sequence, whose keys nobody adds to."""
  return {id(x.cross_attention) for x in objects if isinstance(x, TransformerBlock)}


def _make_in_stack(stack: Stack, *args: Any) -> bool:
  if not any(isinstance(m, MultiHeadAttention) for _, m in iter_modules(stack.layers)):
    return False

  def make(layers: Any) -> None:
    _make(layers, *args)

  vmap(make)(stack.layers)
  return True


def _dtype_of(attention: MultiHeadAttention) -> Dtype:
  """The dtype that keys are computed in."""
  projection: Any = attention.key
  while isinstance(projection, LoRA):
    projection = projection.base_module
  dtype = getattr(getattr(projection, "kernel", None), "dtype", None)
  is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
  return attention.dtype or (dtype if is_float else attention.param_dtype)


class Layer(NamedTuple):
  """A self-attention, its memory, and over how many stacks its Variables have an axis."""

  attention: MultiHeadAttention
  memory: Memory
  depth: int

  @property
  def used(self) -> Variable:
    """How many positions were decoded: `[stacks..., batch...]` or `[stacks...]`."""
    return self.memory.used

  @property
  def batch(self) -> tuple[int, ...]:
    """The axes of the batch."""
    return self.memory.keys.shape[self.depth : -3]


class Held(NamedTuple):
  """What one walk through a model has found.

  Attributes:
    layers: every self-attention that has a memory.
    lacking: whether there is a self-attention without one.
    attentions: every attention, with or without a memory.
    nothing_else: whether all that the model remembers between steps is in the memory of attention.
      Then positions can be decoded and taken back. A recurrent state cannot be.
  """

  layers: list[Layer]
  lacking: bool
  attentions: list[MultiHeadAttention]
  nothing_else: bool

  @property
  def can_be_cut(self) -> bool:
    """Whether positions that are in the memory can be taken back."""
    return bool(self.layers) and self.nothing_else


def look(model: Any) -> Held:
  """What a model remembers, and where."""
  found = list(iter_graph(model))
  stacks = [path for path, x in found if isinstance(x, Stack)]
  attentions = [(path, x) for path, x in found if isinstance(x, MultiHeadAttention)]
  crossed = _crossed(x for _, x in found)
  layers, own, lacking = [], set(), False
  for path, m in attentions:
    keys, values, used = m.cached_key, m.cached_value, m.cache_index
    own |= {id(keys), id(values), id(used)}
    if keys is not None and values is not None and used is not None:
      depth = sum(path[: len(stack)] == stack for stack in stacks)
      layers.append(Layer(m, Memory(keys, values, used, m.sliding_window), depth))
    elif id(m) not in crossed:
      lacking = True
  fixed = (Param, QuantizedParam, BatchStat, RngState)
  others = [x for _, x in found if isinstance(x, Variable) and not isinstance(x, fixed)]
  modules = [m for _, m in attentions]
  return Held(layers, lacking, modules, all(id(x) in own for x in others))


def memories(model: Any) -> list[Layer]:
  """Every self-attention of a model that has a memory."""
  return look(model).layers


def cache_length(model: Any) -> Any:
  """How many positions the memory of a model holds: decoded, and not taken back.

  Args:
    model: a Module for which `nnx.init_cache` or `nnx.generate` has made a memory.

  Returns:
    An int, or `[batch...]` where each sequence has a length of its own; inside a transform an
    array.

  Raises:
    InvalidArgumentError: there is no memory.

  >>> from refax import nnx
  >>> decoder = nnx.TransformerDecoder(2, 8, num_heads=2, rngs=nnx.Rngs(0))
  >>> nnx.init_cache(decoder, batch_size=3, max_length=16, per_sequence=True)
  >>> nnx.cache_length(decoder).tolist()
  [0, 0, 0]
  """
  return length_in(_known("cache_length", model)[0])


def length_in(layer: Layer) -> Any:
  """How many positions the memory of one layer holds, as `cache_length`."""
  used = layer.used[...][(0,) * layer.depth]
  if _jax.is_tracer(used):
    return used
  used = np.asarray(used)
  return used if used.ndim else int(used)


def truncate_cache(model: Any, length: ArrayLike) -> None:
  """Forget all positions but the first ones, in the memory of every layer, in place.

  Args:
    model: a Module with a memory.
    length: how many stay, 0 to forget all: a number, or one for each sequence, `[batch...]`, of a
      memory that was made `per_sequence`.

  Raises:
    InvalidArgumentError: there is no memory, or it does not hold these positions (any more). Inside
      a transform nothing can be raised: what is computed from there on is NaN.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> decoder = nnx.TransformerDecoder(2, 8, num_heads=2, rngs=nnx.Rngs(0))
  >>> nnx.init_cache(decoder, batch_size=1, max_length=16)
  >>> x = decoder(jnp.ones((1, 5, 8)), decode=True)
  >>> nnx.truncate_cache(decoder, 4)
  >>> again = decoder(jnp.ones((1, 1, 8)), decode=True)
  >>> bool(jnp.allclose(again[:, 0], x[:, 4], atol=1e-5))
  True
  """
  layers = _known("truncate_cache", model)
  length = jnp.asarray(length)
  shape = layers[0].used.shape[layers[0].depth :]
  integer = jnp.issubdtype(length.dtype, jnp.integer)
  if not integer or length.ndim > len(shape) or length.shape not in ((), shape):
    want = f"one int, or ints of shape {shape}" if shape else "an int: the memory has one length"
    raise InvalidArgumentError.value("truncate_cache", "length", length, want)
  for layer in layers:
    layer.attention.truncate_cache(length)


@jit
def cut(model: Any, length: ArrayLike) -> None:
  """`truncate_cache` to what the memory is known to hold, in one compiled step."""
  for layer in memories(model):
    layer.attention.truncate_cache(length)


def _known(function: str, model: Any) -> list[Layer]:
  layers = memories(model)
  if not layers:
    want = "a model with a memory: call nnx.init_cache(model, batch_size, max_length) first"
    raise InvalidArgumentError.value(function, "model", type(model).__name__, want)
  return layers


class Wanted(NamedTuple):
  """The memory that a generation needs.

  Attributes:
    batch: how many sequences.
    length: how many positions.
    exact: whether the user has said how many.
    spare: how many positions may be taken back.
    dtype: of keys and values; None for any.
  """

  batch: int
  length: int
  exact: bool
  spare: int
  dtype: Any

  @property
  def per_sequence(self) -> bool:
    """Sequences of a batch end at different lengths."""
    return self.batch > 1


def check(
  function: str, model: Any, held: Held, wanted: Wanted, *, resume: bool, ragged: bool
) -> None:
  """Raise InvalidArgumentError if a model cannot generate what is wanted; nothing has changed."""
  if (ragged or wanted.spare) and not (held.attentions and held.nothing_else):
    what = "prompts of different lengths" if ragged else "a draft model"
    want = "a model whose only memory is that of nnx.MultiHeadAttention, which can be taken back"
    raise InvalidArgumentError.value(function, "model", f"{type(model).__name__}, for {what}", want)
  if not resume:
    return
  if held.attentions and not held.layers:
    want = "False: the model has no memory yet, of what it would continue"
    raise InvalidArgumentError.value(function, "resume", True, want)
  for layer in held.layers:
    _check_resumed(function, layer, wanted)


def _check_resumed(function: str, layer: Layer, wanted: Wanted) -> None:
  memory, used, batch = layer.memory, layer.used[...], layer.batch
  if batch != (wanted.batch,):
    want = f"{batch} prompts, as many as the memory has sequences"
    raise InvalidArgumentError.value(function, "prompt", f"{wanted.batch} prompts", want)
  if wanted.per_sequence and used.shape[layer.depth :] != batch:
    want = "False, or a memory that was made by nnx.init_cache(..., per_sequence=True)"
    raise InvalidArgumentError.value(function, "resume", True, want)
  slots = memory.slots
  if memory.is_ring:
    if slots < (memory.window or 0) + wanted.spare:
      want = f"a memory made by nnx.init_cache(..., spare={wanted.spare}), for its sliding window"
      raise InvalidArgumentError.value(function, "resume", True, want)
  elif not _jax.is_tracer(used) and int(used.max()) + wanted.length > slots:
    want = f"at most {slots - int(used.max())} positions, which the memory has left of {slots}"
    got = f"{wanted.length} more positions"
    raise InvalidArgumentError.value(function, "max_new_tokens", got, want)


def begin(model: Any, held: Held, wanted: Wanted) -> Held:
  """An empty memory for what is wanted: the one that there is, if it fits all of the model."""
  if not held.lacking and _can_hold(held.layers, wanted):
    cut(model, 0)
    return held
  length = wanted.length if wanted.exact else -(-wanted.length // 128) * 128
  options = {"per_sequence": wanted.per_sequence, "spare": wanted.spare}
  _make(model, wanted.batch, length, wanted.dtype, options)
  return look(model)


def _can_hold(layers: list[Layer], wanted: Wanted) -> bool:
  def fits(layer: Layer) -> bool:
    memory, window = layer.memory, layer.memory.window
    need = wanted.length if window is None else min(wanted.length, window + wanted.spare)
    right = layer.batch == (wanted.batch,) and wanted.dtype in (None, memory.keys.dtype)
    own = layer.used.shape[layer.depth :]
    return right and memory.slots >= need and own == (layer.batch if wanted.per_sequence else ())

  return bool(layers) and all(map(fits, layers))


def freeze(model: Any, done: jax.Array) -> "Frozen":
  """What to do after a step so that sequences which are `done` stay as they were before it."""
  return Frozen([(layer, layer.used[...]) for layer in memories(model)], done)


class Frozen(NamedTuple):
  """The lengths before a step; see `freeze`."""

  before: list[tuple[Layer, Any]]
  done: jax.Array

  def restore(self) -> None:
    """Take back the step in the sequences that were done."""
    for layer, used in self.before:
      layer.used[...] = jnp.where(self.done, used, layer.used[...])
