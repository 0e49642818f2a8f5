"""Module: a Pytree that computes something, with what all layers share."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax.core.calls import is_taken, name_calls, perturbed
from refax.core.filters import Filter, to_predicates
from refax.core.flatten import Walk, walk_nodes
from refax.core.habits import Habits
from refax.core.pytree import PLAIN, Pytree
from refax.core.variable import Perturbation, Variable
from refax.core.watch import MISSING, Watch
from refax.errors import FilterError, TreeMismatchError


def _append(old: tuple, new: Any) -> tuple:
  return (*old, new)


def _modules_only(x: Any) -> Any:
  """What decides which Modules there are, and which attributes they have."""
  if type(x) in PLAIN or isinstance(x, Variable | jax.Array | np.ndarray):
    return None
  return x


def _having(
  root: "Module", names: tuple[str, ...], filters: tuple[Filter, ...]
) -> list[tuple["Module", str]]:
  """The Modules below that match a filter, and which of these attributes each of them has."""
  predicates = to_predicates(filters)
  return [
    (module, name)
    for path, module in walk_nodes(root)
    if isinstance(module, Module) and any(p(path, module) for p in predicates)
    for name in names
    if hasattr(module, name)
  ]


class Module(Pytree, Habits):
  """The base of layers and models.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> class MLP(nnx.Module):
  ...   def __init__(self, size, *, rngs):
  ...     self.hidden = nnx.Linear(size, 32, rngs=rngs)
  ...     self.out = nnx.Linear(32, 1, rngs=rngs)
  ...   def __call__(self, x):
  ...     return self.out(nnx.relu(self.hidden(x)))
  >>> MLP(4, rngs=nnx.Rngs(0))(jnp.ones((2, 4))).shape
  (2, 1)
  """

  __slots__ = ()
  _is_module = True

  def __init_subclass__(cls, *, named: bool = True, **kwargs):
    """Args: `named`: whether the methods of the class run in named scopes."""
    super().__init_subclass__(**kwargs)
    if named:
      name_calls(cls)

  def set_attributes(
    self, *filters: Filter, raise_if_not_found: bool = True, **attributes: Any
  ) -> None:
    """Set attributes of this Module and all Modules below that have them.

    Args:
      *filters: only of the Modules that match one of these.
      raise_if_not_found: whether it is an error when no Module has one of the attributes.
      **attributes: the attributes and their new values.

    Raises:
      FilterError: no Module has one of the attributes; nothing has been set.

    >>> from refax import nnx
    >>> model = nnx.Sequential(nnx.Dropout(0.5), nnx.Dropout(0.5))
    >>> model.set_attributes(nnx.Dropout, deterministic=True)
    >>> model.layers[1].deterministic
    True
    """
    names = tuple(attributes)
    found = _having(self, names, filters) if filters else self._having(names)
    if raise_if_not_found:
      missing = attributes.keys() - {name for _, name in found}
      if missing:
        raise FilterError.attributes(sorted(missing), type(self).__name__)
    for module, name in found:
      setattr(module, name, attributes[name])

  def _having(self, names: tuple[str, ...]) -> list[tuple["Module", str]]:
    """The Modules from here on that have one of these attributes; kept, as loops ask each step."""
    kept = self._pytree.having
    if kept is None or kept[0] != names or not kept[1].holds():
      watch = Watch(seen_as=_modules_only)
      Walk(watch).entry(self)
      found = _having(self, names, (...,))
      kept = (names, watch, [(weakref.ref(module), name) for module, name in found])
      self._pytree.having = kept
    return [(module, name) for ref, name in kept[2] if (module := ref()) is not None]

  def train(self, **attributes: Any) -> None:
    """Training mode: `deterministic=False` and `use_running_average=False` in all Modules below.

    Args:
      **attributes: more attributes to set.

    >>> from refax import nnx
    >>> dropout = nnx.Dropout(0.5); dropout.eval(); dropout.train()
    >>> dropout.deterministic
    False
    """
    self._set_mode(False, attributes)

  def eval(self, **attributes: Any) -> None:
    """Evaluation mode: `deterministic=True` and `use_running_average=True` in all Modules below.

    Args:
      **attributes: more attributes to set.

    >>> from refax import nnx
    >>> dropout = nnx.Dropout(0.5); dropout.eval()
    >>> dropout.deterministic
    True
    """
    self._set_mode(True, attributes)

  def _set_mode(self, value: bool, attributes: dict[str, Any]) -> None:
    mode = {"deterministic": value, "use_running_average": value}
    self.set_attributes(**mode | attributes, raise_if_not_found=False)

  def sow(
    self,
    variable_type: type[Variable],
    name: str,
    value: Any,
    reduce_fn: Callable[[Any, Any], Any] = _append,
    init_fn: Callable[[], Any] = tuple,
  ) -> bool:
    """Keep a value from inside a model in the attribute `name`; read it with `nnx.pop`.

    The Variable is lojax, so gradients flow through what is kept. It is an attribute like any
    other: inside a plain `jax.jit` it is local to the call, `nnx.jit` and `nnx.grad` hand it out.

    Args:
      variable_type: the type of the Variable, mostly `nnx.Intermediate`.
      name: the attribute.
      value: an array or a pytree of arrays.
      reduce_fn: `(kept, value) -> kept`; by default a tuple of all values is kept.
      init_fn: what is kept before the first value.

    Returns:
      True.

    Raises:
      TreeMismatchError: the attribute exists and is not such a Variable.

    >>> from refax import nnx
    >>> class Net(nnx.Module):
    ...   def __call__(self, x):
    ...     self.sow(nnx.Intermediate, "squares", x * x)
    ...     return x
    >>> net = Net(); _ = net(3.0)
    >>> float(nnx.pop(net, nnx.Intermediate)["squares"][0])
    9.0
    """
    if is_taken(self, variable_type, name, value):
      return True
    old = getattr(self, name, None)
    if old is not None and not isinstance(old, variable_type):
      raise TreeMismatchError.sow(type(self).__name__, name, variable_type, old)
    kept = init_fn() if old is None else old.get_value()
    setattr(self, name, variable_type(reduce_fn(kept, value), is_hijax=False))
    return True

  def perturb(self, name: str, value: Any, variable_type: type[Variable] = Perturbation) -> Any:
    """Add a Variable of zeros to a value: its gradient is that of the value.

    Args:
      name: the attribute that holds the Variable; it is made at the first call.
      value: an array or a pytree of arrays.
      variable_type: the type of the Variable.

    Returns:
      `value` plus the Variable.

    Raises:
      TreeMismatchError: the attribute exists and is not such a Variable.

    >>> from refax import nnx; import jax.numpy as jnp
    >>> class Net(nnx.Module):
    ...   def __call__(self, x):
    ...     return 3 * self.perturb("dx", x)
    >>> net = Net(); _ = net(jnp.array(2.0))
    >>> float(nnx.grad(lambda net: net(jnp.array(2.0)), wrt=nnx.Perturbation)(net).dx)
    3.0
    """
    taken = perturbed(self, variable_type, name, value)
    if taken is not MISSING:
      return taken
    old = getattr(self, name, None)
    if old is None:
      setattr(self, name, variable_type(jax.tree.map(jnp.zeros_like, value)))
      old = getattr(self, name)
    elif not isinstance(old, variable_type):
      raise TreeMismatchError.sow(type(self).__name__, name, variable_type, old)
    return jax.tree.map(jnp.add, old.get_value(), value)
