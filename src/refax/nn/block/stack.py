"""Stack: layers of one kind, one after the other, as a single scan."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.annotation import PARTITION_NAME
from refax.core.flatten import flatten
from refax.core.gather import gather_again
from refax.core.module import Module
from refax.core.variable import Cache, Variable, identity, is_variable
from refax.core.write import write
from refax.errors import AliasError, InvalidArgumentError, ShapeMismatchError, TreeMismatchError
from refax.nn import check, explicit
from refax.rngs import Rngs
from refax.transforms.axes import Carry
from refax.transforms.axis_names import add_axis, remove_axis
from refax.transforms.loops import Scan
from refax.transforms.mapping import vmap
from refax.transforms.remat import remat
from refax.typing import describe


class Stack(Module):
  """`length` layers of one kind, one after the other, compiled once for all.

  Their Variables are stacked: those of `layers` have a leading axis of size `length`. A call is one
  `scan` over it, so that tracing and compiling take as long as for one layer. What a layer writes
  (running statistics, random streams, caches) is its own; a memory of which it writes a part (the
  next position, while decoding) is updated in place.

  Args:
    layer: a Module class or function, called as `layer(*args, rngs=rngs, **kwargs)`.
    length: the number of layers.
    *args: arguments of `layer`.
    rngs: forked, so that each layer has streams of its own.
    remat: whether to recompute a layer in the backward pass instead of keeping what it computes:
      activations then take the memory of one layer, plus one input for each. A call that decodes
      is not recomputed.
    policy: with `remat`, what to keep all the same, one of `jax.checkpoint_policies`.
    unroll: how many layers each step of the scan holds, as in `jax.lax.scan`.
    **kwargs: keyword arguments of `layer`.

  Raises:
    InvalidArgumentError: `length` is not a positive int, `layer` is no function, or `rngs` is not
      an `nnx.Rngs`.
    AliasError: a layer holds a Variable that was made outside, which all layers would share.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> stack = nnx.Stack(nnx.Linear, 12, 8, 8, rngs=nnx.Rngs(0))
  >>> stack(jnp.ones((2, 8))).shape, stack.layers.kernel.shape, len(stack)
  ((2, 8), (12, 8, 8), 12)
  >>> stack[0].kernel.shape
  (8, 8)
  >>> nnx.Stack.of(list(stack)).layers.kernel.shape
  (12, 8, 8)
  """

  def __init__(
    self,
    layer: Callable[..., Any],
    length: int,
    *args: Any,
    rngs: Rngs,
    remat: bool = False,
    policy: Callable[..., bool] | None = None,
    unroll: int = 1,
    **kwargs: Any,
  ):
    if not callable(layer) or isinstance(layer, Module):
      want = "the class of the layers, or a function that builds one: nnx.Stack(Block, 12, ...)"
      raise InvalidArgumentError.value("Stack", "layer", layer, want)
    length = check.size("Stack", "length", length)
    streams = check.streams("Stack", rngs).fork(split=length)

    def build(rngs: Rngs) -> Any:
      built = layer(*args, rngs=rngs, **kwargs)
      _check_own(built)
      return built

    self._set(vmap(build)(streams), length)
    self.remat = remat
    self.policy = policy
    self.unroll = unroll

  def _set(self, layers: Any, length: int) -> None:
    self.layers = layers
    self.length = length
    self.remat = False
    self.policy: Callable[..., bool] | None = None
    self.unroll = 1

  @classmethod
  def of(cls, layers: Sequence[Any]) -> "Stack":
    """A stack with copies of the Variables of these layers.

    Args:
      layers: Modules of one structure.

    Returns:
      A Stack; `remat`, `policy` and `unroll` are attributes that may be set.

    Raises:
      InvalidArgumentError: there are no layers.
      TreeMismatchError: a layer has another structure than the first one.
      AliasError: two layers share a Variable.
    """
    if not layers:
      raise InvalidArgumentError.value("Stack.of", "layers", layers, "at least one layer")
    first = flatten(layers[0])
    for i, layer in enumerate(layers):
      _check_alike(i, layer, first)
    _check_apart(layers)
    stack = cls.__new__(cls)
    stack._set(jax.tree.map(_stacked, *layers, is_leaf=is_variable), len(layers))
    return stack

  def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the layers, each with what the one before has returned.

    Args:
      x: the first argument of the first layer: an array or a pytree.
      *args: more arguments, the same for all layers.
      **kwargs: keyword arguments, the same for all layers.

    Returns:
      What the last layer returns.

    Raises:
      ShapeMismatchError: a layer does not return what it was given, in shape and dtype.
    """

    def step(x, layer):
      y = layer(x, *args, **kwargs)
      _check_carry(x, y)
      return jax.tree.map(explicit.put_like, y, x)

    x = jax.tree.map(check.as_input, x, is_leaf=is_variable)
    return self._scan(step, x).run(reverse=False, unroll=self.unroll)

  def _scan(self, step: Callable[[Any, Any], Any], x: Any) -> Scan:
    """The loop over the layers, traced."""
    over = lambda f: Scan(f, (x, self.layers), {}, in_axes=(Carry, 0), out_axes=Carry, length=None)
    leaves = flatten(self.layers).leaves
    is_gathered = any(isinstance(x, Variable) and x._def.gathered for x in leaves)
    if not self.remat and not is_gathered:
      return over(step)
    policy = self.policy if self.remat else gather_again
    if any(isinstance(leaf, Cache) for leaf in leaves):
      plain = over(step)
      if plain.in_place:  # it decodes: to recompute nothing is no loss, to copy memories would be
        return plain
    return over(remat(step, policy=policy, prevent_cse=False))

  def __len__(self) -> int:
    return self.length

  def __iter__(self) -> Iterator[Any]:
    return (self[i] for i in range(self.length))

  @overload
  def __getitem__(self, index: int) -> Any: ...
  @overload
  def __getitem__(self, index: slice) -> "Stack": ...
  def __getitem__(self, index):
    """A copy of a layer, or a Stack of copies of some."""
    if isinstance(index, slice):
      return type(self).of([self[i] for i in range(self.length)[index]])
    index = range(self.length)[index]
    take = lambda x: jax.tree.map(lambda x: x[index], x)
    copy = lambda v: _one_of(v, take) if isinstance(v, Variable) else take(v)
    return jax.tree.map(copy, self.layers, is_leaf=is_variable)

  def __setitem__(self, index: int, layer: Any) -> None:
    """Write the values of a layer's Variables in the place of those of the layer at `index`."""
    index = range(self.length)[index]
    _check_alike(index, layer, flatten(self[index]))
    new = flatten(layer).leaves
    writes = []
    for stacked, x in zip(flatten(self.layers).leaves, new, strict=True):
      if isinstance(stacked, Variable):
        value = jax.tree.map(
          lambda old, x: old.at[index].set(x), stacked.get_value(), x.get_value()
        )
        writes.append((stacked, value))
    write(*writes)


