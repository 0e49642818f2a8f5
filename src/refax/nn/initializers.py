"""Initializers of parameters: `(key, shape, dtype) -> array`, those of `jax.nn.initializers`.

>>> from refax import nnx; import jax
>>> nnx.initializers.he_normal()(jax.random.key(0), (4, 8)).shape
(4, 8)
"""

from jax.nn.initializers import (
  constant,
  delta_orthogonal,
  glorot_normal,
  glorot_uniform,
  he_normal,
  he_uniform,
  kaiming_normal,
  kaiming_uniform,
  lecun_normal,
  lecun_uniform,
  normal,
  ones,
  orthogonal,
  truncated_normal,
  uniform,
  variance_scaling,
  xavier_normal,
  xavier_uniform,
  zeros,
)

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
