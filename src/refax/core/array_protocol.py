"""What makes a Variable usable wherever an array is: operators, indexing, conversions.

Everything reads the value once and hands it to JAX. In-place operators write the Variable.
"""

import operator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np


def unwrap(x: Any) -> Any:
  """The value of a Variable, anything else as it is."""
  return x.get_value() if isinstance(x, ArrayProtocol) else x


def _left(x: Any) -> Any:
  """A NumPy array as JAX's, so that the result is JAX's and a tracer on the right is welcome."""
  return jnp.asarray(x) if isinstance(x, np.ndarray) else x


class ArrayProtocol:
  """The operators of an array, on `self.get_value()` and `self.set_value(x)`."""

  __slots__ = ()
  __hash__ = None  # pyright: ignore[reportAssignmentType]  # as arrays: `==` is elementwise
  __array_priority__ = 1000  # a NumPy array on the left leaves the operation to us

  def get_value(self, *, index: Any = ...) -> Any:
    raise NotImplementedError

  def set_value(self, value: Any, *, index: Any = ...) -> None:
    raise NotImplementedError

  # conversions
  def __jax_array__(self) -> jax.Array:
    return self.get_value()

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self.get_value(), dtype=dtype)

  def __len__(self) -> int:
    return len(self.get_value())

  def __iter__(self):
    return iter(self.get_value())

  def __contains__(self, item) -> bool:
    return unwrap(item) in self.get_value()

  def __bool__(self) -> bool:
    return bool(self.get_value())

  def __int__(self) -> int:
    return int(self.get_value())

  def __index__(self) -> int:
    return operator.index(self.get_value())

  def __float__(self) -> float:
    return float(self.get_value())

  def __complex__(self) -> complex:
    return complex(self.get_value())

  def __round__(self, ndigits: int = 0):
    return round(self.get_value(), ndigits)

  def __format__(self, spec: str) -> str:
    return format(self.get_value(), spec) if spec else str(self)

  # indexing
  def __getitem__(self, index) -> Any:
    return self.get_value(index=index)

  def __setitem__(self, index, value) -> None:
    self.set_value(value, index=index)

  @property
  def at(self):
    """Indexed updates that return a new array: `v.at[i].add(x)`."""
    return self.get_value().at

  def __call__(self, *args, **kwargs) -> Any:
    return self.get_value()(*args, **kwargs)

  # unary
  def __neg__(self) -> Any:
    return -self.get_value()

  def __pos__(self) -> Any:
    return +self.get_value()

  def __abs__(self) -> Any:
    return abs(self.get_value())

  def __invert__(self) -> Any:
    return ~self.get_value()

  # comparisons, elementwise
  def __eq__(self, other) -> Any:
    return self.get_value() == unwrap(other)

  def __ne__(self, other) -> Any:
    return self.get_value() != unwrap(other)

  def __lt__(self, other) -> Any:
    return self.get_value() < unwrap(other)

  def __le__(self, other) -> Any:
    return self.get_value() <= unwrap(other)

  def __gt__(self, other) -> Any:
    return self.get_value() > unwrap(other)

  def __ge__(self, other) -> Any:
    return self.get_value() >= unwrap(other)

  # binary
  def __add__(self, other) -> Any:
    return self.get_value() + unwrap(other)

  def __sub__(self, other) -> Any:
    return self.get_value() - unwrap(other)

  def __mul__(self, other) -> Any:
    return self.get_value() * unwrap(other)

  def __matmul__(self, other) -> Any:
    return self.get_value() @ unwrap(other)

  def __truediv__(self, other) -> Any:
    return self.get_value() / unwrap(other)

  def __floordiv__(self, other) -> Any:
    return self.get_value() // unwrap(other)

  def __mod__(self, other) -> Any:
    return self.get_value() % unwrap(other)

  def __divmod__(self, other) -> Any:
    return divmod(self.get_value(), unwrap(other))

  def __pow__(self, other) -> Any:
    return self.get_value() ** unwrap(other)

  def __lshift__(self, other) -> Any:
    return self.get_value() << unwrap(other)

  def __rshift__(self, other) -> Any:
    return self.get_value() >> unwrap(other)

  def __and__(self, other) -> Any:
    return self.get_value() & unwrap(other)

  def __xor__(self, other) -> Any:
    return self.get_value() ^ unwrap(other)

  def __or__(self, other) -> Any:
    return self.get_value() | unwrap(other)

  # reflected
  def __radd__(self, other) -> Any:
    return _left(other) + self.get_value()

  def __rsub__(self, other) -> Any:
    return _left(other) - self.get_value()

  def __rmul__(self, other) -> Any:
    return _left(other) * self.get_value()

  def __rmatmul__(self, other) -> Any:
    return _left(other) @ self.get_value()

  def __rtruediv__(self, other) -> Any:
    return _left(other) / self.get_value()

  def __rfloordiv__(self, other) -> Any:
    return _left(other) // self.get_value()

  def __rmod__(self, other) -> Any:
    return _left(other) % self.get_value()

  def __rpow__(self, other) -> Any:
    return _left(other) ** self.get_value()

  def __rlshift__(self, other) -> Any:
    return _left(other) << self.get_value()

  def __rrshift__(self, other) -> Any:
    return _left(other) >> self.get_value()

  def __rand__(self, other) -> Any:
    return _left(other) & self.get_value()

  def __rxor__(self, other) -> Any:
    return _left(other) ^ self.get_value()

  def __ror__(self, other) -> Any:
    return _left(other) | self.get_value()

  def __rdivmod__(self, other) -> Any:
    return divmod(_left(other), self.get_value())

  # in place: they write the Variable
  def __iadd__(self, other) -> Self:
    return self._write(self.get_value() + unwrap(other))

  def __isub__(self, other) -> Self:
    return self._write(self.get_value() - unwrap(other))

  def __imul__(self, other) -> Self:
    return self._write(self.get_value() * unwrap(other))

  def __imatmul__(self, other) -> Self:
    return self._write(self.get_value() @ unwrap(other))

  def __itruediv__(self, other) -> Self:
    return self._write(self.get_value() / unwrap(other))

  def __ifloordiv__(self, other) -> Self:
    return self._write(self.get_value() // unwrap(other))

  def __imod__(self, other) -> Self:
    return self._write(self.get_value() % unwrap(other))

  def __ipow__(self, other) -> Self:
    return self._write(self.get_value() ** unwrap(other))

  def __ilshift__(self, other) -> Self:
    return self._write(self.get_value() << unwrap(other))

  def __irshift__(self, other) -> Self:
    return self._write(self.get_value() >> unwrap(other))

  def __iand__(self, other) -> Self:
    return self._write(self.get_value() & unwrap(other))

  def __ixor__(self, other) -> Self:
    return self._write(self.get_value() ^ unwrap(other))

  def __ior__(self, other) -> Self:
    return self._write(self.get_value() | unwrap(other))

  def _write(self, value: Any) -> Self:
    self.set_value(value)
    return self