def _one_of(v: Variable, take: Callable[[Any], Any]) -> Variable:
  """The Variable of one layer, without the axis of layers."""
  new = v.copy(take(v.get_value()))
  if v.sharding_names:
    remove_axis(new, 0, {PARTITION_NAME: next(iter(v.sharding_names))})
  return new


def _stacked(*parts: Any) -> Any:
  stack = lambda *xs: jnp.stack(xs)
  if not isinstance(parts[0], Variable):
    return jax.tree.map(stack, *parts)
  new = parts[0].copy(jax.tree.map(stack, *(v.get_value() for v in parts)))
  return add_axis(new, 0, {PARTITION_NAME: None})


def _check_own(layer: Any) -> None:
  """Raise AliasError if a layer, which is being built, holds a Variable that is not of its own."""
  now, flat = _jax.trace_state(), flatten(layer)
  for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True):
    if isinstance(leaf, Variable) and leaf._trace != now:
      got = f"a Variable from outside, as {'.'.join(map(str, path)) or 'the layer'} of each layer"
      fix = "pass what is shared when you call it, stack(x, shared), or build one for each layer"
      raise AliasError.stacked(leaf._def.origin, got, fix)


def _check_apart(layers: Sequence[Any]) -> None:
  """Raise AliasError if two layers share a Variable."""
  seen: dict[int, int] = {}
  for i, layer in enumerate(layers):
    for leaf in flatten(layer).leaves:
      if isinstance(leaf, Variable) and seen.setdefault(identity(leaf), i) != i:
        got = f"one Variable in layer {seen[identity(leaf)]} and in layer {i}"
        fix = "pass what is shared to the call of the Stack, or copies: nnx.clone(layer)"
        raise AliasError.stacked(leaf._def.origin, got, fix)


def _check_alike(index: int, layer: Any, want: Any) -> None:
  """Raise TreeMismatchError unless a layer has the structure, shapes and dtypes of another."""
  flat = flatten(layer)
  if flat.graphdef != want.graphdef:
    raise TreeMismatchError(
      "the layers of a Stack have one structure",
      got=f"layer {index}: {_difference(flat, want)}",
      fix="pass layers that were built alike, in the same mode (train, eval)",
    )
  for path, a, b in zip(flat.graphdef.paths, flat.leaves, want.leaves, strict=True):
    if (a.shape, a.dtype) != (b.shape, b.dtype):
      raise TreeMismatchError(
        "the layers of a Stack have Variables of one shape and dtype",
        at=".".join(map(str, path)),
        got=f"{describe(a)} in layer {index}, {describe(b)} in the others",
        fix="pass layers that were built alike",
      )


def _difference(got: Any, want: Any) -> str:
  """What two flattened layers do not have in common, in words."""
  extra = set(got.graphdef.paths) - set(want.graphdef.paths)
  lacking = set(want.graphdef.paths) - set(got.graphdef.paths)
  if not extra and not lacking:
    return "static attributes, or what is shared, differ"
  names = lambda paths: ", ".join(sorted(".".join(map(str, p)) for p in paths))
  parts = [f"has {names(extra)}"] * bool(extra) + [f"lacks {names(lacking)}"] * bool(lacking)
  return " and ".join(parts)


def _check_carry(x: Any, y: Any) -> None:
  """Raise ShapeMismatchError unless `y` can be the input of the next layer as `x` was."""
  types = lambda tree: [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
  if jax.tree.structure(x) != jax.tree.structure(y) or types(x) != types(y):
    shown = lambda tree: ", ".join(map(describe, jax.tree.leaves(tree)))
    raise ShapeMismatchError(
      "each layer of a Stack gets what the one before has returned",
      got=f"{shown(y)} from a layer that was given {shown(x)}",
      fix="let the layer return the shape and dtype of its input, or cast what the Stack is given",
    )
