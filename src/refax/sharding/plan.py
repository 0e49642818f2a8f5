"""Plan: where each Variable of a model lies on a mesh, said beside the model and not in it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from refax.core.annotation import axes_of, check, part_of, spec_of
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import Walk, walk_nodes
from refax.core.node import Node
from refax.core.variable import Param, Variable
from refax.errors import InvalidArgumentError, ShardingError
from refax.graph.follow import Leaders
from refax.nn.block.stack import Stack
from refax.nn.quantization.quantized import QuantizedParam
from refax.typing import Path

WEIGHTS = (Param, QuantizedParam)
"""What layers compute with: a plan may divide it, and gather it where it is used."""


class Place(NamedTuple):
  """One Variable of a model, as a plan sees it.

  Attributes:
    path: where it is.
    variable: the Variable.
    parents: the objects that it is in, from the root to the one whose attribute it is.
    shape: the shape of one layer's array: in a `nnx.Stack`, without the axis of layers.
    stacked: the number of axes of layers.
  """

  path: Path
  variable: Variable
  parents: tuple[Node, ...]
  shape: tuple[int, ...]
  stacked: int

  @property
  def owner(self) -> Node | None:
    """The object whose attribute it is."""
    return self.parents[-1] if self.parents else None

  @property
  def origin(self) -> Any:
    """Where it is and where it was made, for messages."""
    return self.variable._def.origin


Axes = tuple[tuple[str, ...], ...]
"""For each axis of an array, the axes of the mesh that it is divided over."""


class Layout(NamedTuple):
  """Where the whole array of a Variable lies, and where it is when a layer uses it."""

  kept: PartitionSpec
  used: PartitionSpec


Rule = Callable[[Place, Axes, Mapping[str, int]], PartitionSpec | None]
"""From a place, what rules before have said of it, and the sizes of the mesh, to a spec or None."""


class Plan:
  """Says how each Variable of a model is divided over a mesh.

  The ready plans of `nnx.plans` know the layers of `nnx`. A plan of one's own is a mapping:

  Args:
    specs: from the end of a path (`"attention.query.kernel"`; `*` stands for any part), a type of
      Variables or any other filter, to a `PartitionSpec`. The first entry that fits decides. What
      no entry fits is on every device as a whole. In a `nnx.Stack`, the spec is that of one layer.

  `a & b` is both: `b` divides what `a` has left whole. What a mapping says of a Variable is final.

  >>> from refax import nnx; import jax
  >>> from jax.sharding import PartitionSpec as P
  >>> plan = nnx.plans.fsdp("data") & nnx.Plan({"head.kernel": P(None, "data")})
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> model = nnx.Dict(head=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  >>> plan.specs(model, mesh)["head.kernel"]
  P(None, 'data')
  """

  def __init__(self, specs: Mapping[Filter, PartitionSpec | tuple | None]):
    self._layers: str | None = None
    self._rules: tuple[Rule, ...] = ()
    self._fillers: tuple[Rule, ...] = ()
    self._final = tuple((key, _predicate(key), _as_spec(key, spec)) for key, spec in specs.items())
    self._axes = tuple(a for _, _, spec in self._final for part in spec for a in axes_of(part))
    self._name = f"nnx.Plan({dict(specs)})"

  @classmethod
  def of_rule(
    cls,
    name: str,
    rule: Rule,
    *,
    axes: Any = None,
    fills: bool = False,
    layers: str | None = None,
  ) -> "Plan":
    """A plan by a function.

    Args:
      name: how the plan is written.
      rule: the function.
      axes: the axes of the mesh that it divides over.
      fills: whether it comes after all that do not, wherever it stands.
      layers: the axis of the mesh that the layers of a `nnx.Stack` are divided over.
    """
    plan = cls({})
    plan._axes = axes_of(axes)
    plan._layers = layers
    plan._rules, plan._fillers = ((), (rule,)) if fills else ((rule,), ())
    plan._name = name
    return plan

  def __and__(self, other: "Plan") -> "Plan":
    if not isinstance(other, Plan):
      return NotImplemented
    plan = Plan({})
    plan._rules = self._rules + other._rules
    plan._fillers = self._fillers + other._fillers
    plan._final = other._final + self._final
    plan._layers = self._layers or other._layers
    plan._axes = self._axes + other._axes
    plan._name = f"{self._name} & {other._name}"
    return plan

  def __repr__(self) -> str:
    return self._name

  def specs(self, tree: Any, mesh: Any) -> dict[str, PartitionSpec]:
    """Where each Variable of a model would lie; nothing moves.

    Args:
      tree: a model, several objects in a tuple, or what `nnx.eval_shape` returns.
      mesh: the mesh.

    Returns:
      A spec for the whole array of each Variable, by its path.

    Raises:
      ShardingError: the plan does not fit the model or the mesh.
    """
    return {_dotted(place.path): layout.kept for place, layout in self.resolved(tree, mesh)}

  def resolved(self, tree: Any, mesh: Any) -> list[tuple[Place, Layout]]:
    """As `specs`, with places and layouts."""
    for axis in self._axes:  # also where no Variable is large enough, or matches
      if axis not in dict(mesh.shape):
        raise ShardingError.unknown(f"the plan {self}", PartitionSpec(axis), axis, dict(mesh.shape))
    found, leading = [], {}
    all_places = list(places(tree))
    final = self._final_for(all_places)
    for place in all_places:
      layout = self._layout(place, dict(mesh.shape), final)
      if isinstance(place.variable, Param):
        layout = layout or Layout(PartitionSpec(), PartitionSpec())
        leading[place.path, _shape(place.variable)] = layout.kept
      found.append((place, layout))
    leaders = Leaders(leading)
    resolved = []
    for place, layout in found:
      if layout is None:
        spec = leaders.of(place.path, _shape(place.variable)) or PartitionSpec()
        layout = Layout(spec, spec)
      check(layout.kept, mesh, _shape(place.variable), place.origin)
      resolved.append((place, layout))
    return resolved

  def _layout(self, place: Place, sizes: Mapping[str, int], final: list) -> Layout | None:
    """The layout of the whole array; None where no rule says anything."""
    for predicate, spec in final:
      if predicate(place.path, place.variable):
        whole = _whole(place, [axes_of(part) for part in spec], self._layers)
        return Layout(whole, whole)
    axes: list[tuple[str, ...]] = [()] * len(place.shape)
    is_said = self._assign(self._rules, place, axes, sizes)
    used = _whole(place, axes, self._layers)
    is_said |= self._assign(self._fillers, place, axes, sizes)
    kept = _whole(place, axes, self._layers)
    if place.stacked and self._layers:
      is_said = True
    if not isinstance(place.variable, WEIGHTS):
      used = kept
    return Layout(kept, used) if is_said else None

  def _assign(
    self, rules: tuple[Rule, ...], place: Place, axes: list[tuple[str, ...]], sizes: Any
  ) -> bool:
    """Let rules divide axes of an array; whether one of them says anything."""
    is_said = False
    for rule in rules:
      spec = rule(place, tuple(axes), sizes)
      if spec is None:
        continue
      is_said = True
      if len(spec) > len(place.shape):
        raise ShardingError.rank(place.origin, spec, place.shape)
      for i, part in enumerate(spec):
        new = axes_of(part)
        if axes[i] and new and axes[i] != new:
          raise ShardingError.plan(place.origin, _whole(place, axes), spec, place.shape)
        axes[i] = axes[i] or new
    return is_said

  def _final_for(self, all_places: list[Place]) -> list[tuple[Callable, PartitionSpec]]:
    """The entries of mappings for a model. A path that is one of parameters means these only.

    An optimizer has state at paths with the same end, and not always of the same shape.

    Raises:
      ShardingError: a path is that of no Variable, and was meant to be.
    """
    final = []
    for key, predicate, spec in self._final:
      if isinstance(key, str):
        fitting = [p.variable for p in all_places if predicate(p.path, p.variable)]
        if not fitting:
          raise ShardingError.no_match(key, [_dotted(p.path) for p in all_places])
        if any(isinstance(x, Param) for x in fitting):
          predicate = functools.partial(_of_param, predicate)
      final.append((predicate, spec))
    return final


def _of_param(predicate: Callable[[Path, Any], bool], path: Path, x: Any) -> bool:
  return isinstance(x, Param) and predicate(path, x)


def places(tree: Any) -> Iterator[Place]:
  """Every Variable of a pytree of objects, once, with the objects that it is in."""
  walk = Walk()
  graphdef = walk.graphdef(walk.entry(tree))
  nodes = dict(walk_nodes(tree))
  for path, leaf in zip(graphdef.paths, walk.leaves, strict=True):
    if isinstance(leaf, Variable):
      above = (path[:i] for i in range(len(path)))
      parents = tuple(nodes[p] for p in above if p in nodes)
      inside = (path[i : i + 1] for i in range(len(path)) if isinstance(nodes.get(path[:i]), Stack))
      stacked = sum(step == ("layers",) for step in inside)
      yield Place(path, leaf, parents, _shape(leaf)[stacked:], stacked)


def _shape(variable: Variable) -> tuple[int, ...]:
  """The shape of the array; `()` for a Variable that holds something else."""
  return tuple(getattr(variable.get_raw_value(), "shape", ()))


def _whole(place: Place, axes: Any, layers: str | None = None) -> PartitionSpec:
  """The spec of the whole array, from the axes of the mesh for each axis of one layer's array."""
  parts = [*map(part_of, axes)]
  if not place.stacked:
    return PartitionSpec(*parts)
  return PartitionSpec(layers, *[None] * (place.stacked - 1), *parts)


def _as_spec(key: Any, spec: Any) -> PartitionSpec:
  if spec is None or isinstance(spec, tuple):
    return PartitionSpec(*(spec or ()))
  if not isinstance(spec, PartitionSpec):
    want = "a jax.sharding.PartitionSpec"
    raise InvalidArgumentError.value("nnx.Plan", f"the spec for {key!r}", spec, want)
  return spec


def _dotted(path: Path) -> str:
  return ".".join(map(str, path))


def _predicate(key: Any) -> Callable[[Path, Any], bool]:
  if not isinstance(key, str):
    return to_predicate(key)
  pattern = key.replace("[", ".").replace("]", "")

  def fits(path: Path, _: Any) -> bool:
    whole = _dotted(path)
    return fnmatchcase(whole, pattern) or fnmatchcase(whole, f"*.{pattern}")

  return fits


def annotated_spec(place: Place) -> PartitionSpec | None:
  """What a Variable says of itself by `out_sharding`."""
  return spec_of(place.variable._def.metadata, place.origin)
