"""Norms: how large parameters, gradients, updates and activations are, layer by layer."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax.core.array_protocol import unwrap
from refax.core.filters import Filter
from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.core.variable import Param, borrowed
from refax.core.write import write
from refax.errors import (
  InvalidArgumentError,
  MissingArgumentError,
  ShapeMismatchError,
  TreeMismatchError,
)
from refax.graph.split import state, variables
from refax.graph.state import to_flat_state
from refax.inspect.choice import Choice, Presence
from refax.nn import check
from refax.nn.block.stack import Stack
from refax.train import metric
from refax.typing import Path, describe, path_str

KINDS = {"parameters": "model", "gradients": "grads", "updates": "updates"}
"""What has norms, and the keyword argument of `update` that has it."""


class Entry(NamedTuple):
  """An array, or what a Module returns, that belongs to a layer."""

  path: Path
  layer: int
  """The index of the layer."""
  stacked: tuple[int, ...]
  """The lengths of the Stacks that it is in: as many axes come first."""


class Layout(NamedTuple):
  """Which layers there are, and what belongs to each. Hashable."""

  entries: tuple[Entry, ...]
  layers: tuple[tuple[str, tuple[int, ...]], ...]
  """The name of each, with `{}` for the index in a Stack; and the lengths of these Stacks."""

  @property
  def names(self) -> list[str]:
    """The name of each layer, those in a Stack one by one."""
    return [name for template, lengths in self.layers for name in _numbered(template, lengths)]


class Norms(metric.Metric):
  """The norms of parameters, gradients and updates by layer, and how large activations are.

  A number is the mean over the steps since the last `reset`. It is computed in float32 in the
  compiled step, where it costs one pass over the arrays. A layer is a Module that holds parameters
  itself; in an `nnx.Stack` each layer has its own numbers. A NaN stays until `reset`.

  Args:
    model: the model; only its structure is used.
    of: what has norms, some of `"parameters"`, `"gradients"` and `"updates"`.
    wrt: which Variables are parameters; the filter that `nnx.grad` and the `nnx.Optimizer` get.
    activations: a type of Module, a path or a predicate, as `nnx.capture` takes them: the Modules
      of whose results the root mean square is kept, which does not depend on the size of a batch.

  Raises:
    InvalidArgumentError: `of` names something else.
    FilterError: no Module is at the path `activations`.

  >>> from refax import nnx; import jax.numpy as jnp, optax
  >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  >>> norms = nnx.metrics.Norms(model)
  >>> @nnx.jit
  ... def step(model, optimizer, norms, x):
  ...   grads = nnx.grad(lambda model: model(x).sum())(model)
  ...   norms.update(model=model, grads=grads, updates=optimizer.update(model, grads))
  >>> step(model, optimizer, norms, jnp.ones((4, 2)))
  >>> values = norms.compute()
  >>> round(float(values["gradients"]), 3), round(float(values["updates"]), 3)
  (6.928, 0.693)
  """

  def __init__(
    self,
    model: Any,
    *,
    of: tuple[str, ...] = ("parameters", "gradients", "updates"),
    wrt: Filter = Param,
    activations: Filter | None = None,
  ):
    self.of = (of,) if isinstance(of, str) else tuple(of)
    for kind in self.of:
      if kind not in KINDS:
        raise InvalidArgumentError.value("Norms", "of", kind, f"some of {', '.join(KINDS)}")
    self.wrt = tuple(wrt) if isinstance(wrt, list) else wrt
    self._layout = _of_parameters(model, self.wrt)
    self._outputs = None if activations is None else _of_modules(model, activations)
    sizes = {kind: len(self._layout.names) + 1 for kind in self.of}  # the last is of all together
    if self._outputs is not None:
      sizes["activations"] = len(self._outputs.names)
    self.sums = {k: metric.MetricState(jnp.zeros(n, jnp.float32)) for k, n in sizes.items()}
    self.counts = {k: metric.MetricState(jnp.zeros(n, jnp.uint32)) for k, n in sizes.items()}

  def reset(self) -> None:
    """Forget all steps, in place."""
    metric.clear(*self.sums.values(), *self.counts.values())

  def update(
    self,
    *,
    model: Any = None,
    grads: Any = None,
    updates: Any = None,
    activations: Any = None,
    **_: Any,
  ) -> None:
    """Count a step, in place.

    Args:
      model: the model, for the norms of its parameters.
      grads: what `nnx.grad` returned.
      updates: what `optimizer.update` returned.
      activations: the State that a function of `nnx.capture` returned.

    Raises:
      MissingArgumentError: what has norms was not given; nothing has been written.
      TreeMismatchError: an array is missing, or of another shape; nothing has been written.
    """
    given = {"model": model, "grads": grads, "updates": updates, "activations": activations}
    write(*self._planned(**given), fresh=True)

  def _planned(self, **given: Any) -> metric.Writes:  # pyright: ignore[reportIncompatibleMethodOverride]
    writes: metric.Writes = []
    for kind, total in self.sums.items():
      x = given.get(KINDS.get(kind, kind))
      if x is None:
        raise self._missing(kind, given)
      count = self.counts[kind]
      old = (borrowed(total), borrowed(count))
      if kind == "activations":
        new = _with_activations(*old, *self._results(x))
      else:
        new = _with_norms(*old, self._arrays(kind, x), layout=self._layout)
      writes += zip((total, count), new, strict=True)
    return writes

  def _missing(self, kind: str, given: dict[str, Any]) -> MissingArgumentError:
    name = KINDS.get(kind, kind)
    there = [k for k, x in given.items() if x is not None]
    return MissingArgumentError(
      f"Norms was not given {name}",
      at=check.origin(self.sums[kind]),
      got=f"the keyword arguments {', '.join(there)}" if there else "no keyword argument",
      fix=f"call update({name}=...), or build Norms without {kind}",
    )

  def _arrays(self, kind: str, given: Any) -> list[list[jax.Array]]:
    """The arrays of each entry; a Variable may hold several."""
    if kind == "parameters":
      flat = to_flat_state(variables(given, self.wrt))
    else:
      flat = to_flat_state(given if isinstance(given, Mapping) else state(given, self.wrt))
    found = {path: unwrap(x) for path, x in flat}
    arrays = []
    for path, _, stacked in self._layout.entries:
      leaves = jax.tree.leaves(found.get(path))
      wrong = [x for x in leaves if jnp.shape(x)[: len(stacked)] != stacked]
      if path not in found or wrong:
        got = f"{describe(wrong[0])} in {kind}" if wrong else f"no array in {kind}"
        raise TreeMismatchError(
          "what Norms is given does not have the structure of the model that it was built for",
          at=path_str(path),
          got=got,
          fix="build Norms with the model that is trained, and the wrt of its gradients",
        )
      arrays.append(list(map(jnp.asarray, leaves)))
    return arrays

  def _results(self, given: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The sum of squares and the number of elements of what each layer returned."""
    layout = self._outputs
    assert layout is not None
    found: dict[Path, list[jax.Array]] = {}
    for (*path, name), value in to_flat_state(given):
      if name == "__call__":
        leaves = [x for x in jax.tree.leaves(unwrap(value)) if _is_float(x)]
        found[tuple(map(str, path))] = leaves
    squares, sizes = [], []
    for path, _, stacked in layout.entries:
      arrays = found.get(tuple(map(str, path)), [])
      for x in arrays:
        if x.shape[: len(stacked)] != stacked:
          raise ShapeMismatchError(
            f"Norms expects one result for each of the {math.prod(stacked)} layers of a Stack",
            at=path_str(path),
            got=f"a result {describe(x)}",
            fix="capture activations inside of jax.vmap, or leave these layers out",
          )
      zero = jnp.zeros(stacked, jnp.float32)
      squares.append(sum((_squares(x, len(stacked)) for x in arrays), zero))
      sizes.append(zero + sum(x.size / max(math.prod(stacked), 1) for x in arrays))
    return squares, sizes

  def compute(self) -> dict[str, jax.Array]:
    """The means over the steps, float32 scalars, nan where there were none.

    Returns:
      A flat dict: `"gradients/encoder/layers/0"` for a layer, `"gradients/."` for what the model
      itself holds, `"gradients"` for all parameters together; `"activations/encoder/layers/0"`.
    """
    values: dict[str, jax.Array] = {}
    for kind, total in self.sums.items():
      layout = self._outputs if kind == "activations" else self._layout
      assert layout is not None
      names = [f"{kind}/{name}" for name in layout.names]
      names += [] if kind == "activations" else [kind]
      means = _means(borrowed(total), borrowed(self.counts[kind]))
      values |= zip(names, means, strict=True)
    return values


