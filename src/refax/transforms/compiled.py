"""One compiled call of nnx.jit: buffers out of the cells, one call of arrays, buffers back.

A Ref among the arguments of `jax.jit` costs 13-18 us a call, for it leaves JAX's C++ path. Here the
trace of a call is compiled as a function of arrays: state that is written is donated and returned,
state that is only read is neither. State that the function reaches by closure is treated alike.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.transforms.lift import Inputs, Outputs, result_of


class Retraced(Exception):
  """JAX traces again (another context, sharding, device): this call needs another executable."""


class Compiled:
  """The function of arrays for one structure of arguments.

  Args:
    inputs: the arguments of a call.
    leaves: their Variables and arrays, `(kept, donated)`.
    traced: the trace of the function on them, by `jax.jit(...).trace`.
    jitted: the function of leaves that was traced.
    careful: keep what is written until the call has succeeded, for it may fail while it runs.
    picks: where arrays are passed as the arguments that they are, and not as flat leaves, what the
      user calls these arguments.
    names: what the user calls each flat leaf.
  """

  def __init__(
    self,
    inputs: Inputs,
    leaves: tuple[tuple, tuple],
    traced: Any,
    jitted: Callable[..., Outputs],
    *,
    careful: bool,
    picks: list[str] | None,
    names: Callable[[], list[str]],
  ):
    flat, self._tree = jax.tree.flatten(leaves)
    self._closed, self._jitted = traced.jaxpr, jitted
    jaxpr, outputs = traced.jaxpr.jaxpr, traced.out_info
    self.outputs: Outputs = outputs
    self._out_tree = jax.tree.structure(outputs)
    self._out_count = self._out_tree.num_leaves
    self.picks = picks
    self.closures = {i: c for i, c in enumerate(traced.jaxpr.consts) if _jax.is_ref(c)}
    self._donates = bool(jax.tree.leaves(leaves[1]))
    self._slots: list[Any] = [i for i, x in enumerate(flat) if _jax.is_ref(x)]
    self._kept_count = len(jax.tree.leaves(leaves[0]))
    _, writes = _jax.ref_effects(jaxpr)
    used = _jax.used_vars(jaxpr)
    vars_: dict[Any, Any] = {i: jaxpr.invars[i] for i in self._slots}
    vars_ |= {("closure", i): jaxpr.constvars[i] for i in self.closures}
    self.written = [key for key, var in vars_.items() if var in writes]
    self.read = [key for key, var in vars_.items() if var in used and var not in writes]
    self._types = {key: (ref.shape, ref.dtype) for key, ref in self._cells_by_key(flat).items()}
    self.careful = careful or not _jax.only_refs_are_effects(traced.jaxpr)
    self.result = self._plain_result(inputs)
    self._names = names
    self._compile(traced.fun_name, flat)

  def _cells_by_key(self, flat: Sequence[Any]) -> dict[Any, jax.Ref]:
    found: dict[Any, Any] = {i: flat[i] for i in self._slots}
    return found | {("closure", i): ref for i, ref in self.closures.items()}

  def cells(self, flat: Sequence[Any]) -> tuple[list[jax.Ref], list[jax.Ref]]:
    """The Refs that a call writes, and those that it only reads, among these leaves."""
    refs = self._cells_by_key(flat)
    return [refs[key] for key in self.written], [refs[key] for key in self.read]

  def arrays(self, flat: Sequence[Any]) -> tuple[tuple, tuple]:
    """The arrays among these leaves: those that are donated, and the others."""
    refs, count = set(self._slots), self._kept_count
    kept = tuple(x for i, x in enumerate(flat[:count]) if i not in refs)
    return tuple(flat[count:]), kept

  def _compile(self, name: str, flat: list[Any]) -> None:
    # A Ref stays where it is; for what a function returns, the compiler would choose.
    places = [_jax.peek_cell(ref).sharding for ref in self.cells(flat)[0]]
    call: Any = self._function()
    call = _pure(call) if _jax.checks_results() else call
    call.__name__ = call.__qualname__ = name  # what profiles and errors show
    self.jitted: Any = jax.jit(
      call,
      donate_argnums=() if self.careful else 0,
      donate_argnames=() if self.careful or not self._donates else "given",
      out_shardings=(*places, *[None] * self._out_count),
    )
    self.call: Any = _settled(self.jitted, call) if self.careful else self.jitted

  def _function(self) -> Any:
    """The call as a function of arrays."""
    traces: list[None] = []

    def call(written, arrays, read=(), *, given=()):
      if traces and not self.careful:
        raise Retraced
      traces.append(None)
      values = dict(zip([*self.written, *self.read], [*written, *read], strict=True))
      # A cell that is neither read nor written stays out: nothing asks for its value.
      refs = {
        key: _jax.new_cell(values[key] if key in values else jnp.zeros(shape, dtype))
        for key, (shape, dtype) in self._types.items()
      }
      kept = iter(jax.tree.leaves(arrays))
      flat = [refs[i] if i in refs else next(kept) for i in range(self._kept_count)]
      results = self._run(refs, [*flat, *given])
      return (*(refs[key][...] for key in self.written), *results)

    return call

  def _run(self, refs: dict[Any, jax.Ref], flat: list[Any]) -> list[Any]:
    """The function on Refs like the caller's, of which JAX has the trace already."""
    if not (self.closures or self.careful):
      return jax.tree.leaves(self._jitted(*self._tree.unflatten(flat)))
    consts = [refs.get(("closure", i), c) for i, c in enumerate(self._closed.consts)]
    return _jax.jaxpr_as_fun(self._closed.replace(consts=consts))(*flat)

  def _plain_result(self, inputs: Inputs) -> Callable[[Iterator], Any] | None:
    """From the new arrays to the result, where a call returns arrays and changes no structure."""
    spec = self.outputs.spec
    if spec.redefined or spec.written or spec.graphdef.nodes != inputs.graphdef.nodes:
      return None
    return result_of(self.outputs)

  def run(self, flat: Sequence[Any], arrays: tuple[Any, Any], call: Any = None) -> Outputs:
    """Make the call on the Refs among these leaves; what it writes is installed.

    Args:
      flat: the leaves of a call, its Refs and arrays.
      arrays: the arrays that are donated, and the others.
      call: the executable, if it is not this one's own.
    """
    call = call or self.call
    if self._donates:
      call = functools.partial(call, given=arrays[0])
    run = _jax.exchange(call, *self.cells(flat), lambda x: x, list)
    try:
      return self._out_tree.unflatten(run(arrays[1]))
    except (ValueError, TypeError) as error:
      raise self.renamed(error) from None

  def lower(self, flat: Sequence[Any]) -> Any:
    """The lowered computation, by `jax.jit(...).lower`."""
    written, read = ([_jax.peek_cell(ref) for ref in refs] for refs in self.cells(flat))
    given, arrays = self.arrays(flat)
    rest = (read,) if read else ()
    return self.jitted.lower(written, arrays, *rest, **({"given": given} if self._donates else {}))

  def renamed(self, error: Exception) -> Exception:
    """An error of JAX that names the user's arguments, and not those of the compiled function."""
    text = _OURS.sub(self._named, str(error))
    return error if text == str(error) else type(error)(text)

  def _named(self, match: re.Match) -> str:
    sort, index = match[1], None if match[2] is None else int(match[2])
    if sort == "arrays" and self.picks is not None:
      if len(self.picks) == 1:  # it is passed without a tuple
        return self.picks[0] + ("" if index is None else f"[{index}]")
      return match[0] if index is None else self.picks[index]
    names, refs = self._names(), set(self._slots)
    kept = [i for i in range(self._kept_count) if i not in refs]
    keys = {"written": self.written, "read": self.read, "arrays": kept}
    keys["given"] = list(range(self._kept_count, len(names)))
    key = None if index is None or index >= len(keys[sort]) else keys[sort][index]
    return names[key] if isinstance(key, int) else "a Variable that came by closure"


