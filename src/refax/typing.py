"""Names for types that several files share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = Any
"""What `jnp.asarray` takes, and a Variable: numbers, NumPy and JAX arrays."""

Dtype: TypeAlias = Any
Shape: TypeAlias = Sequence[int]
Key: TypeAlias = Any
"""One step of a path: an attribute's name, an index of a list, a key of a dict."""

Path: TypeAlias = tuple[Key, ...]
Initializer: TypeAlias = Callable[..., jax.Array]
PrecisionLike: TypeAlias = Any
Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]


def describe(x: Any) -> str:
  """`float32[2,3]` for an array, the type's name for anything else.

  >>> import jax.numpy as jnp
  >>> describe(jnp.ones((2, 3)))
  'float32[2,3]'
  """
  if isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype"):
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
  return type(x).__name__


def path_str(path: Path) -> str:
  """A path as one writes it in Python, with a leading dot for an attribute.

  >>> path_str(("layers", 0, "kernel"))
  '.layers[0].kernel'
  """
  return "".join(
    f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]" for key in path
  )


_FLOAT32 = jnp.dtype(jnp.float32)


def wide_dtype(dtype: Dtype) -> Dtype:
  """The dtype to compute sums and squares of such numbers in: float32 or better.

  >>> [str(wide_dtype(dtype)) for dtype in (jnp.bfloat16, jnp.uint8, jnp.complex64)]
  ['float32', 'float32', 'complex64']
  """
  # JAX promotes float8 and integers of 4 bits to nothing, so their size decides.
  return jnp.promote_types(dtype, jnp.float32) if jnp.dtype(dtype).itemsize > 2 else _FLOAT32
