"""Initializers of parameters, `(key, shape, dtype) -> array`: those of JAX, each one compiled call.

What they draw is what JAX's draw, bit for bit, also inside a compiled function.

>>> from refax import nnx; import jax
>>> nnx.initializers.he_normal()(jax.random.key(0), (4, 8)).shape
(4, 8)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.nn import initializers as jax_initializers

from refax import _jax
from refax.typing import Initializer

__all__ = [
  "Initializer",
  "constant",
  "delta_orthogonal",
  "glorot_normal",
  "glorot_uniform",
  "he_normal",
  "he_uniform",
  "kaiming_normal",
  "kaiming_uniform",
  "lecun_normal",
  "lecun_uniform",
  "normal",
  "ones",
  "ones_init",
  "orthogonal",
  "truncated_normal",
  "uniform",
  "variance_scaling",
  "xavier_normal",
  "xavier_uniform",
  "zeros",
  "zeros_init",
]

Make = TypeVar("Make", bound=Callable)


def _compiled(init: Make) -> Make:
  """An initializer as one compiled call: five, one by one, take four times as long."""
  static = ("shape", "dtype", "out_sharding")

  @functools.partial(jax.jit, static_argnames=static, inline=True)
  def run(key: Any, shape: Any, dtype: Any, out_sharding: Any) -> jax.Array:
    return _jax.one_by_one(lambda key: init(key, shape, dtype, out_sharding=out_sharding), key)

  own = inspect.signature(init).parameters["dtype"].default  # `normal(dtype=jnp.bfloat16)`

  def compiled(key: Any, shape: Any, dtype: Any = own, out_sharding: Any = None) -> jax.Array:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return run(key, shape=shape, dtype=dtype, out_sharding=out_sharding)

  return functools.update_wrapper(compiled, init)  # pyright: ignore[reportReturnType]


def _factory(make: Make) -> Make:
  """Equal arguments give the same initializer: a shape is compiled once, not once a layer."""
  made = functools.lru_cache(maxsize=256)(lambda *a, **k: _compiled(make(*a, **k)))

  def factory(*args: Any, **kwargs: Any) -> Initializer:
    try:
      return made(*args, **kwargs)
    except TypeError:  # an array cannot be looked up
      return make(*args, **kwargs)

  return functools.update_wrapper(factory, make)  # pyright: ignore[reportReturnType]


ones = _compiled(jax_initializers.ones)
zeros = _compiled(jax_initializers.zeros)
constant = _factory(jax_initializers.constant)
delta_orthogonal = _factory(jax_initializers.delta_orthogonal)
glorot_normal = _factory(jax_initializers.glorot_normal)
glorot_uniform = _factory(jax_initializers.glorot_uniform)
he_normal = _factory(jax_initializers.he_normal)
he_uniform = _factory(jax_initializers.he_uniform)
kaiming_normal = _factory(jax_initializers.kaiming_normal)
kaiming_uniform = _factory(jax_initializers.kaiming_uniform)
lecun_normal = _factory(jax_initializers.lecun_normal)
lecun_uniform = _factory(jax_initializers.lecun_uniform)
normal = _factory(jax_initializers.normal)
orthogonal = _factory(jax_initializers.orthogonal)
truncated_normal = _factory(jax_initializers.truncated_normal)
uniform = _factory(jax_initializers.uniform)
variance_scaling = _factory(jax_initializers.variance_scaling)
xavier_normal = _factory(jax_initializers.xavier_normal)
xavier_uniform = _factory(jax_initializers.xavier_uniform)

default_kernel_init = lecun_normal()
"""Of kernels: keeps the variance of what passes through, whatever the number of inputs."""

default_embed_init = variance_scaling(1.0, "fan_in", "normal", out_axis=0)
"""Of embeddings: a vector has length 1 on average."""


def ones_init() -> Initializer:
  """An initializer to ones: `ones` in the form of the others.

  >>> from refax import nnx
  >>> nnx.initializers.ones_init()(None, (2,)).tolist()
  [1.0, 1.0]
  """
  return ones


def zeros_init() -> Initializer:
  """An initializer to zeros: `zeros` in the form of the others.

  >>> from refax import nnx
  >>> nnx.initializers.zeros_init()(None, (2,)).tolist()
  [0.0, 0.0]
  """
  return zeros
