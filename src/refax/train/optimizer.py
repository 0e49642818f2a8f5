"""Optimizer: an optax transformation with its state in Variables, updated in place."""

from collections.abc import Mapping
from types import GenericAlias
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from refax import config
from refax.core import storage
from refax.core.annotation import OF_STATE, check, mesh_of, spec_of
from refax.core.array_protocol import unwrap
from refax.core.filters import Filter
from refax.core.flatten import Walk
from refax.core.gather import as_kept
from refax.core.mesh import arguments_meet
from refax.core.node import Node
from refax.core.owned import Owned
from refax.core.pytree import Pytree, data
from refax.core.variable import Variable, borrowed, is_variable
from refax.core.write import write
from refax.errors import InvalidArgumentError, MissingArgumentError, TreeMismatchError
from refax.graph.follow import Leaders
from refax.graph.split import state, variables
from refax.graph.state import State, from_flat_state, to_flat_state
from refax.train.finite import all_finite
from refax.train.hyperparams import Hyperparams
from refax.train.placement import beside, is_beside, sharding_of
from refax.transforms.layout import move
from refax.typing import Path, describe, path_str

_REQUIRED: Any = type("_Required", (), {"__repr__": lambda _: "<required>"})()


class OptState(Variable):
  """The state of an optimizer. A gradient that is taken of updates flows through it.

  >>> from refax import nnx; import optax
  >>> optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param)
  >>> isinstance(optimizer.step, nnx.OptState)
  True
  """


class Optimizer(Pytree):
  """Updates the parameters of a model by an optax transformation.

  Args:
    model: the model.
    tx: an optax gradient transformation.
    wrt: which Variables of the model to update; the filter that `nnx.grad` gets.
    skip_nonfinite: whether gradients with an infinite number or a nan leave parameters and state as
      they were.

  Attributes:
    step: how many updates there were, uint32.
    opt_state: the optax state, with a Variable for each of its arrays, sharded as its parameter is,
      or as the parameter's metadata `opt_sharding` says.
    skipped: how many updates were skipped, uint32; None without `skip_nonfinite`.

  >>> from refax import nnx; import jax, jax.numpy as jnp, optax
  >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  >>> @jax.jit
  ... def step(model, optimizer, x, y):
  ...   loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
  ...   optimizer.update(model, grads)
  ...   return loss
  >>> losses = [float(step(model, optimizer, jnp.ones((4, 2)), jnp.ones((4, 1)))) for _ in range(9)]
  >>> losses[-1] < losses[0], int(optimizer.step)
  (True, 9)
  """

  __class_getitem__ = classmethod(GenericAlias)

  def __init__(
    self,
    model: Any,
    tx: optax.GradientTransformation,
    *,
    wrt: Filter = _REQUIRED,
    skip_nonfinite: bool = False,
  ):
    if wrt is _REQUIRED:
      raise MissingArgumentError.wrt(type(self).__name__)
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
      fix = "an optax transformation, such as optax.adam(1e-3)"
      raise InvalidArgumentError.value("Optimizer", "tx", tx, fix)
    self.tx = tx
    self.wrt = tuple(wrt) if isinstance(wrt, list) else wrt
    params = variables(model, wrt)
    devices = sharding_of(params)
    count = beside(jnp.zeros((), jnp.uint32), devices)
    self.step = OptState(count)
    self.skipped = OptState(count) if skip_nonfinite else None
    values = from_flat_state((path, borrowed(x)) for path, x in to_flat_state(params))
    leaves, treedef = jax.tree.flatten(tx.init(values))
    owned = Owned(leaves, jax.tree.leaves(values))
    for i in range(len(leaves)):  # one after the other: all copies at once would be a peak
      if owned(i) and is_beside(leaves[i], devices):
        leaves[i] = OptState._taking(leaves[i], self.step)
      else:
        leaves[i] = OptState(beside(leaves[i], devices))
    self.opt_state = data(treedef.unflatten(leaves))
    _annotate(self.opt_state, params)

  @property
  def hyperparams(self) -> Hyperparams:
    """The hyper-parameters that `optax.inject_hyperparams` keeps, by name: read and set them here.

    Raises:
      MissingHyperparamError: when one is read or set that does not exist, or exists several times.
      InvalidArgumentError: when one is set that a schedule computes.
    """
    return Hyperparams(self.opt_state)

  def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
    """Update the parameters of `model` and the optimizer's own state, in place.

    Args:
      model: the model, or another one of the same structure.
      grads: what `nnx.grad` returned: a State, or nested dicts, of Variables or arrays.
      **kwargs: for transformations that take more (a value, a loss function).

    Returns:
      The updates that were added to the parameters, a State of arrays; zeros if they were skipped.

    Raises:
      TreeMismatchError: the gradients are not those of the parameters, or there is a number in
        `opt_state` where a Variable was; nothing has been written.
    """
    self._check_order(model, grads)
    targets = variables(model, self.wrt)
    arguments_meet((targets, self.opt_state, self.step))
    params, (grads, are_batched) = _arrays(targets), self._gradients(targets, grads)
    slots, treedef = jax.tree.flatten(self.opt_state, is_leaf=is_variable)
    if not all(map(is_variable, slots)) and is_variable(self.step):
      raise _assigned(self.opt_state)
    old = treedef.unflatten(map(unwrap, slots))
    kwargs = jax.tree.map(unwrap, kwargs, is_leaf=is_variable)
    updates, new = optax.with_extra_args_support(self.tx).update(grads, old, params, **kwargs)
    if are_batched:
      _check_summed_up(params, grads, updates)
    values = jax.tree.leaves(optax.apply_updates(params, updates))
    written = [*(v for _, v in to_flat_state(targets)), *slots]
    writes = list(zip(written, [*values, *treedef.flatten_up_to(new)], strict=True))
    if self.skipped is None:
      write(*writes, (self.step, self.step + 1))
      return updates
    finite = all_finite(grads)
    writes = [(v, _new_if(finite, v, x)) for v, x in writes]
    count = finite.astype(jnp.uint32)
    write(*writes, (self.step, self.step + count), (self.skipped, self.skipped + (1 - count)))
    return jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)

  def _check_order(self, model: Any, grads: Any) -> None:
    """Refuse `update(grads, model)`, which would write into the gradients and move nothing."""
    first, second = (
      [x for x in jax.tree.leaves(tree, is_leaf=is_variable) if is_variable(x)]
      for tree in (model, grads)
    )
    if any(x._def.is_gradient for x in first):
      raise TreeMismatchError.swapped("gradients as the first argument")
    live = any(x.is_hijax and not x._def.is_gradient for x in second)
    cells = live and not any(x.is_hijax for x in first)  # writes would go into copies
    if cells or (isinstance(grads, Node) and not isinstance(model, Node)):
      raise TreeMismatchError.swapped(f"{type(grads).__name__} with parameters as the second")

  def _gradients(self, params: State, grads: Any) -> tuple[State, bool]:
    """The gradients as arrays, and whether there is one for each example.

    They are checked to have the paths of the parameters, and their shapes if there is one for all.
    """
    params_by_path = dict(to_flat_state(params))
    # `jax.grad` of a functional model gives a model: with what is no parameter in it, too.
    plain = isinstance(grads, Mapping)
    flat = to_flat_state(grads if plain else state(grads, self.wrt))
    by_path = {path: unwrap(g) for path, g in flat}
    are_batched = _are_batched(params_by_path, by_path)
    for path, param in params_by_path.items():
      if path not in by_path:
        raise TreeMismatchError.gradients(path_str(path), f"no gradient for {describe(param)}")
      if jnp.shape(by_path[path]) != param.shape and not are_batched:
        raise _of_shape(path, by_path[path], param)
    for path in by_path:
      if path not in params_by_path:
        raise TreeMismatchError.gradients(path_str(path), "a gradient without a parameter")
    return from_flat_state(by_path), are_batched


