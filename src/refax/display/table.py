"""nnx.tabulate: a model as a table, a row for each layer."""

import io
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from refax.core import text
from refax.core.variable import Variable, identity
from refax.errors import MissingPackageError
from refax.inspect.cost import Cost
from refax.inspect.summary import Layer, layers_of
from refax.rngs import RngState


def tabulate(
  model: Any,
  *args: Any,
  depth: int | None = None,
  method: str = "__call__",
  compute_flops: bool = True,
  compute_vjp_flops: bool = True,
  width: int | None = None,
  table_kwargs: dict[str, Any] | None = None,
  **kwargs: Any,
) -> str:
  """A table of a model: for each layer what it is given, returns, holds and takes.

  The model is traced on types: nothing is computed, and its state stays as it is.

  Args:
    model: a Module; its Variables may hold types only, as those of `nnx.eval_shape` do.
    *args: what it is called with: arrays or `jax.ShapeDtypeStruct`s. Without any, the table shows
      what the layers hold.
    depth: how many levels of layers; all by default.
    method: the name of the method that is called.
    compute_flops: whether to count the operations of the forward pass (`flops`).
    compute_vjp_flops: whether to count those of forward and backward pass together (`vjp_flops`).
    width: the number of characters of a line; by default that of the terminal, or 120.
    table_kwargs: options of `rich.table.Table`.
    **kwargs: more arguments of the call.

  Returns:
    The text of the table. FLOPs are counted as XLA's cost analysis counts them, but the body of a
    loop as often as it runs.

  Raises:
    MissingPackageError: `rich` is not installed.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> print(nnx.tabulate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((4, 2)), width=90))
  ... # doctest: +NORMALIZE_WHITESPACE +ELLIPSIS
                              Linear...
  """
  layers = layers_of(model, args, kwargs, method=method, flops=(compute_flops, compute_vjp_flops))
  shown = [x for x in layers if depth is None or x.level <= depth]
  found = dict.fromkeys(type(v).__name__ for v in layers[0].below if not isinstance(v, RngState))
  types = sorted(found, key=lambda name: name != "Param")  # which comes first
  width = _width() if width is None else width
  table = _table(f"{type(model).__name__} Summary", table_kwargs or {})
  costs = _cost_columns(layers)
  _add_columns(table, shown, types, costs, width)
  for layer in shown:
    table.add_row(*_cells(layer, types, _is_leaf(layer, shown, layers)), *_costs(layer, layers))
  table.add_section()
  root = layers[0]
  totals = [_size(v for v in root.below if type(v).__name__ == t) for t in types]
  table.add_row("Total", "", "", *totals, *_costs(root, layers), style="bold")
  everything = f"Total Parameters: {_size(root.below) or '0'}{_on_a_device(root.below)}"
  return f"{_text(table, width)}{everything:^{width}}".rstrip() + "\n"


