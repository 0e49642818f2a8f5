"""ToLinen: a class of NNX Modules as a Linen module. Importing this file imports Flax."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import core, linen
from flax.core import FrozenDict

from refax import config
from refax.compat import boxes
from refax.compat.bridge import Initializing
from refax.compat.meta_box import NNXMeta as NNXMeta
from refax.core.filters import Not
from refax.core.module import Module
from refax.core.variable import Variable
from refax.graph.split import state as state_of
from refax.graph.split import update
from refax.graph.state import to_flat_state
from refax.rngs import Rngs, RngState

_ARRAYS = "arrays"  # the collection of arrays that are attributes without being Variables


def current_linen_module() -> Any:
  """The Linen module whose method runs now, or None."""
  stack = linen.module._context.module_stack
  return stack[-1] if stack else None


class ToLinen(linen.Module):
  """A class of NNX Modules as a Linen module.

  Its Variables are in collections that their types name: Params in `params`, BatchStats in
  `batch_stats`. The Module is made anew for every call and gets the values of the collections; what
  the call writes goes back into the collections that are mutable. Its random streams are those of
  Linen.

  Attributes:
    nnx_class: the class.
    args: the arguments that it is made with.
    kwargs: the keywords that it is made with.
    skip_rng: whether the class takes no `rngs`.
    metadata_fn: from a Variable to what Linen keeps; None keeps values without boxes.

  >>> from refax.compat import nnx; import jax, jax.numpy as jnp
  >>> model = nnx.bridge.ToLinen(nnx.Linear, args=(2, 3))
  >>> y, variables = model.init_with_output(jax.random.key(0), jnp.ones((1, 2)))
  >>> y.shape, variables["params"]["kernel"].shape
  ((1, 3), (2, 3))
  """

  nnx_class: Callable[..., Module]
  args: Sequence[Any] = ()
  kwargs: Mapping[str, Any] = FrozenDict({})
  skip_rng: bool = False
  metadata_fn: Callable[[Variable], Any] | None = boxes.to_linen_var

  @linen.compact
  def __call__(self, *args: Any, nnx_method: Any = None, **kwargs: Any) -> Any:
    # The Module lives for this call only, and Linen keeps its values: Refs would gain nothing.
    with config.use_hijax(False):
      kwargs_of_class = dict(self.kwargs)
      if not self.skip_rng:
        # `apply` replaces the values, so that its streams need not be those of `init`
        keys = linen_rngs_dict(self, add_default=not self.is_initializing())
        kwargs_of_class["rngs"] = Rngs(keys)
      module = self.nnx_class(*self.args, **kwargs_of_class)
      method = _method(module, nnx_method)
      if not self.is_initializing():
        self._read(module)
        out = method(module, *args, **kwargs)
        self._write(module)
        return out
      self._write(module)  # the call may change what `init` is to return
      with Initializing(module, lambda x: not x._variables()):
        out = method(module, *args, **kwargs)
      self._write(module, only_new=True)
      return out

  def __getattr__(self, name: str) -> Any:
    given = vars(self)
    if name in given.get("kwargs", ()):
      return given["kwargs"][name]
    method = getattr(given.get("nnx_class"), name, None) if name[:2] != "__" else None
    if not callable(method):
      return super().__getattr__(name)
    call: Any = functools.partial(self.__call__, nnx_method=method)
    call.__self__ = self
    return call

  def _read(self, module: Any) -> None:
    """Give a new Module the values of the collections."""
    known = {path for path, _ in to_flat_state(state_of(module))}
    values: dict[tuple, Any] = {}
    for collection, tree in core.unfreeze(dict(self.variables)).items():
      for path, x in boxes.flat(tree):
        is_new = path not in known and collection != _ARRAYS
        values[path] = boxes.to_nnx_var(collection, x) if is_new else boxes.unboxed(x)
    unknown = ["/".join(map(str, path)) for path in values if path not in known]
    if unknown:
      warnings.warn(
        f"the variables have paths that {type(module).__name__} has not: {', '.join(unknown)}",
        stacklevel=2,
      )
    update(module, boxes.nested(values))

  def _write(self, module: Any, *, only_new: bool = False) -> None:
    """Put the values of a Module into the collections that are mutable."""
    found: dict[str, dict[tuple, Any]] = {}
    for path, x in to_flat_state(state_of(module, Not(RngState))):
      collection = _ARRAYS
      if isinstance(x, Variable):
        collection = boxes.collection_of(x, allow_register=True)
        x = x.get_value() if self.metadata_fn is None else self.metadata_fn(x)
      found.setdefault(collection, {})[path] = x
    for collection, values in found.items():
      if self.is_mutable_collection(collection):
        for name, value in boxes.nested(values).items():
          if not only_new or not self.has_variable(collection, name):
            self.put_variable(collection, name, value)


def linen_rngs_dict(linen_module: Any, add_default: bool = False) -> dict[str, Any]:
  """A key of each of Linen's streams for the Linen module that runs.

  Args:
    linen_module: the module.
    add_default: whether there is to be a stream `default` in any case.
  """
  keys: dict[str, Any] = {name: linen_module.make_rng(name) for name in linen_module.scope.rngs}
  return {"default": 0} | keys if add_default else keys


def _method(module: Any, method: Any) -> Callable[..., Any]:
  found = getattr(type(module), method or "__call__") if not callable(method) else method
  if not callable(found):
    raise TypeError(f"{type(module).__name__}.{method} is no method\n  got: {found!r}")
  return found


def to_linen(
  nnx_class: Callable[..., Module],
  *args: Any,
  metadata_fn: Callable[[Variable], Any] | None = boxes.to_linen_var,
  name: str | None = None,
  skip_rng: bool = False,
  abstract_init: bool = True,
  **kwargs: Any,
) -> ToLinen:
  """`ToLinen` with the arguments of the class in their places.

  Args:
    nnx_class: a class of NNX Modules.
    *args: the arguments that it is made with.
    metadata_fn: from a Variable to what Linen keeps.
    name: the name of the Linen module.
    skip_rng: whether the class takes no `rngs`.
    abstract_init: taken for Flax's sake.
    **kwargs: the keywords that the class is made with.

  >>> from refax.compat import nnx; import jax, jax.numpy as jnp
  >>> model = nnx.bridge.to_linen(nnx.Linear, 2, out_features=3)
  >>> model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]["bias"].shape
  (3,)
  """
  frozen = FrozenDict(kwargs)
  return ToLinen(nnx_class, args, frozen, skip_rng, metadata_fn, name=name)


def to_linen_class(
  base_nnx_class: Any,
  base_metadata_fn: Callable[[Variable], Any] | None = boxes.to_linen_var,
  base_skip_rng: bool = False,
  **partial_kwargs: Any,
) -> type[ToLinen]:
  """A class of Linen modules for a class of NNX Modules; its keywords are those of the latter.

  Args:
    base_nnx_class: the class of NNX Modules.
    base_metadata_fn: from a Variable to what Linen keeps.
    base_skip_rng: whether the class takes no `rngs`.
    **partial_kwargs: keywords for the class, which those of an instance replace.

  >>> from refax.compat import nnx; import jax, jax.numpy as jnp
  >>> Dense = nnx.bridge.wrappers.to_linen_class(nnx.Linear, use_bias=False)
  >>> model = Dense(in_features=2, out_features=3)
  >>> list(model.init(jax.random.key(0), jnp.ones((1, 2)))["params"])
  ['kernel']
  """

  def __init__(
    self: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    nnx_class: Any = None,
    skip_rng: bool | None = None,
    metadata_fn: Any = None,
    **others: Any,
  ) -> None:
    of_linen = {k: others.pop(k) for k in ("name", "parent") if k in others}
    ToLinen.__init__(
      self,
      nnx_class=nnx_class or base_nnx_class,
      args=args or (),
      kwargs=FrozenDict({**partial_kwargs, **(kwargs or {}), **others}),
      skip_rng=skip_rng or base_skip_rng,
      metadata_fn=metadata_fn or base_metadata_fn,
      **of_linen,
    )

  class ToLinenPartial(ToLinen):
    def __init_subclass__(cls, **options: Any):
      super().__init_subclass__(**options)
      cls.__init__ = construct

  construct: Any = __init__
  ToLinenPartial.__init__ = construct
  ToLinenPartial.__name__ = ToLinenPartial.__qualname__ = f"ToLinen{base_nnx_class.__name__}"
  return ToLinenPartial
