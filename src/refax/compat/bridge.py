"""The bridge to Linen: Linen modules inside of NNX models, and NNX modules inside of Linen's.

`ToLinen` is a Linen module, so Flax must be installed; it is imported when that name is asked for.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from refax.compat import boxes
from refax.compat.scope import current_module
from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.core.pytree import data
from refax.core.variable import Variable
from refax.graph.split import split
from refax.rngs import Rngs

_OWN = "to_nnx__"
_OF_LINEN = """
  NNXMeta ToLinen current_linen_module linen_rngs_dict to_linen to_linen_class
""".split()  # noqa: SIM905


def __getattr__(name: str) -> Any:
  """What is made of classes of Linen's, once it is asked for."""
  if name not in _OF_LINEN:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  try:
    return getattr(importlib.import_module("refax.compat.linen"), name)
  except ImportError as error:
    raise ImportError(
      f"nnx.bridge.{name} works with Linen, which is part of Flax\n  fix: pip install flax"
    ) from error


class ToNNX(Module):
  """A Linen module as an NNX Module: its variables are attributes, by the names they have there.

  They are made by `lazy_init`, as Linen needs an input to know their shapes. Every collection
  becomes a type of Variable: `params` are Params, `batch_stats` BatchStats; another one gets a type
  of its own, see `nnx.register_variable_name`.

  Args:
    module: the Linen module.
    rngs: random streams for it, of which a fork is kept; or a key for `params`.

  >>> from refax.compat import nnx
  >>> from flax import linen; import jax.numpy as jnp
  >>> model = nnx.bridge.ToNNX(linen.Dense(3), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 2)))
  >>> model.kernel.shape, model(jnp.ones((5, 2))).shape
  ((2, 3), (5, 3))
  """

  to_nnx__initializing = False

  def __init__(self, module: Any, rngs: Rngs | jax.Array | None = None):
    if getattr(module, "parent", None) is not None:  # it was made inside of a Linen module's method
      module = module.clone(parent=None)
    self.to_nnx__module = module
    if isinstance(rngs, jax.Array):
      rngs = Rngs(params=rngs)
    elif rngs is not None:
      rngs = rngs.fork()
    self.to_nnx__rngs: Rngs | None = rngs

  def __getattr__(self, name: str) -> Any:
    if name.startswith((_OWN, "__")) or name == "_pytree":
      raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    if name in ("module", "rngs"):
      message = f"ToNNX.{name} is {_OWN}{name}"
      warnings.warn(message, DeprecationWarning, stacklevel=2)
      return getattr(self, _OWN + name)
    method = getattr(type(self.to_nnx__module), name, None)
    if not callable(method):
      raise AttributeError(
        f"neither ToNNX nor {type(self.to_nnx__module).__name__} has {name!r}\n"
        "  fix: if it is a variable of the Linen module, call lazy_init(...) with an input first"
      )
    call: Any = functools.partial(self.__call__, method=method)
    call.__self__ = self
    return call

  def lazy_init(self, *args: Any, **kwargs: Any) -> "ToNNX":
    """`lazy_init` of this Module: make the variables by a call with these arguments."""
    return lazy_init(self, *args, **kwargs)

  def __call__(
    self,
    *args: Any,
    rngs: Rngs | jax.Array | None = None,
    method: Any = None,
    mutable: Any = None,
    **kwargs: Any,
  ) -> Any:
    """Call the Linen module.

    Args:
      *args: its arguments.
      rngs: random streams in place of its own.
      method: the method, or its name; `__call__` by default.
      mutable: the collections that the call may write, as for Linen's `apply`. None means what the
        model around allows, if that is one of Linen, and else nothing.
      **kwargs: its keywords.

    Returns:
      What the method returns; what it wrote is in the Variables.
    """
    module, keys = self.to_nnx__module, _keys(self.to_nnx__rngs if rngs is None else rngs)
    if self.to_nnx__initializing:
      out, updates = module.init_with_output(keys, *args, method=method, **kwargs)
    else:
      mutable = _mutable_around() if mutable is None else mutable
      variables = boxes.nnx_attrs_to_linen_vars(self._variables())
      out = module.apply(variables, *args, rngs=keys, method=method, mutable=mutable, **kwargs)
      out, updates = (out, {}) if mutable is False else out
    self._write(boxes.linen_vars_to_nnx_attrs(updates))
    return out

  def _variables(self) -> dict[str, Any]:
    return {k: v for k, v in vars(self).items() if not k.startswith(_OWN)}

  def _write(self, new: Mapping[str, Any]) -> None:
    """Take Variables: those that exist get the values, others become attributes."""
    here = self._variables()
    known, changed = dict(boxes.flat(here)), {}
    for path, variable in boxes.flat(new):
      old = known.get(path)
      if isinstance(old, Variable) and boxes.kind_of(old) is boxes.kind_of(variable):
        old.set_value(variable.get_value())
      else:
        changed[path] = variable
    for name in {path[0] for path in changed}:
      kept = dict(boxes.flat({name: here[name]})) if name in here else {}
      kept = {p: v for p, v in kept.items() if not any(_hides(p, new) for new in changed)}
      parts = kept | {p: v for p, v in changed.items() if p[0] == name}
      value = boxes.nested(parts)[name]
      setattr(self, name, data(value))


