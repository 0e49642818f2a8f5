"""nnx.vmap: a function of one example, or one model, mapped over a batch or an ensemble."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.filters import Filter, to_predicate
from refax.errors import SharedWriteError, TreeMismatchError
from refax.transforms.axes import argument_axes, assign, size_of
from refax.transforms.lift import Inputs, Outputs, OutputSpec
from refax.transforms.stage import Staged, read_closures, values_of, write_closures
from refax.typing import path_str

REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "mean": lambda x: jnp.mean(x, axis=0, dtype=x.dtype),
  "sum": lambda x: jnp.sum(x, axis=0, dtype=x.dtype),
  "first": lambda x: x[0],
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
) -> Any:
  """Map a function over an axis of arrays and of Variables, as `jax.vmap`.

  Args:
    f: a function of Modules, Variables and arrays; without it, a decorator is returned.
    in_axes: an axis, None or `nnx.StateAxes` for all positional arguments, or a tuple with one for
      each. Keyword arguments are mapped over axis 0.
    out_axes: the same for what `f` returns. State that was mapped on the way in is written back
      along the same axis.
    axis_name: a name of the axis for collectives inside.
    axis_size: its size, where no argument tells.
    spmd_axis_name: as in `jax.vmap`.
    reduce: for Variables that are shared (axis None, or by closure) and written with values that
      differ along the axis: `"mean"`, `"sum"` or `"first"` for each filter. Without it, such a
      write is an error.

  Returns:
    A function like `f` on batches.

  Raises:
    SharedWriteError: a shared Variable is written with values that differ.
    TreeMismatchError: axes do not fit the arguments, or their sizes differ.

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
    return lambda f: vmap(f, **options)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    return _Mapped(f, args, kwargs, **options).call()

  return wrapper


class _Mapped:
  """One call of a mapped function."""

  def __init__(
    self, f, args, kwargs, *, in_axes, out_axes, axis_name, axis_size, spmd_axis_name, reduce
  ):
    self.inputs = Inputs.of(args, kwargs)
    self.values = values_of(self.inputs)
    self.axes = argument_axes(self.inputs, in_axes, len(args), default=0)
    self.size = axis_size or size_of(self.axes, self.values, self._name, "nnx.vmap")
    if self.size is None:
      raise TreeMismatchError.axes("in_axes", "", f"{in_axes!r}, which maps nothing")
    self.out_axes = out_axes
    self.reduce = [(to_predicate(k), REDUCTIONS[v]) for k, v in (reduce or {}).items()]
    self._vmap = functools.partial(
      jax.vmap, axis_name=axis_name, axis_size=self.size, spmd_axis_name=spmd_axis_name
    )
    self._stage(f)

  def _name(self, index: int) -> str:
    return path_str(self.inputs.graphdef.paths[index][1:])

  def _stage(self, f: Callable) -> None:
    """Trace `f` on one element, inside the mapped axis, to see what it writes and returns."""
    found: list[Staged] = []

    def stage(values):
      found.append(Staged(f, self.inputs, values))
      return 0

    axes = [self.axes[i] for i in range(len(self.values))]
    jax.eval_shape(self._vmap(stage, in_axes=(axes,), out_axes=None), self.values)
    self.staged = found[0]

  def call(self) -> Any:
    """Run it and commit."""
    staged = self.staged
    refs, closures = read_closures([staged])
    shared = {i: r for i in sorted(staged.written) if (r := self._reduction(i)) is not None}
    closed = {
      k: r for k in staged.closures_written if (r := self._closure_reduction(k)) is not None
    }
    values, axes = list(self.values), dict(self.axes)
    for i in shared:
      values[i], axes[i] = self._broadcast(values[i]), 0
    closure_axes = {key: 0 if key in closed else None for key in closures}
    closures = {k: self._broadcast(v) if k in closed else v for k, v in closures.items()}
    spec = staged.outputs.spec._replace(written=tuple(sorted(staged.written)))
    out_axes = (
      Outputs([axes[i] for i in spec.written], self._fresh_axes(spec), spec),
      {key: closure_axes[key] for key in sorted(staged.closures_written)},
    )
    run = self._vmap(
      self._run,
      in_axes=([axes[i] for i in range(len(values))], closure_axes),
      out_axes=out_axes,
    )
    try:
      outputs, after = run(values, closures)
    except ValueError as error:
      origin = self._refused(str(error), spec)
      if origin is None:
        raise
      raise SharedWriteError.vmap(origin) from error
    written = [
      jax.tree.map(shared[i], x) if i in shared else x
      for i, x in zip(spec.written, outputs.written, strict=True)
    ]
    after = {key: closed[key](x) if key in closed else x for key, x in after.items()}
    write_closures(refs, after)
    return self.inputs.commit(Outputs(written, outputs.fresh, spec))

  def _run(self, values: list[Any], closures: dict[int, Any]) -> tuple[Outputs, dict[int, Any]]:
    result = self.staged.run(values, closures)
    return result.outputs, result.closures

  def _broadcast(self, value: Any) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.size, *jnp.shape(x))), value)

  def _reduction(self, index: int) -> Callable | None:
    if self.axes[index] is not None:
      return None
    path, leaf = self.inputs.graphdef.paths[index], self.inputs.leaves[index]
    return next((r for predicate, r in self.reduce if predicate(path, leaf)), None)

  def _closure_reduction(self, key: int) -> Callable | None:
    variable = self.staged.closure_variable(key)
    return next((r for predicate, r in self.reduce if predicate((), variable)), None)

  def _refused(self, message: str, spec: OutputSpec) -> Any:
    """The shared Variable whose final value JAX found to differ along the axis, if it is one.

    JAX names the place in what `run` returns: (Outputs(written, fresh), closures).
    """
    if found := re.search(r"out_axes\[0\]\[<flat index 0>\]\[(\d+)\]", message):
      return self.inputs.leaves[spec.written[int(found[1])]]._def.origin
    if found := re.search(r"out_axes\[1\]\[(\d+)\]", message):
      variable = self.staged.closure_variable(int(found[1]))
      return variable._def.origin if variable is not None else "(a Ref that came by closure)"
    return None

  def _fresh_axes(self, spec: OutputSpec) -> list[Any]:
    """The axis of each new leaf; state that an argument gained is mapped along axis 0."""
    count = len(self.inputs.leaves)
    leaves = [*self.inputs.leaves, *self.staged.outputs.fresh]
    root = spec.graphdef.root
    found = assign(self.out_axes, root, spec.graphdef, leaves, "out_axes")
    return [found.get(count + i, 0) for i in range(len(leaves) - count)]
