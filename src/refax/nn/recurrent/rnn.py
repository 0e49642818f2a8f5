"""RNN and Bidirectional: a recurrent cell, step by step over a sequence."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes, explicit
from refax.nn.recurrent.cell import RNNCellBase
from refax.rngs import Rngs, RngStream
from refax.transforms.abstract import eval_shape
from refax.transforms.axes import Carry, StateAxes
from refax.transforms.loops import scan
from refax.typing import ArrayLike, describe


class RNN(Module):
  """A cell over a sequence, in one `jax.lax.scan`.

  State of the cell that a step writes is seen by the next one: each step draws new random numbers,
  and running statistics move with each step.

  Args:
    cell: what to run.
    time_major: whether time is the first axis of the input, and not the one before the features.
    return_carry: whether to return the last carry too.
    reverse: whether to go from the end to the start.
    keep_order: whether the outputs of a reversed sequence are in the order of the input.
    unroll: as in `jax.lax.scan`.
    state_axes: for each filter an axis along which the steps have state of their own, or
      `nnx.Carry` or None for state that they share; by default they share all.
    broadcast_rngs: a filter of random streams that give the same keys at every step.
    rngs: streams, of which `carry` is used for the first carry; True for a stream with seed 0,
      False for none.

  Raises:
    InvalidArgumentError: `cell` is no cell, or `rngs` is no stream.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rnn = nnx.RNN(nnx.GRUCell(3, 5, rngs=nnx.Rngs(0)))
  >>> rnn(jnp.ones((2, 10, 3))).shape
  (2, 10, 5)
  >>> carry, outputs = rnn(jnp.ones((2, 10, 3)), return_carry=True)
  >>> bool((carry == outputs[:, -1]).all())
  True
  """

  def __init__(
    self,
    cell: RNNCellBase,
    *,
    time_major: bool = False,
    return_carry: bool = False,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
    state_axes: Mapping[Filter, Any] | None = None,
    broadcast_rngs: Filter = None,
    rngs: Rngs | RngStream | bool = True,
  ):
    if not (callable(cell) and hasattr(cell, "initialize_carry")):
      raise InvalidArgumentError.value("RNN", "cell", cell, "an nnx.RNNCellBase")
    self.cell = cell
    self.time_major = time_major
    self.return_carry = return_carry
    self.reverse = reverse
    self.keep_order = keep_order
    self.unroll = unroll
    axes = {...: Carry} if state_axes is None else state_axes
    self.state_axes = StateAxes({f: None if axis is Carry else axis for f, axis in axes.items()})
    self.broadcast_rngs = broadcast_rngs
    self.rngs = _stream("RNN", rngs)

  def __call__(
    self,
    inputs: ArrayLike,
    *,
    initial_carry: Any = None,
    seq_lengths: ArrayLike | None = None,
    return_carry: bool | None = None,
    time_major: bool | None = None,
    reverse: bool | None = None,
    keep_order: bool | None = None,
    rngs: Rngs | RngStream | None = None,
  ) -> Any:
    """Run the cell over a sequence.

    Args:
      inputs: `[batch..., time, features...]`, or `[time, batch..., features...]` if `time_major`.
      initial_carry: the carry of the first step; by default `cell.initialize_carry`.
      seq_lengths: `[batch...]`, how many steps of each sequence are no padding: the carry that is
        returned is that after the last of them, and a reversed sequence starts with it. A
        sequence of length 0 returns the first carry.
      return_carry: goes before the attribute, if not None, like all that follow.
      time_major: whether time is the first axis.
      reverse: whether to go from the end to the start.
      keep_order: whether the outputs of a reversed sequence are in the order of the input.
      rngs: streams for the first carry.

    Returns:
      The outputs `[batch..., time, ...]` (or time first), or a tuple of last carry and outputs.

    Raises:
      ShapeMismatchError: the input has too few axes or another size, or `seq_lengths` is no
        integer for each sequence.
      TreeMismatchError: the cell returns another carry than it gets.
    """
    reverse = self.reverse if reverse is None else reverse
    time_major = self.time_major if time_major is None else time_major
    return_carry = self.return_carry if return_carry is None else return_carry
    keep_order = self.keep_order if keep_order is None else keep_order
    x = check.as_input(inputs)
    time = _time_axis("RNN", x, getattr(self.cell, "num_feature_axes", 1), time_major)
    batch = x.ndim - getattr(self.cell, "num_feature_axes", 1) - 1
    lengths = _lengths("RNN", x, seq_lengths, batch, time)
    shape = x.shape[:time] + x.shape[time + 1 :]
    if reverse:
      x = flip_sequences(x, lengths, batch, time_major)
    if initial_carry is None:
      initial_carry = self.cell.initialize_carry(shape, self.rngs if rngs is None else rngs)
    split = explicit.names(x)[time] if explicit.axes() else None
    x = explicit.whole(x, time)  # there is a step for each index
    carry = _settled(self.cell, initial_carry, x, time)
    carry, outputs = self._scan(carry, x, time, lengths if return_carry else None)
    if split is not None:
      outputs = jax.tree.map(lambda y: _split_again(y, time, split), outputs)
    if reverse and keep_order:
      outputs = jax.tree.map(lambda y: flip_sequences(y, lengths, batch, time_major), outputs)
    return (carry, outputs) if return_carry else outputs

  def _scan(self, carry: Any, x: jax.Array, time: int, lengths: Any) -> tuple[Any, Any]:
    """The last carry, or that after `lengths` steps, and all outputs."""
    counts = [stream.count.get_value() for stream in self._broadcast(self.cell)]

    def step(state: tuple[Any, Any, Any], cell: RNNCellBase, x: jax.Array):
      carry, at_length, done = state
      for stream, count in zip(self._broadcast(cell), counts, strict=True):
        stream.count.set_value(count)
      new, y = cell(carry, x)
      carry = _split_as(new, carry)
      if lengths is not None:
        last = done + 1 == lengths
        at_length = jax.tree.map(lambda new, old: _where(last, new, old), carry, at_length)
        done = done + 1
      return (carry, at_length, done), y

    state = (carry, None, None) if lengths is None else (carry, carry, jnp.zeros((), int))
    run = scan(
      step,
      unroll=self.unroll,
      in_axes=(Carry, self.state_axes, time),
      out_axes=(Carry, time),
    )
    (carry, at_length, _), outputs = run(state, self.cell, x)
    return (carry if lengths is None else at_length), outputs

  def _broadcast(self, cell: RNNCellBase) -> list[RngStream]:
    """The random streams of a cell that give the same keys at every step."""
    if self.broadcast_rngs is None:
      return []
    wanted = to_predicate(self.broadcast_rngs)
    return [s for path, s in walk_nodes(cell) if isinstance(s, RngStream) and wanted(path, s)]


def _concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
  return explicit.fitted(
    lambda a, b: jnp.concatenate([a, b], axis=-1), a, b, out=lambda: explicit.names(a)
  )


class Bidirectional(Module):
  """Two RNNs over one sequence, the second from the end to the start.

  Args:
    forward_rnn: an `nnx.RNN`, or what is called as one.
    backward_rnn: another one.
    merge_fn: `(forward, backward) -> outputs`, for outputs of the same order in time; by default
      they are concatenated along the features.
    time_major: whether time is the first axis of the input, and not the one before the features.
    return_carry: whether to return the last carries too.
    rngs: streams, of which `carry` is used for the first carries; True for a stream with seed 0,
      False to let each RNN use its own.

  Raises:
    InvalidArgumentError: `rngs` is no stream.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> there, back = (nnx.RNN(nnx.GRUCell(3, 5, rngs=rngs)) for _ in range(2))
  >>> nnx.Bidirectional(there, back)(jnp.ones((2, 10, 3))).shape
  (2, 10, 10)
  """

  def __init__(
    self,
    forward_rnn: Callable[..., Any],
    backward_rnn: Callable[..., Any],
    *,
    merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = _concatenate,
    time_major: bool = False,
    return_carry: bool = False,
    rngs: Rngs | RngStream | bool = True,
  ):
    self.forward_rnn = forward_rnn
    self.backward_rnn = backward_rnn
    self.merge_fn = merge_fn
    self.time_major = time_major
    self.return_carry = return_carry
    self.rngs = _stream("Bidirectional", rngs)

  def __call__(
    self,
    inputs: ArrayLike,
    *,
    initial_carry: tuple[Any, Any] | None = None,
    rngs: Rngs | RngStream | None = None,
    seq_lengths: ArrayLike | None = None,
    return_carry: bool | None = None,
    time_major: bool | None = None,
    reverse: bool | None = None,
    keep_order: bool | None = None,
  ) -> Any:
    """Run both RNNs.

    Args:
      inputs: as in `nnx.RNN`.
      initial_carry: the first carries of both.
      rngs: streams for the first carries; they go before the attribute, if not None.
      seq_lengths: as in `nnx.RNN`.
      return_carry: goes before the attribute, if not None.
      time_major: goes before the attribute, if not None.
      reverse: whether the first goes from the end to the start, and the second the other way.
      keep_order: whether the outputs are then in the order of the input.

    Returns:
      The merged outputs, or a tuple of both last carries and the merged outputs.

    Raises:
      ShapeMismatchError: as in `nnx.RNN`.
    """
    time_major = self.time_major if time_major is None else time_major
    return_carry = self.return_carry if return_carry is None else return_carry
    start = (None, None) if initial_carry is None else initial_carry
    options = {
      "seq_lengths": seq_lengths,
      "time_major": time_major,
      "rngs": self.rngs if rngs is None else rngs,
      "return_carry": True,
      "keep_order": True,
    }
    reverse = bool(reverse)
    carries, outputs = [], []
    for rnn, first, backward in (
      (self.forward_rnn, start[0], reverse),
      (self.backward_rnn, start[1], not reverse),
    ):
      carry, output = rnn(inputs, initial_carry=first, reverse=backward, **options)
      carries.append(carry)
      outputs.append(output)
    merged = jax.tree.map(self.merge_fn, *outputs)
    if reverse and not keep_order:
      x = check.as_input(inputs)
      batch = x.ndim - _feature_axes(self.forward_rnn) - 1
      lengths = None if seq_lengths is None else check.as_input(seq_lengths)
      merged = jax.tree.map(lambda y: flip_sequences(y, lengths, batch, time_major), merged)
    return (tuple(carries), merged) if return_carry else merged


def flip_sequences(
  inputs: ArrayLike, seq_lengths: ArrayLike | None, num_batch_dims: int, time_major: bool
) -> jax.Array:
  """Sequences from the end to the start; padding stays behind them, reversed too.

  Args:
    inputs: `[batch..., time, ...]`, or `[time, batch..., ...]` if `time_major`.
    seq_lengths: `[batch...]`, how many steps of each sequence are no padding; None for all.
    num_batch_dims: how many axes the batch has.
    time_major: whether time is the first axis.

  Returns:
    An array of the shape of `inputs`.

  >>> import jax.numpy as jnp
  >>> flip_sequences(jnp.array([[1, 2, 0], [3, 4, 5]]), jnp.array([2, 3]), 1, False).tolist()
  [[2, 1, 0], [5, 4, 3]]
  """
  x = check.as_input(inputs)
  time = 0 if time_major else num_batch_dims
  if seq_lengths is None:
    return explicit.call_like(lambda x: jnp.flip(x, time), x)
  lengths = _at_most(check.as_input(seq_lengths), x.shape[time])
  flip = lambda x, lengths: _flipped(x, lengths, num_batch_dims, time)
  return explicit.call_like(flip, x, lengths)


def _flipped(x: jax.Array, lengths: jax.Array, batch: int, time: int) -> jax.Array:
  """`flip_sequences` of sequences with these lengths."""
  steps = jnp.expand_dims(jnp.arange(x.shape[time]), tuple(range(1, batch + 1)))
  order = (lengths - 1 - steps) % max(x.shape[time], 1)
  order = jnp.moveaxis(order, 0, time)
  order = order.reshape(order.shape + (1,) * (x.ndim - order.ndim))
  return jnp.take_along_axis(x, order, axis=time)


def _stream(layer: str, rngs: Any) -> RngStream | None:
  """The stream for the first carry, from what a constructor takes as `rngs`."""
  if isinstance(rngs, bool):
    return RngStream(0, tag="carry") if rngs else None
  stream = rngs["carry"] if isinstance(rngs, Rngs) else rngs
  if not isinstance(stream, RngStream):
    raise InvalidArgumentError.value(layer, "rngs", rngs, "nnx.Rngs(carry=0), True or False")
  return stream.fork()


def _time_axis(layer: str, x: jax.Array, features: int, time_major: bool) -> int:
  """The axis of time; raises ShapeMismatchError if there is no room for it."""
  if x.ndim <= features:
    raise ShapeMismatchError(
      f"{layer} works on an axis of time and {features} of features",
      got=f"an input of shape {x.shape}",
      fix="pass an input of shape (..., time, " + "features, " * (features - 1) + "features)",
    )
  return 0 if time_major else x.ndim - features - 1


def _lengths(layer: str, x: jax.Array, lengths: Any, batch: int, time: int) -> jax.Array | None:
  """The lengths of the sequences as an array, none longer than there are steps."""
  if lengths is None:
    return None
  lengths = check.as_input(lengths)
  shape = (x.shape[1:] if time == 0 else x.shape)[:batch]
  if lengths.shape != shape or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ShapeMismatchError(
      f"{layer} needs one length for each sequence",
      got=f"seq_lengths of {describe(lengths)} for a batch of shape {shape}",
      fix=f"pass integers of shape {shape}",
    )
  return _at_most(lengths, x.shape[time])


def _at_most(lengths: jax.Array, steps: int) -> jax.Array:
  """Lengths in a signed dtype that `steps` fits in, none above it."""
  return jnp.minimum(dtypes.wide_integers(lengths), steps).astype(int)


def _settled(cell: RNNCellBase, carry: Any, x: jax.Array, time: int) -> Any:
  """A carry of the types that the cell gives it: those of the first may be others.

  A type is a dtype, in a mesh with explicit axes how an array is split, and in `jax.shard_map`
  along which axes its values differ.
  """
  # A sum is of the type that a step has, also of no steps at all; nothing is computed.
  step = lambda cell, carry, x: cell(carry, x.sum(time, dtype=x.dtype))[0]
  while True:
    new = eval_shape(step, cell, carry, x)
    if jax.tree.structure(new) != jax.tree.structure(carry):
      return carry  # nnx.scan says what is wrong
    carry = jax.tree.map(lambda was, now: check.as_input(was).astype(now.dtype), carry, new)
    differing = jax.tree.map(lambda was, now: _jax.varying(now) - _jax.varying(was), carry, new)
    carry = _split_as(jax.tree.map(_varied, carry, differing), new)
    if not any(jax.tree.leaves(differing)):
      return carry


def _varied(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """`x`, as one whose values differ along these axes of `jax.shard_map`."""
  return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _split_as(new: Any, carry: Any) -> Any:
  """A carry split as another one, if it is one of this kind; else `nnx.scan` says what is wrong."""
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  return jax.tree.map(explicit.put_like, new, carry) if shapes(new) == shapes(carry) else new


def _split_again(y: jax.Array, axis: int, name: Any) -> jax.Array:
  """Outputs with the axis of time split as in the input, where that is possible."""
  wanted = explicit.names(y)
  used = explicit.distinct([*wanted, name])[-1]
  wanted[axis] = used if used == name else None
  return explicit.put(y, lambda: explicit.divisors(wanted, y.shape))


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """`new` for the sequences that are chosen; their axes come first."""

  def select(new: jax.Array, old: jax.Array, chosen: jax.Array) -> jax.Array:
    return jnp.where(chosen.reshape(chosen.shape + (1,) * (new.ndim - chosen.ndim)), new, old)

  return explicit.call_like(select, new, old, chosen)


def _feature_axes(rnn: Any) -> int:
  """How many axes of features an RNN, or what is called as one, works on."""
  if isinstance(rnn, Bidirectional):
    return _feature_axes(rnn.forward_rnn)
  return rnn.cell.num_feature_axes
