"""view: an object with other static attributes, on the same Variables."""

import inspect
from typing import Any

from refax.core.filters import Filter, to_predicate
from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.errors import FilterError
from refax.graph.split import clone


def view(
  node: Any, /, *, only: Filter = ..., raise_if_not_found: bool = True, **options: Any
) -> Any:
  """An object on the same Variables whose layers work in another mode; the given one stays.

  A Module takes part by a method `set_view`, whose keyword arguments are the options that it knows:
  `Dropout` has `deterministic`, `BatchNorm` has `use_running_average`, `MultiHeadAttention` has
  `deterministic`, `decode`, `batch_size` and `max_length`.

  Args:
    node: a Module, or any pytree of these.
    only: which Modules.
    raise_if_not_found: whether an option that no Module knows is an error.
    **options: what `set_view` is called with, each Module with the options that it knows.

  Raises:
    FilterError: no Module knows one of the options; nothing has been changed.

  >>> from refax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
  >>> evaluated = nnx.view(model, deterministic=True)
  >>> evaluated.layers[1].deterministic, model.layers[1].deterministic
  (True, False)
  >>> evaluated.layers[0].kernel[0, 0] = 7.0; float(model.layers[0].kernel[0, 0])
  7.0
  """
  new = clone(node, variables=False)
  found: set[str] = set()
  calls = []
  for module in _viewable(new, only):
    known = _options(type(module))
    given = options if known is None else {k: v for k, v in options.items() if k in known}
    found.update(given)
    calls.append((module, given))
  if raise_if_not_found and (missing := sorted(options.keys() - found)):
    raise FilterError.options(missing, type(node).__name__)
  for module, given in calls:
    module.set_view(**given)
  return new


def view_info(node: Any, /, *, only: Filter = ...) -> str:
  """What `nnx.view` can set, by the types of the Modules in an object, with their documentation.

  Args:
    node: a Module, or any pytree of these.
    only: which Modules.

  >>> from refax import nnx
  >>> print(nnx.view_info(nnx.Dropout(0.5)))
  Dropout:
    deterministic: bool | None = None
      whether to pass the input through.
  """
  classes = {type(module) for module in _viewable(node, only)}
  return "\n".join(_shown(cls) for cls in sorted(classes, key=lambda cls: cls.__qualname__))


def with_attributes(
  node: Any, /, *, only: Filter = ..., raise_if_not_found: bool = True, **attributes: Any
) -> Any:
  """An object on the same Variables with other attributes; the given one stays.

  Args:
    node: a Module, or any pytree of these.
    only: which Modules.
    raise_if_not_found: whether an attribute that no Module has is an error.
    **attributes: attributes and their values, for each Module that has them.

  Raises:
    FilterError: no Module has one of the attributes.

  >>> from refax import nnx
  >>> model = nnx.Sequential(nnx.Dropout(0.5), nnx.Dropout(0.1))
  >>> nnx.with_attributes(model, rate=0.2).layers[0].rate, model.layers[0].rate
  (0.2, 0.5)
  """
  new, predicate = clone(node, variables=False), to_predicate(only)
  places = [
    (module, name)
    for path, module in walk_nodes(new)
    if isinstance(module, Module) and predicate(path, module)
    for name in attributes
    if hasattr(module, name)
  ]
  missing = sorted(attributes.keys() - {name for _, name in places})
  if raise_if_not_found and missing:
    raise FilterError.attributes(missing, type(node).__name__)
  for module, name in places:
    setattr(module, name, attributes[name])
  return new


def _viewable(node: Any, only: Filter) -> list[Any]:
  predicate = to_predicate(only)
  return [x for path, x in walk_nodes(node) if hasattr(x, "set_view") and predicate(path, x)]


def _options(cls: Any) -> set[str] | None:
  """The names that a `set_view` takes; None if it takes any."""
  parameters = inspect.signature(cls.set_view).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return None
  return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {
    "self"
  }


def _shown(cls: Any) -> str:
  lines = [f"{cls.__qualname__}:"]
  if inspect.getdoc(cls.set_view) is None:
    return f"{lines[0]}\n  set_view{inspect.signature(cls.set_view)}"
  described = _described(inspect.getdoc(cls.set_view) or "")
  for name, p in list(inspect.signature(cls.set_view).parameters.items())[1:]:
    kind = "" if p.annotation is p.empty else f": {inspect.formatannotation(p.annotation)}"
    default = "" if p.default is p.empty else f" = {p.default!r}"
    lines.append(f"  {name}{kind}{default}")
    lines += [f"    {line}" for line in described.get(name, [])]
  return "\n".join(lines)


def _described(doc: str) -> dict[str, list[str]]:
  """The lines of a docstring's section `Args:`, by name."""
  found: dict[str, list[str]] = {}
  name = ""
  for line in doc.partition("Args:\n")[2].splitlines():
    if not line.startswith("  "):
      break
    if line[2:3] != " ":
      name, _, text = line.strip().partition(":")
      found[name] = [text.strip()] if text.strip() else []
    elif name:
      found[name].append(line.strip())
  return found
