"""Activations: those of `jax.nn`, which also take a Variable.

Each is the function of the same name in `jax.nn`, with its arguments and its derivatives. They are
wrapped because some of those turn a Variable down (`relu` where it is differentiated, `sigmoid`),
and because in a small dtype some compute another number: of integers that wrap around (a difference
of unsigned ones, a square), or of a sum in float16, which ends at 65504.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from refax.core.array_protocol import unwrap
from refax.nn import dtypes

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


def _on_array(fn: F, compute: Callable[..., Any]) -> F:
  """`compute(fn, x, *args, **kwargs)` with the first argument of `fn` as an array."""
  signature = inspect.signature(fn)

  @functools.wraps(fn, updated=())
  def activation(*args, **kwargs):
    if not args:  # all by keyword
      bound = signature.bind(**kwargs)
      args, kwargs = bound.args, bound.kwargs
    x, *rest = map(unwrap, args)
    return compute(fn, x if isinstance(x, jax.Array) else jnp.asarray(x), *rest, **kwargs)

  return activation  # pyright: ignore[reportReturnType]


def _floats(fn: F) -> F:
  """`fn` of integers as that of floats, so that nothing wraps around."""

  def compute(fn, x, *args, **kwargs):
    return fn(x.astype(float) if jnp.issubdtype(x.dtype, jnp.integer) else x, *args, **kwargs)

  return _on_array(fn, compute)


def _wide(fn: F, *halves: Any) -> F:
  """`_floats`, and computed in float32 where the input has one of these dtypes.

  Softmax and its like are wide for float16 only: bfloat16 has the range of float32, and what their
  backward pass keeps would be twice as large.
  """

  def compute(fn, x, *args, **kwargs):
    if x.dtype not in halves:
      return fn(x, *args, **kwargs)
    others = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype")]
    dtype = jnp.result_type(x, *others)
    return jax.tree.map(lambda y: y.astype(dtype), fn(dtypes.wide(x), *args, **kwargs))

  return _on_array(_floats(fn), compute)


def _signed(fn: F) -> F:
  """`hard_tanh`, for integers without a -1 too."""

  def compute(fn, x):
    return jnp.minimum(x, 1) if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else fn(x)

  return _on_array(fn, compute)


def _many_classes(fn: F) -> F:
  """`one_hot`, which JAX counts the classes of in the dtype of the labels."""

  def compute(fn, x, *args, **kwargs):
    return fn(dtypes.wide_integers(x), *args, **kwargs)

  return _on_array(fn, compute)


_HALVES = (jnp.float16, jnp.bfloat16)

celu = _lift(jax.nn.celu, "`max(x, 0) + alpha * min(exp(x / alpha) - 1, 0)`.")
elu = _lift(jax.nn.elu, "`x` where positive, `alpha * (exp(x) - 1)` elsewhere.")
gelu = _lift(jax.nn.gelu, "`x * P(X <= x)` for a normal X; by default approximated with tanh.")
glu = _lift(
  _floats(jax.nn.glu), "One half of an axis, gated by the sigmoid of the other.", shape=(1,)
)
hard_sigmoid = _lift(jax.nn.hard_sigmoid, "`relu6(x + 3) / 6`.")
hard_silu = _lift(jax.nn.hard_silu, "`x * hard_sigmoid(x)`.")
hard_swish = hard_silu
hard_tanh = _lift(_signed(jax.nn.hard_tanh), "`x`, clipped to [-1, 1].")
identity = _lift(jax.nn.identity, "`x`.")
leaky_relu = _lift(jax.nn.leaky_relu, "`x` where positive, `negative_slope * x` elsewhere.")
log1mexp = _lift(_floats(jax.nn.log1mexp), "`log(1 - exp(-x))`, exact also near 0.")
log_sigmoid = _lift(_floats(jax.nn.log_sigmoid), "`log(sigmoid(x))`, without overflow.")
log_softmax = _lift(_wide(jax.nn.log_softmax, jnp.float16), "`log(softmax(x))`, without overflow.")
logmeanexp = _lift(
  _wide(jax.nn.logmeanexp, *_HALVES), "`log(mean(exp(x)))`, without overflow.", shape=()
)
logsumexp = _lift(
  _wide(jax.nn.logsumexp, jnp.float16), "`log(sum(exp(x)))`, without overflow.", shape=()
)
mish = _lift(jax.nn.mish, "`x * tanh(softplus(x))`.")
one_hot = _lift(
  _many_classes(jax.nn.one_hot),
  "A row of zeros for each integer, with a one at its index.",
  example="jnp.array([0, 2])), num_classes=(3",
  shape=(2, 3),
)
relu = _lift(jax.nn.relu, "`max(x, 0)`, with the derivative 0 at 0.")
relu6 = _lift(jax.nn.relu6, "`min(max(x, 0), 6)`.")
selu = _lift(jax.nn.selu, "`elu`, scaled so that a deep network keeps mean 0 and variance 1.")
sigmoid = _lift(_floats(jax.nn.sigmoid), "`1 / (1 + exp(-x))`.")
silu = _lift(_floats(jax.nn.silu), "`x * sigmoid(x)`.")
swish = silu
soft_sign = _lift(_floats(jax.nn.soft_sign), "`x / (1 + |x|)`.")
softmax = _lift(_wide(jax.nn.softmax, jnp.float16), "`exp(x) / sum(exp(x))` over an axis.")
softplus = _lift(jax.nn.softplus, "`log(1 + exp(x))`, without overflow.")
sparse_plus = _lift(jax.nn.sparse_plus, "0 to -1, `x` from 1, and between them a parabola.")
sparse_sigmoid = _lift(jax.nn.sparse_sigmoid, "`(x + 1) / 2`, clipped to [0, 1].")
squareplus = _lift(_wide(jax.nn.squareplus, *_HALVES), "`(x + sqrt(x^2 + b)) / 2`.")
standardize = _lift(
  _wide(jax.nn.standardize, *_HALVES), "`(x - mean) / sqrt(var + epsilon)` over an axis."
)
tanh = _lift(jax.nn.tanh, "The hyperbolic tangent.")
