"""What `nnx.jit` hands to `jax.jit`: the static half of a call, and the function that is traced."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from refax import _jax
from refax.core.graphdef import GraphDef
from refax.core.observe import compiled_as_is
from refax.core.variable import Variable
from refax.transforms.commit import Outputs
from refax.transforms.lift import Frame


class Spec(NamedTuple):
  """The static half of a call: what a trace is found by, besides the types of the leaves."""

  graphdef: GraphDef
  static: tuple
  """(key, kind, value) of each static argument; the key is a position or a keyword."""
  given: tuple[bool, ...]
  """For each leaf, whether it is given away."""
  version: int
  """The number of what the function reaches by closure."""
  marks: tuple[tuple[bool, bool], ...]
  """See `marks_of`."""


class Static:
  """The static argument of the inner `jax.jit`, equal to itself only.

  JAX compares such arguments inside C++, and turns what is raised there (Ctrl-C) into a ValueError:
  a comparison in Python must not happen there.
  """

  __slots__ = ("__weakref__", "is_compiled", "spec")

  def __init__(self, spec: Spec, is_compiled: bool):
    self.spec = spec
    self.is_compiled = is_compiled
    """Whether the trace is compiled as it is, and never differentiated."""


def marks_of(leaves: Sequence[Any], reached: frozenset[int]) -> tuple[tuple[bool, bool], ...]:
  """What a trace refuses besides: Variables that are reached by closure too, or differentiated."""
  variables = [x for x in leaves if isinstance(x, Variable)]
  is_reached = lambda v: any(id(x) in reached for x in jax.tree.leaves(v._cell))
  marks = tuple((bool(reached) and is_reached(v), bool(v._def.selected)) for v in variables)
  return marks if any(map(any, marks)) else ()


def run_traced(
  function: Callable[[], Callable],
  look: Callable[["Spec"], None],
  static: Static,
  kept: tuple,
  donated: tuple,
) -> Outputs:
  """What is traced: leaves in, outputs out; Variables in hijax storage are written in place.

  Args:
    function: to the user's function.
    look: is told of each trace.
    static: the static half of the call.
    kept: the leaves that are not given away,
    donated: and those that are.
  """
  look(spec := static.spec)
  parts = iter(kept), iter(donated)
  frame = Frame(spec.graphdef, [next(parts[d]) for d in spec.given])
  args, kwargs = frame.args
  args = list(args)
  for key, _, value in spec.static:
    if isinstance(key, int):
      args[key] = value
    else:
      kwargs[key] = value
  with contextlib.ExitStack() as stack:
    if spec.version:
      stack.enter_context(_version(spec.version))
    if static.is_compiled:
      refs = filter(_jax.is_ref, jax.tree.leaves(frame.leaves))
      stack.enter_context(compiled_as_is(refs))
    return frame.collect(function()(*args, **kwargs))


_version = jax.make_user_context(default_value=0)
"""What is reached by closure, by number. It is part of the key of all that JAX keeps of a trace: a
loop's body that is the same function as before has another model in it now."""
