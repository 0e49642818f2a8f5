"""nnx.vmap: a function of one example, or one model, mapped over a batch or an ensemble."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.filters import Filter, to_predicate
from refax.core.graphdef import LEAF
from refax.core.variable import Variable
from refax.errors import (
  ForeignNameError,
  InvalidArgumentError,
  SharedWriteError,
  TreeMismatchError,
)
from refax.transforms.axes import (
  Carry,
  StateAxes,
  argument_axes,
  assign,
  counted,
  is_axis,
  is_prefix,
  size_of,
)
from refax.transforms.axis_names import kept_up
from refax.transforms.lift import Inputs, Outputs, OutputSpec
from refax.transforms.shared import derived
from refax.transforms.stage import Staged, read_closures, values_of
from refax.typing import Path, path_str

REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "mean": lambda x: jnp.mean(x, axis=0, dtype=x.dtype),
  "sum": lambda x: jnp.sum(x, axis=0, dtype=x.dtype),
  "first": lambda x: x[0],
  "split": lambda x: x[0],  # of keys, which are split on the way in; nothing writes them
}


def vmap(
  f: Callable | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  axis_name: Any = None,
  axis_size: int | None = None,
  spmd_axis_name: Any = None,
  reduce: Mapping[Filter, str] | None = None,
  transform_metadata: Mapping[str, Any] | None = None,
) -> Any:
  """Map a function over an axis of arrays and of Variables, as `jax.vmap`.

  Args:
    f: a function of Modules, Variables and arrays; without it, a decorator is returned.
    in_axes: an axis, None or `nnx.StateAxes` for all positional arguments, or a tuple with one for
      each. Keyword arguments are mapped over axis 0, except those for which a tuple has an axis.
    out_axes: the same for what `f` returns. State that was mapped on the way in is written back
      along the same axis.
    axis_name: a name of the axis for collectives inside.
    axis_size: its size, where no argument tells.
    spmd_axis_name: as in `jax.vmap`.
    reduce: for Variables that are shared (axis None, or by closure) and written with values that
      differ along the axis: `"mean"`, `"sum"` or `"first"` for each filter. Without it, such a
      write is an error. And `{nnx.RngKey: "split"}`, for random streams that are shared: each
      element draws other numbers, where it would draw the same.
    transform_metadata: `{nnx.PARTITION_NAME: name}`, the name of the axis in the `out_sharding` of
      mapped Variables; without it, Variables that `f` makes get None, an axis that is not divided.

  Returns:
    A function like `f` on batches.

  Raises:
    SharedWriteError: a shared Variable is written with values that differ.
    TreeMismatchError: axes do not fit the arguments or the results, or their sizes differ.
    InvalidArgumentError: `reduce` names a policy that does not exist.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> ensemble = nnx.vmap(lambda rngs: nnx.Linear(2, 3, rngs=rngs))(nnx.Rngs(0).split(5))
  >>> ensemble.kernel.shape
  (5, 2, 3)
  >>> nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(ensemble, jnp.ones(2)).shape
  (5, 3)
  """
  options = {
    "in_axes": in_axes,
    "out_axes": out_axes,
    "axis_name": axis_name,
    "axis_size": axis_size,
    "spmd_axis_name": spmd_axis_name,
    "reduce": reduce,
  }
  if f is None:
    return lambda f: vmap(f, transform_metadata=transform_metadata, **options)
  mapped = kept_up(f, transform_metadata, in_axes=in_axes, out_axes=out_axes)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    return _Mapped(mapped, *counted(f, args, kwargs, in_axes), **options).call()

  return derived(wrapper, "vmap", f, metadata=transform_metadata, **options)


def _policy(name: Any) -> str:
  if name not in REDUCTIONS:
    wanted = ", ".join(f'"{known}"' for known in REDUCTIONS)
    raise InvalidArgumentError.value("nnx.vmap", "reduce", name, f"one of {wanted}")
  return name


class _Mapped:
  """One call of a mapped function."""

  def __init__(
    self, f, args, kwargs, *, in_axes, out_axes, axis_name, axis_size, spmd_axis_name, reduce
  ):
    self.inputs = Inputs.of(args, kwargs)
    self.values = values_of(self.inputs)
    self.axes = argument_axes(self.inputs, in_axes, len(args), default=0)
    prefixes = (in_axes,) * len(args) if is_prefix(in_axes) else tuple(in_axes)
    self._prefixes = list(zip(prefixes, self.inputs.arguments, strict=False))
    if Carry in self.axes.values():
      raise TreeMismatchError.axes("in_axes of nnx.vmap", "", f"{in_axes!r}")
    size = axis_size or size_of(self.axes, self.values, self._name, "nnx.vmap")
    if size is None:
      raise TreeMismatchError.no_size("nnx.vmap", repr(in_axes), "axis_size")
    self.size: int = size
    self.out_axes = out_axes
    self.reduce = [(to_predicate(k), _policy(v)) for k, v in (reduce or {}).items()]
    self._vmap = functools.partial(
      jax.vmap, axis_name=axis_name, axis_size=self.size, spmd_axis_name=spmd_axis_name
    )
    self._is_named = axis_name is not None or spmd_axis_name is not None
    self.staged = self._stage(f)

  def _name(self, index: int) -> str:
    return path_str(self.inputs.graphdef.paths[index][1:])

  def _stage(self, f: Callable) -> Staged:
    """Trace `f` on one element to see what it writes and returns."""
    is_final = _jax.no_trace_active()  # now, and not inside the mapped axis
    axes = [self.axes[i] for i in range(len(self.values))]
    if is_final and not self._is_named and all(map(_is_local, self.values, axes)):
      elements = list(map(_element, self.values, axes))
      return Staged(f, self.inputs, elements, is_final=True)
    found: list[Staged] = []

    def stage(values):
      found.append(Staged(f, self.inputs, values, is_final=is_final))
      return 0

    # Inside the axis: it has a name, or a mesh is part of the types.
    self._vmap(stage, in_axes=(axes,), out_axes=None)(self.values)  # on the values: one trace less
    return found[0]

  def call(self) -> Any:
    """Run it and commit."""
    staged = self.staged
    refs, closures = read_closures([staged])
    shared = {i: p for i in range(len(self.values)) if (p := self._policy_of(i, staged.written))}
    closed = {k: p for k in closures if (p := self._closure_policy(k, staged.closures_written))}
    values, axes = list(self.values), dict(self.axes)
    for i, policy in shared.items():
      values[i], axes[i] = self._spread(values[i], policy), 0
    closure_axes = {key: 0 if key in closed else None for key in closures}
    closures |= {key: self._spread(closures[key], policy) for key, policy in closed.items()}
    spec = staged.outputs.spec._replace(written=tuple(sorted(staged.written)))
    places = [(("written", i), axes[i], values[i]) for i in spec.written]
    fresh = enumerate(zip(self._fresh_axes(spec), staged.outputs.fresh, strict=True))
    places += [(("fresh", i), axis, x) for i, (axis, x) in fresh]
    wanted = sorted(staged.closures_written)
    places += [(("closure", key), closure_axes[key], closures[key]) for key in wanted]
    outputs, after = self._mapped(places, values, axes, closures, closure_axes)
    written = [
      jax.tree.map(REDUCTIONS[shared[i]], x) if i in shared else x
      for i, x in zip(spec.written, outputs.written, strict=True)
    ]
    after = {k: REDUCTIONS[closed[k]](x) if k in closed else x for k, x in after.items()}
    return self.inputs.commit(Outputs(written, outputs.fresh, spec), refs, after)

  def _mapped(self, places: list, values: list, axes: dict, closures: dict, closure_axes: dict):
    """Run it under `jax.vmap`; `places` says of each result what it is, its axis, and its like."""
    flat = [(place, axis) for place, axis, like in places for _ in jax.tree.leaves(like)]
    trees: list[Any] = []

    def run(values, closures):
      leaves, tree = jax.tree.flatten(tuple(self.staged.run(values, closures)))
      trees.append(tree)
      return leaves

    mapped = self._vmap(
      run,
      in_axes=([axes[i] for i in range(len(values))], closure_axes),
      out_axes=[axis for _, axis in flat],
    )
    try:
      leaves = mapped(values, closures)
    except ValueError as error:
      # JAX found that a result without an axis differs along it, and says which result.
      found = re.search(r"at vmap out_axes\[(\d+)\]", str(error))
      if found is None:
        raise
      raise self._refused(*flat[int(found[1])][0]) from error
    return trees[0].unflatten(leaves)

  def _spread(self, value: Any, policy: str) -> Any:
    """A shared value as one for each element."""
    if policy == "split":
      return jax.random.split(value, self.size)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.size, *jnp.shape(x))), value)

  def _policy_of(self, index: int, written: set[int]) -> str | None:
    path, leaf = self.inputs.graphdef.paths[index], self.inputs.leaves[index]
    if self.axes[index] is not None or not isinstance(leaf, Variable):
      return None
    return self._choose(path, leaf, index in written)

  def _closure_policy(self, key: int, written: set[int]) -> str | None:
    variable = self.staged.closure_variable(key)
    return None if variable is None else self._choose((), variable, key in written)

  def _choose(self, path: Path, variable: Variable, is_written: bool) -> str | None:
    """The policy for a shared Variable, if it makes a difference."""
    policy = next((p for predicate, p in self.reduce if predicate(path, variable)), None)
    return policy if is_written or policy == "split" else None

  def _refused(self, sort: str, key: int) -> Exception:
    """The error for a result that differs along the axis and has none."""
    if sort == "fresh":
      leaf = (LEAF, len(self.inputs.leaves) + key)
      places = self.staged.outputs.spec.graphdef.walk()
      return TreeMismatchError.varies(path_str(next(p for p, entry in places if entry == leaf)))
    variable = self.inputs.leaves[key] if sort == "written" else self.staged.closure_variable(key)
    origin = variable._def.origin if variable is not None else "(a Ref that came by closure)"
    return SharedWriteError.mapped(origin)

  def _fresh_axes(self, spec: OutputSpec) -> list[Any]:
    """The axis of each new leaf; of state that an argument gained, what `StateAxes` say, or 0."""
    count = len(self.inputs.leaves)
    leaves = [*self.inputs.leaves, *self.staged.outputs.fresh]
    root, found = spec.graphdef.root, {}
    for prefix, entry in self._prefixes:
      if not is_axis(prefix) or isinstance(prefix, StateAxes):
        found |= assign(prefix, entry, spec.graphdef, leaves, "in_axes")
    found |= assign(self.out_axes, root, spec.graphdef, leaves, "out_axes")
    return [found.get(count + i, 0) for i in range(len(leaves) - count)]


def _is_local(value: Any, axis: Any) -> bool:
  """Whether shape and dtype say all that a trace depends on, of an element along `axis`."""
  if not isinstance(axis, int | None) or not jax.sharding.get_abstract_mesh().empty:
    return False
  arrays = [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array)]
  return all(isinstance(x.sharding, jax.sharding.SingleDeviceSharding) for x in arrays)


def _element(value: Any, axis: int | None) -> Any:
  """The type of one element of a value along an axis; the value where all elements have it."""
  if axis is None:
    return value

  def element(x: Any) -> jax.ShapeDtypeStruct:
    shape = list(jnp.shape(x))
    del shape[axis]
    return _jax.type_struct(jax.typeof(x)).update(shape=tuple(shape))

  return jax.tree.map(element, value)


def pmap(*_: Any, **__: Any) -> Any:
  """An error: JAX replaces `pmap` by arrays that are sharded over a mesh.

  Raises:
    ForeignNameError: always; it says what to write.

  >>> from refax import nnx
  >>> nnx.pmap(lambda x: x)
  Traceback (most recent call last):
  ...
  refax.errors.ForeignNameError: Refax has no nnx.pmap, ...
  """
  raise ForeignNameError.pmap()