def _add_columns(
  table: Any, shown: Sequence[Layer], types: Sequence[str], costs: Sequence[str], width: int
) -> None:
  """The columns; those that are read first stay unbroken, if there is room."""
  unbroken = {
    "path": ["/".join(map(str, (*x.path, x.method))) for x in shown],
    "type": [x.type for x in shown],
    "inputs → outputs": [f"→ {text}" for x in shown for text in _tokens((x.inputs, x.outputs))],
  }
  frames = 1 + 3 * (len(unbroken) + len(types) + len(costs))
  room = max(width - frames - 12 * len(types) - 12 * len(costs), 0)
  for i, (name, texts) in enumerate(unbroken.items()):
    wanted = min(max(map(len, texts)), room // 2 if i < 2 else room)
    table.add_column(name, overflow="fold", min_width=max(1, wanted))
    room -= wanted
  for name in types:
    most = 12 + room // len(types) if width >= 80 else None
    table.add_column(name, overflow="fold", max_width=most)
  for name in costs:
    table.add_column(name, justify="right", overflow="fold", max_width=12)


def _table(title: str, options: dict[str, Any]) -> Any:
  try:
    import rich.box
    import rich.table
  except ImportError:
    raise MissingPackageError.extra("nnx.tabulate", "rich", "display") from None
  return rich.table.Table(**{"title": title, "show_lines": True, "box": rich.box.ROUNDED} | options)


def _width() -> int:
  columns = shutil.get_terminal_size((120, 0)).columns
  return columns if sys.stdout.isatty() else 120


def _text(table: Any, width: int) -> str:
  import rich.console

  buffer = io.StringIO()
  rich.console.Console(file=buffer, width=width, force_terminal=False).print(table)
  return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _is_leaf(layer: Layer, shown: Sequence[Layer], layers: Sequence[Layer]) -> bool:
  """Whether layers below this one are not shown, so that its row stands for them."""
  is_below = lambda x: len(x.path) > len(layer.path) and x.path[: len(layer.path)] == layer.path
  return any(map(is_below, layers)) and not any(map(is_below, shown))


def _cells(layer: Layer, types: Sequence[str], is_collapsed: bool) -> list[str]:
  name = "/".join(map(str, (*layer.path, *([layer.method] if layer.method else []))))
  kind = layer.type + (f"\n× {layer.calls}" if layer.calls > 1 else "")
  called = f"{shape_text(layer.inputs)}\n→\xa0{shape_text(layer.outputs)}" if layer.calls else ""
  if layer.same_as is not None:
    kind = f"{kind}\nthe same as {'/'.join(map(str, layer.same_as)) or 'the model'}"
    return [name, kind, called, *[""] * len(types)]
  own = [] if is_collapsed else list(layer.variables)
  cells = []
  for t in types:
    of_own = [(p, v) for p, v in own if type(v).__name__ == t]
    lines = [f"{'/'.join(map(str, p))}: {shape_text(v)}{_layout(v)}" for p, v in of_own]
    of_type = layer.below if is_collapsed else [v for _, v in own]
    size = _size(v for v in of_type if type(v).__name__ == t)
    cells.append("\n".join([*lines, *([size] if size else [])]))
  return [name, kind, called, *cells]


def _tokens(tree: Any) -> list[str]:
  """The texts of single arrays, which are not to be broken."""
  return ["", *map(shape_text, jax.tree.leaves(tree))]


def shape_text(tree: Any) -> str:
  """The arrays of a pytree as `float32[3,2]`, in its structure.

  >>> import jax
  >>> shape_text({"a": jax.ShapeDtypeStruct((3, 2), "float32"), "b": None})
  '{a: float32[3,2], b: None}'
  """
  if isinstance(tree, Variable):
    tree = tree.get_raw_value()
  if hasattr(tree, "shape") and hasattr(tree, "dtype"):
    return f"{tree.dtype}[{','.join(map(str, tree.shape))}]"
  if isinstance(tree, dict):
    return "{" + ", ".join(f"{k}: {shape_text(v)}" for k, v in tree.items()) + "}"
  if isinstance(tree, list | tuple):
    if not tree:
      return "[]" if isinstance(tree, list) else "()"
    inner = ", ".join(map(shape_text, tree))
    return f"[{inner}]" if isinstance(tree, list) else f"({inner})"
  short = getattr(tree, "__name__", None) or (tree if isinstance(tree, str) else repr(tree))
  return short if len(short) < 40 else type(tree).__name__


def _size(variables: Iterable[Variable]) -> str:
  distinct = {identity(v): v.get_raw_value() for v in variables}
  count, nbytes = text.size(list(distinct.values()))
  return text.count(count, nbytes) if count else ""


def _layout(variable: Variable) -> str:
  """Over which axes of a mesh a Variable is divided."""
  spec = getattr(getattr(variable.get_raw_value(), "sharding", None), "spec", None)
  return f" {spec}" if spec is not None and any(spec) else ""


def _on_a_device(variables: Iterable[Variable]) -> str:
  """How much of the Variables is on one device, if some are on several."""
  total, is_wide = 0, False
  for x in jax.tree.leaves(list({identity(v): v.get_raw_value() for v in variables}.values())):
    sharding = getattr(x, "sharding", None)
    if sharding is None or not hasattr(x, "dtype"):
      continue
    is_wide |= len(sharding.device_set) > 1
    count = math.prod(sharding.shard_shape(x.shape))
    total += count * getattr(x.dtype, "itemsize", 0)
  return f", on each device {text.scaled(total)}B" if is_wide else ""


def _cost_columns(layers: Sequence[Layer]) -> list[str]:
  names = [("flops", layers[0].forward), ("vjp_flops", layers[0].backward)]
  return [name for name, cost in names if cost is not None]


def _costs(layer: Layer, layers: Sequence[Layer]) -> list[str]:
  wanted = (layer.forward, layer.backward)
  have = (layers[0].forward, layers[0].backward)
  return [_flops(cost) for cost, is_there in zip(wanted, have, strict=True) if is_there is not None]


def _flops(cost: Cost | None) -> str:
  return text.scaled(cost.flops).rstrip() if cost is not None and cost.flops else ""
