"""A compiled function bound to cells and objects: what one call of nnx.jit does, from end to end.

It is bound once for the objects of a call. A run then takes the buffers out of the cells, makes the
call, and gives buffers and structure back:

    run = bind(compiled, leaves, sources)
    result = run(args)
"""

import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from refax import _jax
from refax.core.graphdef import LEAF
from refax.core.interrupt import uninterrupted
from refax.core.node import Node
from refax.core.variable import Variable, store_cell
from refax.transforms.commit import ARRAY
from refax.transforms.compiled import Compiled, Items, Retraced, item
from refax.transforms.lift import Inputs
from refax.transforms.tree import Like, is_like


class Given:
  """The leaves and objects of one call, for that call only."""

  def __init__(self, inputs: Inputs):
    self._inputs = inputs

  def picker(self, items: Items) -> Callable[[Any], Any]:
    """The function from the arguments of a call to its arrays."""
    return lambda _: items.handed(lambda i: item(self._inputs.leaves[i]))

  def giver(self, items: Items) -> Callable[[Any], list]:
    """The function from the arguments of a call to the arrays that it may overwrite."""
    return lambda _: [item(self._inputs.leaves[i]) for i in items.given]

  def reader(self, indices: Sequence[int]) -> Callable[[Any], list]:
    """The function from the arguments of a call to some of its leaves."""
    return lambda _: [self._inputs.leaves[i] for i in indices]

  def objects(self) -> Callable[[], list[Node]]:
    """The function to the objects of a call."""
    return lambda: self._inputs.objects


class Sources:
  """Where the calls that are like one call find their leaves and objects, without keeping them.

  The arguments of these calls are `values`, or `(values, leaves, cells)` where there are containers
  of objects among them: the leaves of the containers, and these as arrays.

  No function that is made here may hold `self`, which holds the objects.

  Args:
    inputs: the call.
    places: for leaves in the arguments themselves, (0, index in `values`) or (1, in `leaves`).
    containers: for each of `Items.containers` its index in `values`.
    has_trees: whether there are containers of objects among the arguments.
    gives_up: whether the calls give up buffers of Refs. For an array in an object that has another
      type JAX would compile anew, in Python, where a signal would lose them: they raise Retraced.
  """

  def __init__(
    self,
    inputs: Inputs,
    places: dict[int, tuple[int, int]],
    containers: Sequence[int],
    *,
    has_trees: bool,
    gives_up: bool,
  ):
    self._inputs, self._containers = inputs, containers
    self._has_trees, self._gives_up = has_trees, gives_up
    self._places: dict[int, tuple[int, Any]] = dict(places)

  def picker(self, items: Items) -> Callable[[Any], Any]:
    """The function from the arguments of a call to its arrays."""
    direct = [self._places[i] for i in items.direct] + [(0, i) for i in self._containers]
    variables = [weakref.ref(self._inputs.leaves[i]) for i in items.variables]
    attributes = [self._attribute(i) for i in items.arrays]
    inside = (*items.variables, *items.arrays) if self._gives_up else ()
    likes = list(zip(*(Like.of(item(self._inputs.leaves[i])) for i in inside), strict=True))
    if not self._has_trees and not variables and not attributes:
      indices = [i for _, i in direct]
      return operator.itemgetter(*indices) if len(indices) > 1 else _picker_of_few(indices)
    has_trees = self._has_trees
    if has_trees and not variables and not attributes and {where for where, _ in direct} == {1}:
      row = operator.itemgetter(*(i for _, i in direct), direct[0][1])
      return lambda args: row(args[2])[:-1]  # one more: of one alone it makes no tuple

    def pick(args: Any) -> tuple[Any, ...]:
      parts = (args[0], args[2]) if has_trees else (args,)
      arrays: list[Any] = [ref()._node[0][0] for ref in variables]  # pyright: ignore[reportOptionalMemberAccess]
      arrays += [read() for read in attributes]
      if likes and not all(map(is_like, arrays, *likes)):
        raise Retraced
      return (*[parts[where][i] for where, i in direct], *arrays)

    return pick

  def giver(self, items: Items) -> Callable[[Any], list]:
    """The function from the arguments of a call to the arrays that it may overwrite."""
    place = lambda i: self._places[i] if i in self._places else (2, self._attribute(i))
    direct, has_trees = list(map(place, items.given)), self._has_trees

    def give(args: Any) -> list[Any]:
      parts = (args[0], args[2]) if has_trees else (args,)
      return [i() if where == 2 else parts[where][i] for where, i in direct]

    return give

  def reader(self, indices: Sequence[int]) -> Callable[[Any], list]:
    """The function from the arguments of a call to some of its leaves."""
    weak = lambda i: (2, _weak(self._inputs.leaves[i]))
    sources = [self._places[i] if i in self._places else weak(i) for i in indices]
    if all(where == 2 for where, _ in sources):
      refs = [ref for _, ref in sources]
      return lambda _: [ref() for ref in refs]

    has_trees = self._has_trees

    def read(args: Any) -> list[Any]:
      parts = args if has_trees else (args,)
      return [i() if where == 2 else parts[where][i] for where, i in sources]

    return read

  def objects(self) -> Callable[[], list[Node]]:
    """The function to the objects of a call."""
    refs: list[Any] = [weakref.ref(node) for node in self._inputs.objects]
    return lambda: [ref() for ref in refs]

  def _attribute(self, index: int) -> Callable[[], Any]:
    """The function to an array in an object; it may be replaced without another structure."""
    pairs = zip(self._inputs.objects, self._inputs.graphdef.nodes, strict=True)
    for node, (_, entries) in pairs:
      for key, entry in entries:
        if entry == (LEAF, index) and key in node.__dict__:
          return functools.partial(_read_attribute, weakref.ref(node), key)
    array = self._inputs.leaves[index]  # in a container, whose watch sees that it is replaced
    return lambda: array