_OURS = re.compile(r"(?<=argument )(written|given|read|arrays)(?:\[(\d+)\])?")


def _pure(call: Callable) -> Callable:
  """The same function without Refs inside.

  `jax_debug_nans` runs a function once more, eagerly, to find where a value has become infinite;
  Refs in it would give up the buffers of the caller.
  """

  def pure(*args: Any, **kwargs: Any) -> Any:
    closed, out = jax.make_jaxpr(call, return_shape=True)(*args, **kwargs)
    run = _jax.jaxpr_as_fun(_jax.discharge(closed, differentiable=False))
    return jax.tree.unflatten(jax.tree.structure(out), run(*jax.tree.leaves((args, kwargs))))

  return pure


def _settled(jitted: Any, call: Callable) -> Callable:
  """A compiled function that returns when nothing of it can fail any more.

  JAX does not always look for NaNs in what a function returns that it has called before (its C++
  path may skip it): that is done here. The function is then run eagerly, where JAX says which
  operation it was.
  """

  def settled(*args: Any, **kwargs: Any) -> Any:
    out = jax.block_until_ready(jitted(*args, **kwargs))
    jax.effects_barrier()
    if not all(map(_is_allowed, out)):
      call(*args, **kwargs)
      raise FloatingPointError(f"invalid value (nan or inf) in what {jitted.__name__} returns")
    return out

  return settled


def _is_allowed(x: jax.Array) -> bool:
  """Whether JAX's debug flags let an array pass."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return True
  with jax.debug_nans(False), jax.debug_infs(False):
    nan, inf = bool(jnp.isnan(x).any()), bool(jnp.isinf(x).any())
  return not (nan and _jax.flag("jax_debug_nans")) and not (inf and _jax.flag("jax_debug_infs"))
