"""nnx.samplers: functions `(logits, key) -> token`, and the filters that they are made of.

A filter is a function of logits that makes unwanted tokens impossible (minus infinity) or all of
them more or less likely. `sample` draws from what the filters leave, in the order in which they are
given; a function of logits that a user writes is a filter as well.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.errors import InvalidArgumentError, MissingRngError
from refax.nn import check

__all__ = ["Sampler", "greedy", "min_p", "sample", "temperature", "top_k", "top_p"]

Filter = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class temperature:
  """A filter that divides logits: below 1, likely tokens become likelier.

  Args:
    value: what to divide by, more than 0.

  Raises:
    InvalidArgumentError: `value` is not more than 0.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.samplers.temperature(0.5)(jnp.array([1.0, 2.0])).tolist()
  [2.0, 4.0]
  """

  value: Any

  def __post_init__(self):
    fix = "a number above 0; the most likely token is what nnx.samplers.greedy gives"
    _check("temperature", self.value, lambda x: x > 0 and x != float("inf"), fix)

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Divide `[..., vocabulary]`."""
    return logits / self.value


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["k"])
@dataclasses.dataclass(frozen=True)
class top_k:
  """A filter that keeps the `k` most likely tokens, and others that are as likely as the last.

  Args:
    k: how many; a model with fewer tokens keeps all.

  Raises:
    InvalidArgumentError: `k` is not a positive int.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.samplers.top_k(2)(jnp.array([1.0, 3.0, 2.0])).tolist()
  [-inf, 3.0, 2.0]
  """

  k: int

  def __post_init__(self):
    check.size("top_k", "k", self.k)

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Filter `[..., vocabulary]`."""
    last = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < last, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class top_p:
  """A filter that keeps the fewest tokens that are together as likely as `p`.

  Source: A. Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751.

  Args:
    p: above 0, and at most 1.

  Raises:
    InvalidArgumentError: `p` is no such number.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> jnp.exp(nnx.samplers.top_p(0.7)(jnp.log(jnp.array([0.1, 0.6, 0.3])))).round(1).tolist()
  [0.0, 0.6000000238418579, 0.30000001192092896]
  """

  p: Any

  def __post_init__(self):
    _check("top_p", self.p, lambda x: 0 < x <= 1, "a number above 0, and at most 1")

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Filter `[..., vocabulary]`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    likely = jax.nn.softmax(ordered.astype(jnp.float32))
    before = jnp.cumsum(likely, axis=-1) - likely  # of all that are likelier
    last = jnp.where(before < self.p, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < last, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class min_p:
  """A filter that keeps tokens at least `p` times as likely as the most likely one.

  Source: M. Nguyen et al., "Turning Up the Heat: Min-p Sampling", arXiv:2407.01082.

  Args:
    p: from 0 to 1.

  Raises:
    InvalidArgumentError: `p` is no such number.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> jnp.exp(nnx.samplers.min_p(0.4)(jnp.log(jnp.array([0.1, 0.6, 0.3])))).round(1).tolist()
  [0.0, 0.6000000238418579, 0.30000001192092896]
  """

  p: Any

  def __post_init__(self):
    _check("min_p", self.p, lambda x: 0 <= x <= 1, "a number from 0 to 1")

  def __call__(self, logits: jax.Array) -> jax.Array:
    """Filter `[..., vocabulary]`."""
    least = logits.max(-1, keepdims=True) + jnp.log(self.p)
    return jnp.where(logits < least, -jnp.inf, logits)


class Sampler:
  """A function from logits and a key to a token, that knows what distribution it draws from.

  Made by `nnx.samplers.sample`. `sampler(logits, key)` draws, `sampler.filtered(logits)` are the
  logits of the distribution: what speculative decoding needs to know.

  Args:
    filters: functions of logits.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> sampler = nnx.samplers.sample(nnx.samplers.top_k(1))
  >>> int(sampler(jnp.array([1.0, 3.0, 2.0]), jax.random.key(0)))
  1
  """

  def __init__(self, filters: tuple[Filter, ...]):
    self.filters = filters

  def filtered(self, logits: jax.Array) -> jax.Array:
    """The logits of the tokens that can be drawn, `[..., vocabulary]`, in float32."""
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    for f in self.filters:
      logits = f(logits)
    return logits

  def __call__(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Draw a token.

    Args:
      logits: `[..., vocabulary]`.
      key: a key of JAX.

    Returns:
      int32 `[...]`.

    Raises:
      MissingRngError: there is no key.
    """
    if key is None:
      raise MissingRngError(
        "a sampler draws with a key",
        got="key=None",
        fix="pass a key, rngs=nnx.Rngs(0) to nnx.generate, or use nnx.samplers.greedy",
      )
    return jax.random.categorical(key, self.filtered(logits)).astype(jnp.int32)

  def __repr__(self) -> str:
    names = [getattr(f, "__name__", None) or repr(f) for f in self.filters]
    return f"sample({', '.join(names)})"


class _Greedy(Sampler):
  """The most likely token."""

  def filtered(self, logits: jax.Array) -> jax.Array:
    logits = jnp.asarray(logits)
    best = jnp.arange(logits.shape[-1]) == logits.argmax(-1, keepdims=True)
    return jnp.where(best, 0.0, -jnp.inf)

  def __call__(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return jnp.asarray(logits).argmax(-1).astype(jnp.int32)

  def __repr__(self) -> str:
    return "greedy"


def _flat(sampler: Sampler) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Numbers of filters are data: another temperature compiles nothing."""
  ours = (temperature, top_k, top_p, min_p)
  children = tuple(f if isinstance(f, ours) else None for f in sampler.filters)
  return children, tuple(None if isinstance(f, ours) else f for f in sampler.filters)


def _unflat(kind: type[Sampler], functions: tuple, children: tuple) -> Sampler:
  return kind(tuple(f or child for f, child in zip(functions, children, strict=True)))


for _kind in (Sampler, _Greedy):
  jax.tree_util.register_pytree_node(_kind, _flat, partial(_unflat, _kind))

greedy = _Greedy(())
"""The most likely token, of equal ones the first: `greedy(logits)`; it needs no key."""


def sample(*filters: Filter) -> Sampler:
  """A sampler that draws from what the filters leave, one applied after the other.

  Args:
    *filters: functions of logits `[vocabulary]`: those of `nnx.samplers`, or any other.

  Raises:
    InvalidArgumentError: a filter is no function.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> s = nnx.samplers
  >>> sampler = s.sample(s.temperature(0.7), s.top_k(50), s.top_p(0.9))
  >>> logits = jnp.array([1.0, 9.0, 2.0])
  >>> int(sampler(logits, jax.random.key(0)))
  1
  """
  for f in filters:
    if not callable(f) or isinstance(f, type):
      want = "functions of logits, such as nnx.samplers.top_k(50)"
      raise InvalidArgumentError.value("sample", "filters", f, want)
  return Sampler(filters)


def penalized(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
  """Logits of which those of `seen` tokens are made smaller (N. Keskar et al., arXiv:1909.05858).

  >>> import jax.numpy as jnp
  >>> penalized(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 2.0).tolist()
  [1.0, -4.0, 2.0]
  """
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _check(name: str, value: Any, good: Callable[[Any], bool], want: str) -> None:
  """Raise InvalidArgumentError for a number that makes no sense; what is traced is not known."""
  if _jax.is_tracer(value) or not isinstance(value, int | float | jax.Array):
    if isinstance(value, str):
      raise InvalidArgumentError.value(name, "value", value, want)
    return
  if isinstance(value, bool) or not good(float(value)):
    raise InvalidArgumentError.value(name, "value", value, want)
