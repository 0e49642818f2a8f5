"""nnx.tabulate: what a model is, as a table. `nnx.display` is that of the clean namespace."""

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.core.variable import Variable
from refax.graph.split import clone, state
from refax.graph.state import to_flat_state
from refax.transforms.abstract import eval_shape


class _Row(NamedTuple):
  path: tuple
  type: str
  inputs: str
  outputs: str


def tabulate(
  obj: Any,
  *args: Any,
  depth: int | None = None,
  method: str = "__call__",
  console_kwargs: dict[str, Any] | None = None,
  graph: Any = None,
  **kwargs: Any,
) -> str:
  """A table of the Modules of a model: their inputs and outputs, and their Variables by type.

  Nothing is computed: the model is called on types. The table is drawn by rich.

  Args:
    obj: the model.
    *args: what it is called with: arrays or `jax.ShapeDtypeStruct`s.
    depth: how many levels of Modules; all by default.
    method: the name of the method that is called.
    console_kwargs: options of `rich.console.Console`.
    graph: taken for Flax's sake.
    **kwargs: more arguments of the call.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> "kernel" in nnx.tabulate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))
  True
  """
  import rich.console
  import rich.table

  for name in ("row_filter", "table_kwargs", "column_kwargs", "variable_filter"):
    kwargs.pop(name, None)
  rows = _rows(obj, method, args, kwargs)
  types = sorted({type(v).__name__ for _, v in _variables(obj)})
  table = rich.table.Table(title=f"{type(obj).__name__} Summary", show_lines=True)
  for name in ("path", "type", "inputs", "outputs", *types):
    table.add_column(name)
  for row in rows:
    if depth is None or len(row.path) <= depth:
      cells = _variable_cells(dict(walk_nodes(obj)).get(row.path), types, row.path, depth)
      table.add_row("/".join(map(str, row.path)), row.type, row.inputs, row.outputs, *cells)
  totals = [_size([v for _, v in _variables(obj) if type(v).__name__ == t]) for t in types]
  table.add_section()
  table.add_row("Total", "", "", "", *totals)
  buffer = io.StringIO()
  options = {"width": 120, "force_terminal": False} | (console_kwargs or {})
  rich.console.Console(file=buffer, **options).print(table)
  return buffer.getvalue()


def _rows(obj: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> list[_Row]:
  """A row for each call of a Module, in the order of the calls."""
  model, rows = clone(obj), []
  paths = {id(node): path for path, node in walk_nodes(model)}

  def call(*args: Any, **kwargs: Any) -> Any:
    inner = clone(model)
    known = {id(node): path for path, node in walk_nodes(inner)}
    with _recorded(inner, known, rows, method):
      return getattr(inner, method)(*args, **kwargs)

  eval_shape(call, *args, **kwargs)
  rows.sort(key=lambda row: row.path)
  return rows or [_Row(path, type(obj).__name__, "", "") for path in paths.values()]


@contextmanager
def _recorded(model: Any, paths: dict[int, tuple], rows: list[_Row], method: str) -> Iterator[None]:
  """While the block runs, each call of a Module of the model makes a row."""
  originals = []
  for cls in {type(x) for _, x in walk_nodes(model) if isinstance(x, Module)}:
    for name in {"__call__", method}:
      function = getattr(cls, name, None)
      if function is not None:
        originals.append((cls, name, vars(cls).get(name)))
        setattr(cls, name, _recording(function, paths, rows))
  try:
    yield
  finally:
    for cls, name, function in originals:
      delattr(cls, name) if function is None else setattr(cls, name, function)


def _recording(function: Any, paths: dict[int, tuple], rows: list[_Row]) -> Any:
  @functools.wraps(function)
  def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
    out = function(self, *args, **kwargs)
    if id(self) in paths:
      given = args if not kwargs else (*args, kwargs)
      shown = _types(given[0] if len(given) == 1 else given)
      rows.append(_Row(paths[id(self)], type(self).__name__, shown, _types(out)))
    return out

  return wrapper


def _types(tree: Any) -> str:
  def shown(x: Any) -> str:
    if isinstance(x, Variable):
      x = x.get_value()
    return f"{x.dtype}[{','.join(map(str, x.shape))}]" if hasattr(x, "shape") else repr(x)

  is_leaf = lambda x: isinstance(x, Variable | Module)
  found = jax.tree.map(
    lambda x: type(x).__name__ if isinstance(x, Module) else shown(x), tree, is_leaf=is_leaf
  )
  return str(found).replace("'", "")


def _variables(obj: Any) -> list[tuple[tuple, Variable]]:
  return [(path, x) for path, x in to_flat_state(state(obj)) if isinstance(x, Variable)]


def _variable_cells(node: Any, types: list[str], path: tuple, depth: int | None) -> list[str]:
  own = [] if node is None else _variables(node)
  if depth is None or len(path) < depth:
    own = [(p, v) for p, v in own if len(p) == 1]
  cells = []
  for name in types:
    found = [(p, v) for p, v in own if type(v).__name__ == name]
    lines = [f"{'/'.join(map(str, p))}: {_types(v)}" for p, v in found]
    cells.append("\n".join([*lines, _size([v for _, v in found])]) if found else "")
  return cells


def _size(variables: list[Variable]) -> str:
  count = sum(v.size for v in variables if hasattr(v.get_raw_value(), "shape"))
  size = sum(v.nbytes for v in variables if hasattr(v.get_raw_value(), "shape"))
  return f"{count:,} ({size:,} B)" if count else ""