def _of_parameters(model: Any, wrt: Filter) -> Layout:
  modules = dict(_modules(model))
  entries: list[Entry] = []
  layers: dict[tuple[str, tuple[int, ...]], int] = {}
  for path, _ in to_flat_state(variables(model, wrt)):
    owner = next((path[:i] for i in range(len(path) - 1, 0, -1) if path[:i] in modules), ())
    layer = _named(owner, modules)
    entries.append(Entry(path, layers.setdefault(layer, len(layers)), layer[1]))
  return Layout(tuple(entries), tuple(layers))


def _of_modules(model: Any, which: Filter) -> Layout:
  Presence([which], is_root=True).check([model])
  modules, choice = dict(_modules(model)), Choice.of([which])
  chosen = [path for path, module in modules.items() if choice.has(path, module)]
  layers = tuple(_named(path, modules) for path in chosen)
  entries = [Entry(path, i, layers[i][1]) for i, path in enumerate(chosen)]
  return Layout(tuple(entries), layers)


def _modules(model: Any) -> Iterator[tuple[Path, Module]]:
  """All Modules but containers, those around others first."""
  found = [(p, x) for p, x in walk_nodes(model) if isinstance(x, Module) and not x._is_container]
  return reversed(found)


def _named(path: Path, modules: dict[Path, Module]) -> tuple[str, tuple[int, ...]]:
  """The name of a layer, with a place for each index, and the lengths of the Stacks around it."""
  steps, lengths = [], []
  for i, step in enumerate(path):
    steps.append(str(step).replace("{", "{{").replace("}", "}}"))
    around = modules.get(path[:i])
    if isinstance(around, Stack) and step == "layers":
      steps.append("{}")
      lengths.append(around.length)
  return "/".join(steps) or ".", tuple(lengths)


