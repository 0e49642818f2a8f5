"""What a function does to state: to know it, to forbid it, to undo it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.epoch import epoch
from refax.core.graphdef import REGION, STATIC
from refax.core.interrupt import surely
from refax.core.node import Node
from refax.core.rebuild import fill, resolver
from refax.core.variable import Variable
from refax.errors import AliasError, NonFiniteError, UnwantedWriteError
from refax.transforms.dependence import NOTHING, Cell, Dependence, Flow
from refax.transforms.effect_graph import Graph, draw, signature
from refax.transforms.lift import Inputs, Outputs
from refax.transforms.method import method_of
from refax.transforms.stage import Staged, read_closures, values_of
from refax.typing import path_str


class Effects(NamedTuple):
  """Which state a function reads and writes, by path. `print` shows a line for each layer.

  A path starts with the argument, `0.linear.kernel` or `model.linear.kernel` for a keyword; what
  is reached by closure has its path in the object that it belongs to, `Net.linear.kernel`.

  >>> from refax import nnx
  >>> nnx.effects(lambda v: v + 1)(nnx.Variable(0))
  Effects(reads=('0',), writes=())
  >>> import jax.numpy as jnp
  >>> norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  >>> print(nnx.effects(lambda norm, x: norm(x))(norm, jnp.ones((2, 3))))
  0: reads bias, scale; updates mean, var
  """

  reads: tuple[str, ...]
  writes: tuple[str, ...]

  def __str__(self) -> str:
    return signature(self.reads, self.writes)

  def as_graph(self) -> Graph:
    """A picture: the function, and arrows from the state that it reads and to what it writes.

    Returns:
      An SVG as a string, with a box for each layer; a notebook draws it, and
      `Path("effects.svg").write_text(graph)` keeps it.

    >>> from refax import nnx
    >>> graph = nnx.effects(lambda v: v + 1)(nnx.Variable(0)).as_graph()
    >>> graph.startswith("<svg")
    True
    """
    return draw(self.reads, self.writes)


def effects(f: Callable) -> Callable[..., Effects]:
  """Which Variables does a function read, and which does it write? Without running it.

  A Variable is read when a result, a write or a side effect depends on its value. A write that
  keeps a part of the old value counts as a read too. What is passed to a nested transform and not
  used there is not read, nor is what one branch of a `cond` leaves as it was.

  Args:
    f: a function of Modules, Variables and arrays.

  Returns:
    A function with the arguments of `f` that returns `nnx.Effects`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  >>> nnx.effects(lambda norm, x: norm(x))(norm, jnp.ones((2, 3))).writes
  ('0.mean', '0.var')
  """

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Effects:
    return _effects_of(_stage(f, args, kwargs))

  return wrapper


def no_update(f: Callable) -> Callable:
  """A function that computes what `f` computes and leaves all state as it was.

  Args:
    f: a function of Modules, Variables and arrays.

  Returns:
    A function like `f`.

  >>> from refax import nnx
  >>> count = nnx.Variable(0)
  >>> def increment(count):
  ...   count[...] += 1
  ...   return count[...]
  >>> int(nnx.no_update(increment)(count)), int(count)
  (1, 0)
  """

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    return _run_without_writes(_stage(f, args, kwargs))

  return wrapper


def assert_no_writes(f: Callable) -> Callable:
  """A function that does what `f` does, and raises if that would write state.

  Args:
    f: a function of Modules, Variables and arrays.

  Returns:
    A function like `f`.

  Raises:
    UnwantedWriteError: `f` writes a Variable or changes an object; nothing has been written.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.assert_no_writes(lambda model, x: model(x))(model, jnp.ones(2)).shape
  (3,)
  """

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    staged = _stage(f, args, kwargs)
    writes = _effects_of(staged).writes
    count = len(staged.inputs.objects)
    if writes or staged.outputs.spec.graphdef.nodes[:count] != staged.inputs.graphdef.nodes:
      raise UnwantedWriteError.writes(getattr(f, "__name__", "the function"), writes)
    return _run_without_writes(staged)

  return wrapper


def _stage(f: Callable, args: tuple, kwargs: dict[str, Any]) -> Staged:
  """A Module, or a method of one, is an argument: it may change its structure then."""
  if (method := method_of(f)) is not None:
    with contextlib.suppress(AliasError):  # the function finds it by closure, too
      return _stage(method[0], (method[1], *args), kwargs)
  inputs = Inputs.of(args, kwargs)
  return Staged(f, inputs, values_of(inputs))


def _run_without_writes(staged: Staged) -> Any:
  _, closures = read_closures([staged])
  outputs = staged.run(values_of(staged.inputs), closures, written=(), closures_written=()).outputs
  spec = outputs.spec
  nodes = staged.inputs.graphdef.nodes + spec.graphdef.nodes[len(staged.inputs.objects) :]
  graphdef = type(spec.graphdef)(spec.graphdef.root, nodes, spec.graphdef.leaf_count)
  spec = spec._replace(graphdef=graphdef, redefined=())
  return staged.inputs.commit(Outputs((), outputs.fresh, spec))


def _effects_of(staged: Staged) -> Effects:
  names = {i: _name(staged.inputs, i) for i in range(len(staged.inputs.leaves))}
  closures = {}
  for key in staged.closures:
    variable = staged.closure_variable(key)
    closures[key] = variable._def.origin.path() if variable is not None else "(a Ref by closure)"
  reads = [names[x] if kind == "leaf" else closures[x] for kind, x in _reads(staged)]
  writes = [names[i] for i in staged.written] + [closures[k] for k in staged.closures_written]
  return Effects(tuple(sorted(reads)), tuple(sorted(writes)))


def _reads(staged: Staged) -> set[tuple[str, int]]:
  """("leaf", index) of the inputs and ("closure", id) of the Refs that what it does depends on."""
  closed = staged.jaxpr
  jaxpr, outputs = closed.jaxpr, staged.out_tree.unflatten(closed.jaxpr.outvars)
  values: list[Flow | Cell] = []
  for index, mine in enumerate(staged.by_leaf(jaxpr.invars)):
    leaf, value = staged.inputs.leaves[index], NOTHING
    if isinstance(leaf, Variable):
      key = ("leaf", index)
      value = Cell(key) if leaf.is_hijax else Flow(frozenset([key]))
    values += [value] * len(mine)
  dependence = Dependence()
  flows = dependence.run(jaxpr, closed.consts, values)
  of = dict(zip(map(id, jaxpr.outvars), flows, strict=True))
  found = set(dependence.reads)
  for out in jax.tree.leaves(outputs.fresh):
    found |= of.get(id(out), NOTHING).all
  for index, new in zip(staged.outputs.spec.written, outputs.written, strict=True):
    for out in jax.tree.leaves(new):
      flow = of.get(id(out), NOTHING)
      found |= (flow.copies - {("leaf", index)}) | flow.computed
  leaves = {("leaf", i) for i in range(len(staged.inputs.leaves)) if ("leaf", i) in found}
  return leaves | {("closure", key) for key in staged.closures if key in found}


def _name(inputs: Inputs, index: int) -> str:
  _, argument, *path = inputs.graphdef.paths[index]
  return f"{argument}{path_str(tuple(path))}"


class Transaction:
  """What `nnx.transaction` hands out.

  >>> from refax import nnx
  >>> with nnx.transaction(nnx.Variable(0)) as transaction:
  ...   transaction.require_finite(1.0)
  """

  def require_finite(self, *values: Any) -> None:
    """Raise NonFiniteError, which ends the transaction, if a value is infinite or not a number."""
    for value in jax.tree.leaves(values):
      if not bool(jnp.isfinite(jnp.asarray(value)).all()):
        raise NonFiniteError.value(value)


@contextlib.contextmanager
def transaction(*objects: Any) -> Iterator[Transaction]:
  """Undo everything that is done to objects inside a block, if it raises.

  Args:
    *objects: Modules, Variables, Optimizers, any pytree of these.

  Raises:
    NonFiniteError: from `transaction.require_finite(loss)`; the objects are as before.

  >>> from refax import nnx
  >>> count = nnx.Variable(0)
  >>> try:
  ...   with nnx.transaction(count) as transaction:
  ...     count[...] += 1
  ...     transaction.require_finite(float("nan"))
  ... except nnx.NonFiniteError:
  ...   print(int(count))
  0
  """
  with undone_on_error(Inputs.of(objects, {})):
    yield Transaction()


@contextlib.contextmanager
def undone_on_error(inputs: Inputs) -> Iterator[None]:
  """If the block raises, all objects among the inputs are as they were."""
  saved = _Saved(inputs)
  try:
    yield
  except BaseException:
    surely(saved.restore)
    raise


class _Saved:
  """What objects were: their structure, their metadata, and the values of their cells."""

  def __init__(self, inputs: Inputs):
    self._inputs = inputs
    self._variables = [
      (x, x._cell, x._def, jax.tree.map(_saved, x._cell))
      for x in inputs.leaves
      if isinstance(x, Variable)
    ]

  def restore(self) -> None:
    """Bring all of it back. Cells and metadata are structure: who has cached one looks again."""
    for variable, cell, definition, value in self._variables:
      if variable._def is not definition or _other_refs(variable._cell, cell):
        epoch.bump()
      variable._cell, variable._def = cell, definition
      for ref, x in zip(jax.tree.leaves(cell), jax.tree.leaves(value), strict=True):
        if _jax.is_ref(ref):
          _jax.write_cell(ref, x)
    value = resolver(self._inputs.leaves, self._inputs.objects)
    nodes = zip(self._inputs.objects, self._inputs.graphdef.nodes, strict=True)
    for node, (_, entries) in nodes:
      if not _is_as(node, entries, value):
        node._clear()
        fill(node, entries, value)
        node._structure_changed(None)


def _is_as(node: Node, entries: tuple, value: Callable[[tuple], Any]) -> bool:
  """Whether a node has these entries now: nothing about it need be undone."""
  now = [(key, id(x), is_data) for key, x, is_data in node._entries()]
  was = [(key, id(value(entry)), entry[0] != STATIC) for key, entry in entries]
  return now == was and all(entry[0] != REGION for _, entry in entries)


def _other_refs(a: Any, b: Any) -> bool:
  """Whether two cells consist of different Refs."""
  refs = [[id(x) for x in jax.tree.leaves(cell) if _jax.is_ref(x)] for cell in (a, b)]
  return refs[0] != refs[1]


def _saved(cell: Any) -> Any:
  return _jax.read_cell(cell) if _jax.is_ref(cell) else cell
