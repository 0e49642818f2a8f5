"""Which name of Flax NNX is what of Refax, and in which of its modules it stands."""

import functools
import sys
import types
from typing import Any

import jax

from refax import nnx as clean
from refax import typing
from refax.compat import (
  autodiff,
  boxes,
  bridge,
  capture,
  compact,
  contexts,
  display,
  flags,
  interop,
  mapping,
  numbers,
  objects,
  rngs,
  scope,
  sharding,
  signature,
  states,
  training,
  traversals,
  variables,
)
from refax.core import filters
from refax.nn import dtypes
from refax.transforms import layout

# Functions whose switches for graph and tree mode are dropped.
_SWITCHED = """
  checkify clone cond eval_shape fori_loop graphdef iter_children
  iter_graph iter_modules jit make_jaxpr map pop prefix recursive_map remat scan
  switch update variables view view_info vmap while_loop
  with_attributes as_abstract
""".split()  # noqa: SIM905 - words in lines are read faster

_ADAPTORS = (
  autodiff,
  capture,
  contexts,
  display,
  flags,
  mapping,
  objects,
  rngs,
  sharding,
  states,
  training,
  variables,
)

_DROPPED = {
  "jit": ("device", "backend", "abstracted_axes"),
  "scan": ("_split_transpose",),
  "map": ("recreate_variables",),
}


def names() -> dict[str, Any]:
  """Every public name of Flax NNX 0.12 that is no module."""
  found = {name: getattr(clean, name) for name in clean.__all__}
  for name in _SWITCHED:
    found[name] = flags.without_flags(found[name], *_DROPPED.get(name, ()))
  found["vmap"] = numbers.with_numbers(found["vmap"])
  for name in ("vmap", "scan"):
    found[name] = signature.with_positions(found[name])
  for module in _ADAPTORS:
    own = {
      k: v
      for k, v in vars(module).items()
      if not k.startswith("_") and getattr(v, "__module__", None) == module.__name__
    }
    found |= own
  found |= {
    "A": objects.A,
    "M": objects.M,
    "Initializer": clean.initializers.Initializer,
    "PureState": tuple,
    "VariableState": clean.Variable,
    "abstract_with_sharding": found["as_abstract"],
    "jit_partial": _jit_partial,
    "pure": clean.pure,
    "shard_map": flags.without_flags(_shard_map, "axis_names"),
    "vars_as": states.with_vars,
  }
  for name in (
    "without_flags",
    "extend",
    "accept",
    "transplant",
    "differentiable",
    "is_tree_mode",
  ):
    found.pop(name, None)
  return found


def _jit_partial(f: Any, *cached: Any, **options: Any) -> Any:
  """`functools.partial` of `nnx.jit(f)`, which knows a call that it has seen at once.

  >>> from refax.compat import nnx
  >>> nnx.jit_partial(lambda a, b: a[...] * b, nnx.Param(2.0))(3.0)
  Array(6., dtype=float32...)
  """
  for name in (*flags.FLAGS, "device", "backend"):
    options.pop(name, None)
  call: Any = clean.jit(f, **options)
  new: Any = functools.partial(call, *cached)
  new.lower = functools.partial(call.lower, *cached)
  return new


def _shard_map(f: Any = None, **options: Any) -> Any:
  """`nnx.shard_map`; the state of arguments is put on the mesh, as in Flax."""
  if f is None:
    return functools.partial(_shard_map, **options)
  mesh, specs = options["mesh"], options["in_specs"]
  call = functools.wraps(f)(clean.shard_map(f, **options))

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    with jax.set_mesh(mesh):
      placed = layout.laid_out(lambda *args: args, specs, (frozenset(), frozenset()))
      args = placed(*signature.positional(f, args, kwargs))
    return call(*args)

  return wrapper


# The modules of Flax NNX; each has all names, for code asks for a name where Flax had it once.
MODULES = """
  bridge bridge.module bridge.variables bridge.wrappers bridge.interop compat extract filterlib
  graph graphlib helpers module nn nn.activations nn.attention nn.dtypes nn.initializers nn.linear
  nn.lora nn.normalization nn.recurrent nn.stochastic object optimizer pytreelib reprlib rnglib spmd
  statelib summary tracers training training.ema training.metrics training.optimizer transforms
  transforms.autodiff transforms.compilation transforms.general transforms.iteration
  transforms.transforms traversals variablelib variables visualization wrappers deprecations
  proxy_caller
""".split()  # noqa: SIM905

_BRIDGE = {
  k: v
  for part in (boxes, bridge, scope, compact, interop)
  for k, v in vars(part).items()
  if k == "__getattr__" or (getattr(v, "__module__", None) == part.__name__ and k[0] != "_")
}
_OF_WRAPPERS = {k: v for k, v in _BRIDGE.items() if k != "Module"}

_INITIALIZERS = {
  "default_kernel_init": clean.initializers.lecun_normal(),
  "default_bias_init": clean.initializers.zeros_init(),
  "default_embed_init": clean.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
}

_ONLY_THERE = {
  "bridge": _BRIDGE,
  "bridge.interop": _BRIDGE,
  "bridge.module": _BRIDGE,
  "bridge.variables": _OF_WRAPPERS,
  "bridge.wrappers": _OF_WRAPPERS,
  "wrappers": _OF_WRAPPERS,
  "filterlib": {
    "to_predicate": filters.to_predicate,
    "filters_to_predicates": filters.to_predicates,
  },
  "nn.dtypes": {n: v for n, v in vars(dtypes).items() if not n.startswith("_")},
  "nn.linear": _INITIALIZERS,
  "traversals": {
    name: getattr(traversals, name)
    for name in ("empty_node", "flatten_mapping", "flatten_to_sequence", "unflatten_mapping")
  },
  "nn.recurrent": _INITIALIZERS,
  "nn.attention": _INITIALIZERS,
}

# Types that code asks all modules for; public in `flax.typing`.
_TYPES = {
  "Array": jax.Array,
  "Axis": int | None,
  "Dtype": typing.Dtype,
  "Key": typing.Key,
  "PathParts": typing.Path,
  "Shape": tuple[int, ...],
}


def fill(namespace: dict[str, Any], package: str) -> None:
  """Give a package all names, and its modules.

  Args:
    namespace: the globals of the package.
    package: its name, under which the modules are found by `import`.
  """
  found = names()
  namespace.update(found)
  modules = {name: types.ModuleType(f"{package}.{name}") for name in MODULES}
  modules["nn.initializers"] = clean.initializers
  modules["training.metrics"] = clean.metrics
  for name, module in modules.items():
    sys.modules[f"{package}.{name}"] = module
    parent, _, last = name.rpartition(".")
    if parent:
      setattr(modules[parent], last, module)
    elif last not in found:  # `nnx.variables` is a function
      namespace[last] = module
    if module.__name__.startswith(package):
      module.__doc__ = f"The names of `flax.nnx.{name}`."
      module.__path__ = []
      for key, value in (found | _TYPES | _ONLY_THERE.get(name, {})).items():
        vars(module).setdefault(key, value)