def _numbered(template: str, lengths: tuple[int, ...]) -> Iterator[str]:
  for number in range(math.prod(lengths)):
    index = []
    for n in reversed(lengths):
      number, i = divmod(number, n)
      index.insert(0, i)
    yield template.format(*index)


def _is_float(x: Any) -> bool:
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _squares(x: jax.Array, stacked: int) -> jax.Array:
  """The sum of squares, over all axes but the first ones."""
  real = jnp.abs(x) if jnp.iscomplexobj(x) else x
  wide = real.astype(jnp.float32)
  return jnp.sum(wide * wide, axis=tuple(range(stacked, x.ndim)))


@partial(jax.jit, inline=True, static_argnames="layout")
def _with_norms(
  total: jax.Array, count: jax.Array, arrays: list[list[jax.Array]], *, layout: Layout
) -> tuple[jax.Array, jax.Array]:
  squares = [jnp.zeros(lengths, jnp.float32) for _, lengths in layout.layers]
  for lot, entry in zip(arrays, layout.entries, strict=True):
    for x in lot:
      squares[entry.layer] += _squares(x, len(entry.stacked))
  flat = jnp.concatenate([jnp.zeros(0, jnp.float32), *map(jnp.ravel, squares)])
  norms = jnp.sqrt(jnp.append(flat, flat.sum()))
  return total + norms, count + 1


@partial(jax.jit, inline=True)
def _with_activations(
  total: jax.Array, count: jax.Array, squares: list[jax.Array], sizes: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  empty = [jnp.zeros(0, jnp.float32)]
  flat, size = (jnp.concatenate([*empty, *map(jnp.ravel, lot)]) for lot in (squares, sizes))
  seen = size > 0
  root = jnp.sqrt(flat / jnp.where(seen, size, 1))
  return total + jnp.where(seen, root, 0), count + seen.astype(jnp.uint32)


@jax.jit
def _means(total: jax.Array, count: jax.Array) -> list[jax.Array]:
  return list(total / count.astype(jnp.float32))
