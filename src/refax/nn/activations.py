"""Activations: those of `jax.nn`, which also take a Variable.

Each is the function of the same name in `jax.nn`, with its arguments and its derivatives. They are
wrapped because some of those turn a Variable down (`relu` where it is differentiated, `sigmoid`).
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

from refax.core.array_protocol import unwrap

F = TypeVar("F", bound=Callable)

_DOC = """{what}

  As `jax.nn.{name}`, and its arguments may be Variables.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.{name}(nnx.Variable({example})).shape
  {shape}
"""


def _lift(
  fn: F, what: str, *, shape: tuple[int, ...] = (2,), example: str = "jnp.array([0.5, 1.0])"
) -> F:
  """`fn` for Variables too, documented by `what` and an example that gives `shape`."""

  @functools.wraps(fn, updated=())
  def activation(*args, **kwargs):
    return fn(*map(unwrap, args), **kwargs)

  activation.__module__ = __name__  # where pickle finds it
  activation.__doc__ = _DOC.format(what=what, name=fn.__name__, example=example, shape=shape)
  return activation  # pyright: ignore[reportReturnType]


celu = _lift(jax.nn.celu, "`max(x, 0) + alpha * min(exp(x / alpha) - 1, 0)`.")
elu = _lift(jax.nn.elu, "`x` where positive, `alpha * (exp(x) - 1)` elsewhere.")
gelu = _lift(jax.nn.gelu, "`x * P(X <= x)` for a normal X; by default approximated with tanh.")
glu = _lift(jax.nn.glu, "One half of an axis, gated by the sigmoid of the other.", shape=(1,))
hard_sigmoid = _lift(jax.nn.hard_sigmoid, "`relu6(x + 3) / 6`.")
hard_silu = _lift(jax.nn.hard_silu, "`x * hard_sigmoid(x)`.")
hard_swish = hard_silu
hard_tanh = _lift(jax.nn.hard_tanh, "`x`, clipped to [-1, 1].")
identity = _lift(jax.nn.identity, "`x`.")
leaky_relu = _lift(jax.nn.leaky_relu, "`x` where positive, `negative_slope * x` elsewhere.")
log1mexp = _lift(jax.nn.log1mexp, "`log(1 - exp(-x))`, exact also near 0.")
log_sigmoid = _lift(jax.nn.log_sigmoid, "`log(sigmoid(x))`, without overflow.")
log_softmax = _lift(jax.nn.log_softmax, "`log(softmax(x))`, without overflow.")
logmeanexp = _lift(jax.nn.logmeanexp, "`log(mean(exp(x)))`, without overflow.", shape=())
logsumexp = _lift(jax.nn.logsumexp, "`log(sum(exp(x)))`, without overflow.", shape=())
mish = _lift(jax.nn.mish, "`x * tanh(softplus(x))`.")
one_hot = _lift(
  jax.nn.one_hot,
  "A row of zeros for each integer, with a one at its index.",
  example="jnp.array([0, 2])), num_classes=(3",
  shape=(2, 3),
)
relu = _lift(jax.nn.relu, "`max(x, 0)`, with the derivative 0 at 0.")
relu6 = _lift(jax.nn.relu6, "`min(max(x, 0), 6)`.")
selu = _lift(jax.nn.selu, "`elu`, scaled so that a deep network keeps mean 0 and variance 1.")
sigmoid = _lift(jax.nn.sigmoid, "`1 / (1 + exp(-x))`.")
silu = _lift(jax.nn.silu, "`x * sigmoid(x)`.")
swish = silu
soft_sign = _lift(jax.nn.soft_sign, "`x / (1 + |x|)`.")
softmax = _lift(jax.nn.softmax, "`exp(x) / sum(exp(x))` over an axis.")
softplus = _lift(jax.nn.softplus, "`log(1 + exp(x))`, without overflow.")
sparse_plus = _lift(jax.nn.sparse_plus, "0 to -1, `x` from 1, and between them a parabola.")
sparse_sigmoid = _lift(jax.nn.sparse_sigmoid, "`(x + 1) / 2`, clipped to [0, 1].")
squareplus = _lift(jax.nn.squareplus, "`(x + sqrt(x^2 + b)) / 2`.")
standardize = _lift(jax.nn.standardize, "`(x - mean) / sqrt(var + epsilon)` over an axis.")
tanh = _lift(jax.nn.tanh, "The hyperbolic tangent.")
