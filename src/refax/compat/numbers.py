"""nnx.vmap as Flax has it: inside, a value that depends on nothing mapped is a number.

Refax traces the function first, to see what it writes, and so `float(jnp.ones(()))` would be a
tracer there. Under `jax.vmap` it is 1.0, and constructors that are mapped count on that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from refax import _jax, config


def with_numbers(transform: Callable[..., Any]) -> Callable[..., Any]:
  """A mapping transform whose functions see numbers where nothing is mapped.

  Only in lojax mode: a Ref that is made of a constant must be one of each element.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> nnx.vmap(lambda x: x * float(jnp.ones(())))(jnp.arange(3.0)).tolist()
  [0.0, 1.0, 2.0]
  """

  @functools.wraps(transform)
  def wrapper(f: Any = None, /, **options: Any) -> Any:
    if f is None:
      return functools.partial(wrapper, **options)

    @functools.wraps(f)
    def evaluated(*args: Any, **kwargs: Any) -> Any:
      with jax.ensure_compile_time_eval():
        return f(*args, **kwargs)

    traced, eager = transform(f, **options), transform(evaluated, **options)

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
      is_eager = _jax.no_trace_active() and not config.using_hijax()
      return (eager if is_eager else traced)(*args, **kwargs)

    return call

  return wrapper
