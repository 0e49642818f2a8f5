"""EMA: a moving average of the values of a model, for evaluation."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from refax.core.array_protocol import unwrap
from refax.core.filters import Filter, to_predicate
from refax.core.gather import as_kept
from refax.core.pytree import Pytree
from refax.core.variable import Variable
from refax.core.write import write
from refax.errors import InvalidArgumentError, TreeMismatchError
from refax.graph.split import merge, split, variables
from refax.graph.state import State, from_flat_state, to_flat_state
from refax.nn import dtypes
from refax.train.placement import beside, sharding_of
from refax.typing import Path, describe, path_str

A = TypeVar("A")


class EMAState(Variable):
  """An average that `nnx.EMA` keeps. Detached: what is written to it carries no gradient.

  >>> from refax import nnx
  >>> ema = nnx.EMA(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), decay=0.9)
  >>> isinstance(ema.params["kernel"], nnx.EMAState)
  True
  """

  detached = True


class EMA(Pytree):
  """An exponential moving average of the Variables of a model.

  `update` moves each average towards the model's value x, by `average += (1 - decay) * (x -
  average)`. It starts from the values that the model had when the EMA was built. With `debias` it
  forgets these: as in "Adam: A Method for Stochastic Optimization", Kingma and Ba 2014,
  arXiv:1412.6980, section 3, the average after t updates is the sum of
  `(1 - decay) * decay^(t - i) * x_i` over them, divided by `1 - decay^t`.

  Integers and keys are not averaged. Averages are float32 where the model has bfloat16 or float16,
  for small steps would be lost in these.

  Args:
    params: the model.
    decay: how much of the average each update keeps, from 0 to 1.
    only: which Variables of the model to average.
    debias: whether the average is over the updates only, without the values at the start.

  Attributes:
    params: the averages, a State of `nnx.EMAState`.
    step: how many updates there were, uint32; None without `debias`.

  Raises:
    InvalidArgumentError: `decay` is not a number from 0 to 1, or `params` is a single Variable.

  >>> from refax import nnx; import jax
  >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  >>> ema = nnx.EMA(model, decay=0.75, only=nnx.Param)
  >>> @jax.jit
  ... def step(model, ema):
  ...   model.bias[...] += 1.0
  ...   ema.update(model)
  >>> step(model, ema)
  >>> with ema.applied(model):
  ...   print(model.bias[...].tolist())
  [0.25]
  >>> model.bias[...].tolist()
  [1.0]
  """

  def __init__(self, params: Any, decay: float, *, only: Filter = ..., debias: bool = False):
    if not isinstance(decay, Real) or not 0 <= decay <= 1:
      raise InvalidArgumentError.value("EMA", "decay", decay, "a number from 0 to 1")
    self.decay = float(decay)
    self.filter = tuple(only) if isinstance(only, list) else only
    self.params = from_flat_state((p, _average(v)) for p, v in _averaged(params, self.filter))
    count = beside(jnp.zeros((), jnp.uint32), sharding_of(self.params))
    self.step = EMAState(count) if debias else None

  def update(self, updates: Any) -> None:
    """Move the averages towards the values of a model, in place.

    Args:
      updates: the model, or a State or nested dicts of its Variables or arrays.

    Raises:
      TreeMismatchError: it does not have the structure of the averages; nothing has been written.
    """
    flat = dict(to_flat_state(self.params))
    values = self._matched(_averaged(updates, self.filter))
    steps, rate = [], 1.0 - self.decay
    if self.step is not None:
      step = self.step[...] + 1
      steps, rate = [(self.step, step)], self._debiased_rate(step)
    with as_kept():
      new = [self._moved(flat[path], unwrap(x), rate) for path, x in values.items()]
    write(*zip((flat[path] for path in values), new, strict=True), *steps)

  def _moved(self, average: Variable, x: Any, rate: Any) -> jax.Array:
    # Not decay * average + (1 - decay) * x: rounded to float32 the weights of a decay of 0.9999
    # do not add up to 1, and a value that stays the same would be off by 1.7e-4.
    old, x = average[...], jnp.asarray(x).astype(average.dtype)
    new = old + jnp.asarray(rate, old.real.dtype) * (x - old)
    return new if self.step is None else jnp.where(self.step[...] == 0, x, new)

  def _debiased_rate(self, step: jax.Array) -> jax.Array:
    """How much of the new value is in the average: `(1 - decay) / (1 - decay^step)`."""
    t = step.astype(jnp.float32)
    if self.decay in (0.0, 1.0):
      return 1.0 / t if self.decay else jnp.ones_like(t)
    return (1.0 - self.decay) / -jnp.expm1(t * math.log(self.decay))

  def apply_to(self, model: A) -> A:
    """A new model with the averages as its values; it shares them, so that it follows `update`.

    Args:
      model: a model of the structure of the one that was averaged; it stays as it is.

    Returns:
      A model whose averaged Variables share their cells with `params`, in their dtype, and whose
      others share theirs with `model`. Lojax Variables are copies.

    Raises:
      TreeMismatchError: `model` does not have the structure of the averages.
    """
    averages = dict(to_flat_state(self.params))
    self._matched(_averaged(model, self.filter))
    graphdef, state = split(model)
    return merge(
      graphdef, state.map(lambda path, v: _view(v, averages[path]) if path in averages else v)
    )

  def copy_to(self, model: Any) -> None:
    """Write the averages into a model for good, in its dtypes.

    Args:
      model: a model of the structure of the one that was averaged.

    Raises:
      TreeMismatchError: it does not have this structure; nothing has been written.
    """
    averages = dict(to_flat_state(self.params))
    targets = self._matched(_averaged(model, self.filter))
    write(*((v, averages[path][...].astype(v.dtype)) for path, v in targets.items()))

  @contextlib.contextmanager
  def applied(self, model: Any) -> Iterator[None]:
    """A block in which a model has the averages as its values.

    At the end, also of one that raises, the averaged Variables have the values from before again.

    Args:
      model: a model of the structure of the one that was averaged.

    Raises:
      TreeMismatchError: it does not have this structure; nothing has been written.
    """
    targets = self._matched(_averaged(model, self.filter)).values()
    saved = [(v, v.get_value()) for v in targets]
    self.copy_to(model)
    try:
      yield
    finally:
      write(*saved)

  def _matched(self, found: list[tuple[Path, Any]]) -> dict[Path, Any]:
    """What was found by path, if it is what there are averages of; raises TreeMismatchError."""
    by_path = dict(found)
    for path, average in to_flat_state(self.params):
      if path not in by_path:
        raise TreeMismatchError.averages(path_str(path), f"nothing for {describe(average)}")
      if jnp.shape(by_path[path]) != average.shape:
        got = f"{describe(by_path[path])} for the average {describe(average)}"
        raise TreeMismatchError.averages(path_str(path), got)
    averages = dict(to_flat_state(self.params))
    for path, x in found:
      if path not in averages:
        raise TreeMismatchError.averages(path_str(path), f"{describe(x)}, which has no average")
    return by_path


def _averaged(model: Any, only: Filter) -> list[tuple[Path, Any]]:
  """What of a model is averaged: floating-point Variables, or arrays if it is a State."""
  selected = to_predicate(only)
  plain = isinstance(model, State | Mapping)
  found = model if plain else variables(model, only)
  if isinstance(found, Variable):
    raise InvalidArgumentError.value("EMA", "params", model, "a Module, or a dict of Variables")
  return [
    (path, x)
    for path, x in to_flat_state(found)
    if (not isinstance(x, Variable) or not plain or selected(path, x)) and _is_inexact(x)
  ]


def _is_inexact(x: Any) -> bool:
  x = x.get_raw_value() if isinstance(x, Variable) else x
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _average(x: Any) -> EMAState:
  value = dtypes.wide(jnp.asarray(unwrap(x)))
  if not isinstance(x, Variable):
    return EMAState(value)
  return EMAState(value, is_hijax=x.is_hijax, **x.get_metadata())


def _view(v: Variable, average: Variable) -> Variable:
  """A Variable of the type of `v` on the cell of its average."""
  return v._handle(average.get_raw_value(), v._def.elsewhere())