def bind(
  compiled: Compiled, leaves: Sequence[Any], sources: Given | Sources, call: Any = None
) -> Callable[[Any], Any]:
  """The function from the arguments of a call to its result, which does all that the call does.

  Args:
    compiled: the function of arrays.
    leaves: the leaves of a call, for their Refs.
    sources: where each call finds the rest.
    call: the executable, if it is not the compiled function's own.
  """
  run, is_short = _bound(compiled, leaves, sources, call)
  # What was compiled ahead of time is called by JAX in Python, after which buffers are given up.
  # Where the user's Python runs in the middle of a call, JAX would make another error of Ctrl-C.
  if is_short and call is None and not compiled.careful:
    return run
  return lambda args: uninterrupted(lambda: run(args))


def _bound(
  compiled: Compiled, leaves: Sequence[Any], sources: Given | Sources, call: Any
) -> tuple[Callable[[Any], Any], bool]:
  """The function, and whether all that may not be left half-done is done in one step."""
  commit, items = compiled.commit, compiled.items
  exchange = functools.partial(
    _jax.exchange,
    call or compiled.call,
    compiled.cells(leaves),
    sources.picker(items),
    give=sources.giver(items) if items.given else None,
    may_wait=not compiled.careful,
  )
  variables = sources.reader([i for i, _ in commit.written])
  one_by_one = all(tree is ARRAY for _, tree in commit.written)
  store = functools.partial(_stored, variables) if commit.written and one_by_one else None
  result = commit.plain_result
  if result is not None and one_by_one:
    return exchange(result, store=store), True
  # Where nothing is written, `iter` might not ask for the call; callbacks are to run all the same.
  start = iter if compiled.written else _called
  run, objects, wanted = exchange(start, store=store), sources.objects(), commit.leaves
  read, now = sources.reader(wanted), _jax.trace_state()

  def whole(args: Any) -> Any:
    arrays = run(args)
    if not one_by_one:
      for variable, (_, tree) in zip(variables(args), commit.written, strict=True):
        variable._cell = tree.unflatten(islice(arrays, tree.num_leaves))
    found: list[Any] = [None] * commit.start
    for i, leaf in zip(wanted, read(args), strict=True):
      found[i] = leaf
    found += commit.make(arrays, now)
    return commit.build(found, objects())

  return whole, commit.is_quiet and one_by_one


def _stored(variables: Callable[[Any], list[Variable]], args: Any, arrays: Iterator) -> Iterator:
  """An iterator that stores arrays in lojax Variables as it is used up."""
  found = variables(args)
  return map(store_cell, found, zip(zip(arrays), [v._node[1] for v in found]))  # noqa: B905


def _called(arrays: Iterator) -> Iterator:
  return iter(list(arrays))


def _picker_of_few(indices: list[int]) -> Callable[[Any], Any]:
  if not indices:
    return lambda _: ()
  (index,) = indices
  return lambda args: (args[index],)


def _read_attribute(node: weakref.ref, key: Any) -> Any:
  return node().__dict__[key]  # pyright: ignore[reportOptionalMemberAccess]


def _weak(leaf: Any) -> Callable[[], Any]:
  return weakref.ref(leaf) if isinstance(leaf, Variable) else lambda: leaf