def _hides(old: tuple, new: tuple) -> bool:
  """Whether one path lies below the other, so that both cannot be."""
  n = min(len(old), len(new))
  return len(old) != len(new) and old[:n] == new[:n]


def _keys(rngs: Any) -> dict[str, jax.Array]:
  """A key of each stream; the default one is that for `params` if there is none."""
  if rngs is None:
    return {}
  if not isinstance(rngs, Rngs):
    return {"params": rngs}
  keys = {name: stream() for name, stream in rngs.items()}
  if "params" not in keys and "default" in keys:
    keys["params"] = keys.pop("default")
  return keys


def _mutable_around() -> Any:
  """The collections that may be written in the model around this call, False if there is none."""
  around: Any = current_module()
  if around is None:
    around = importlib.import_module("refax.compat.linen").current_linen_module()
  return False if around is None else around.scope.mutable


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
  """Make the variables of all Linen modules in a model, by one call.

  Args:
    fn: the model, or a method of it.
    *args: what it is called with.
    **kwargs: keywords for it.

  Returns:
    `fn`.

  Raises:
    ValueError: `fn` is neither a Module nor a method of one.

  >>> from refax.compat import nnx
  >>> from flax import linen; import jax.numpy as jnp
  >>> class Net(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.dense = nnx.bridge.ToNNX(linen.Dense(3), rngs)
  ...   def __call__(self, x):
  ...     return self.dense(x)
  >>> nnx.bridge.lazy_init(Net(nnx.Rngs(0)), jnp.ones((1, 2))).dense.bias.shape
  (3,)
  """
  module = fn if isinstance(fn, Module) else getattr(fn, "__self__", None)
  if not isinstance(module, Module):
    raise ValueError(
      f"lazy_init takes a Module or a method of one\n  got: {fn!r}\n  fix: lazy_init(model, x)"
    )
  call: Any = fn
  with Initializing(module):
    call(*args, **kwargs)
  return fn


class Initializing:
  """A context in which the Linen modules of a model make their variables.

  It is written on the objects, as part of their structure, so that a transform inside sees it.
  """

  def __init__(self, module: Any, wanted: Callable[[ToNNX], bool] = lambda _: True):
    found = [x for _, x in walk_nodes(module) if isinstance(x, ToNNX)]
    self._modules = [x for x in found if wanted(x)]

  def __enter__(self) -> None:
    for module in self._modules:
      module.to_nnx__initializing = True

  def __exit__(self, *_: Any) -> None:
    for module in self._modules:
      if "to_nnx__initializing" in vars(module):
        del module.to_nnx__initializing


@dataclasses.dataclass
class Functional:
  """A class of Modules as two functions: `init` makes a State, `apply` calls the Module of one."""

  module_type: Any
  graphdef: Any
  args: tuple
  kwargs: dict[str, Any]

  def init(self, *, rngs: Rngs | None = None) -> Any:
    """The State of a new Module."""
    given = {} if rngs is None else {"rngs": rngs}
    self.graphdef, state = split(self.module_type(*self.args, **self.kwargs, **given))
    return state

  def apply(self, *states: Any) -> Any:
    """The call of the Module with these States: `(result, (graphdef, new state))`."""
    if self.graphdef is None:
      raise ValueError("apply was called before init\n  fix: state = functional.init(rngs=...)")
    return self.graphdef.apply(*states)


def functional(cls: Any) -> Callable[..., Functional]:
  """A class of Modules as a pair of functions, `init` and `apply`.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> dense = nnx.bridge.functional(nnx.Linear)(2, 3)
  >>> state = dense.init(rngs=nnx.Rngs(0))
  >>> dense.apply(state)(jnp.ones((1, 2)))[0].shape
  (1, 3)
  """
  return lambda *args, **kwargs: Functional(cls, None, args, kwargs)