def _check_summed_up(params: State, grads: State, updates: Any) -> None:
  """Of gradients of examples, one update is to come for each parameter."""
  found, by_path = dict(to_flat_state(updates)), dict(to_flat_state(grads))
  for path, param in to_flat_state(params):
    if jnp.shape(found[path]) != param.shape:
      raise _of_shape(path, by_path[path], param)


def _of_shape(path: Path, grad: Any, param: jax.Array) -> TreeMismatchError:
  got = f"a gradient {describe(grad)} for a parameter {describe(param)}"
  return TreeMismatchError.gradients(path_str(path), got)


def _are_batched(params: Mapping[Path, Any], grads: Mapping[Path, Any]) -> bool:
  """Whether there is a gradient for each example, as differentially private training takes them."""
  shapes = [jnp.shape(grads[path]) if path in grads else () for path in params]
  pairs = zip(shapes, params.values(), strict=True)
  return len({shape[:1] for shape in shapes}) == 1 and all(
    shape[1:] == x.shape != shape for shape, x in pairs
  )


def _assigned(opt_state: Any) -> TreeMismatchError:
  """The error for a number or an array in the place of a Variable, as optax's own users write."""
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_variable)
  path, value = next((path, x) for path, x in flat if not is_variable(x))
  return TreeMismatchError.assigned(f"opt_state{jax.tree_util.keystr(path)}", value)


def _annotate(opt_state: Any, params: State) -> None:
  """Let what is kept for a parameter name its axes as that does, or as its `opt_sharding` says."""
  found = {}
  for path, x in to_flat_state(params):
    metadata = x.get_metadata()
    axes = next((metadata[name] for name in (*OF_STATE, "out_sharding") if name in metadata), None)
    known = {k: metadata[k] for k in ("mesh", "sharding_rules") if k in metadata}
    found[path, x.shape] = () if axes is None else tuple({"out_sharding": axes, **known}.items())
  if not any(found.values()):
    return
  leaders = Leaders(found)
  walk = Walk()
  paths = walk.graphdef(walk.entry(opt_state)).paths
  for path, x in zip(paths, walk.leaves, strict=True):
    metadata = dict(leaders.of(path, x.shape) or ())
    if metadata:
      x.set_metadata(**metadata)
      spec, mesh = spec_of(metadata, x._def.origin), mesh_of(metadata)
      if spec is not None and mesh is not None and config.using_eager_sharding():
        check(spec, mesh, x.shape, x._def.origin)
        move(x, NamedSharding(mesh, spec))


def _arrays(state: State) -> State:
  """A State of plain arrays: what optax sees."""
  with as_kept():
    return from_flat_state((path, unwrap(x)) for path, x in to_flat_state(state))


def _new_if(condition: jax.Array, variable: Variable, new: Any) -> jax.Array:
  """`new`, as it would be written to the Variable, or what this holds."""
  old = variable.get_value()
  return jax.lax.select(condition, storage.fit(new, old, variable._def.origin), old)
