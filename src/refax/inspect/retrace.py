"""nnx.explain_retrace: why JAX traces a function again.

Each run of a function's Python code inside `jit` is a trace. What a trace depends on is described:
the types of arrays, static values, the structure of objects, the settings of JAX. The difference to
the trace before is the reason.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax

from refax import _jax, config
from refax.core.graphdef import LEAF, NODE, REGION, STATIC
from refax.core.variable import Variable
from refax.errors import RetraceWarning
from refax.transforms.jit import leaf_name
from refax.transforms.lift import Inputs
from refax.typing import Path


def explain_retrace(fn: Callable | None = None, *, after: int = 1) -> Any:
  """A function that says why, when JAX traces it again.

  Args:
    fn: a function that is to be compiled: `nnx.jit(nnx.explain_retrace(step))`, also with `jax.jit`
      or any other transform; not one that is compiled already. Without it, a decorator is returned.
    after: how many traces are expected, and not spoken of.

  Returns:
    The function. Its attribute `traces` says how often it was traced, `reasons` what was said.

  Warns:
    RetraceWarning: it names the argument, or the attribute of an object, and what it was and is.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> double = nnx.explain_retrace(lambda x: x * 2)
  >>> step = nnx.jit(double)
  >>> y = step(jnp.ones(3)), step(jnp.ones(3)), step(jnp.ones(4))
  >>> double.traces, double.reasons
  (2, ['x: float32[3] -> float32[4]'])
  """
  if fn is None:
    return functools.partial(explain_retrace, after=after)
  function, seen = fn, Traces()

  @functools.wraps(fn)
  def explained(*args: Any, **kwargs: Any) -> Any:
    if not _jax.no_trace_active():
      reason = seen.add(function, args, kwargs)
      explainer.traces += 1
      if reason is not None and explainer.traces > after:
        explainer.reasons.append(reason)
        name = getattr(function, "__name__", type(function).__name__)
        text = RetraceWarning.again(name, explainer.traces, reason)
        warnings.warn_explicit(text, RetraceWarning, *_caller())
    return function(*args, **kwargs)

  explainer: Any = explained
  explainer.traces, explainer.reasons = 0, []
  return explained


def _caller() -> tuple[str, int]:
  """The file and line of the user's code that made JAX trace."""
  frame: Any = sys._getframe(1)
  while frame.f_back is not None and _is_ours(frame):
    frame = frame.f_back
  return frame.f_code.co_filename, frame.f_lineno


def _is_ours(frame: Any) -> bool:
  name = frame.f_globals.get("__name__", "")
  return name.startswith(("refax.", "jax.")) or name == "contextlib"


class Traces:
  """What the traces of one function depended on."""

  def __init__(self):
    self._seen: list[dict[str, str]] = []

  def add(self, fn: Callable, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Another trace: the difference to the one that is most like it; None for the first."""
    now = description(fn, args, kwargs)
    lots = [difference(before, now) for before in self._seen]
    self._seen.append(now)
    if not lots:
      return None
    nearest = min(reversed(lots), key=len)
    if not nearest:
      return (
        "nothing that the arguments show: a function that is made anew for each call, an "
        "object that it reaches by closure, or caches that were cleared"
      )
    shown = nearest[:6] + ([f"and {len(nearest) - 6} more"] if len(nearest) > 6 else [])
    return "; ".join(shown)


def description(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, str]:
  """All that a trace depends on, by name."""
  inputs = Inputs.of(args, kwargs)
  found: dict[str, str] = {}
  places: dict[Any, str] = {}
  for path, entry in inputs.graphdef.walk():
    if len(path) < 2:
      continue
    name = leaf_name(fn, path)
    if entry[0] == STATIC:
      found[name] = _short(entry[2])
    elif entry[0] == NODE:
      found[name] = inputs.graphdef.nodes[entry[1]][0].__name__ + _shared(places, entry, name)
    elif entry[0] == LEAF:
      found[name] = _leaf(inputs.leaves[entry[1]]) + _shared(places, entry, name)
    elif entry[0] == REGION:
      found[name] = f"a {type(_at((args, kwargs), path)).__name__}"
  found["the mode of new Variables"] = "hijax" if config.using_hijax() else "lojax"
  for name in ("jax_enable_x64", "jax_default_matmul_precision", "jax_debug_nans"):
    found[f"jax.config.{name}"] = str(_jax.flag(name))
  found["the mesh"] = str(_jax.context_mesh())
  return found


def _shared(places: dict[Any, str], entry: tuple, name: str) -> str:
  first = places.setdefault(entry, name)
  return "" if first == name else f" (the same as {first})"


def _at(value: Any, path: Path) -> Any:
  for step in path:
    try:
      value = value[step]
    except (TypeError, KeyError, IndexError):
      value = getattr(value, str(step), None)
  return value


def _leaf(leaf: Any) -> str:
  if isinstance(leaf, Variable):
    kind = type(leaf).__name__ + ("" if leaf.is_hijax else ", lojax")
    return f"{kind} {', '.join(map(_type, jax.tree.leaves(leaf.get_raw_value())))}"
  return _type(leaf)


def _type(x: Any) -> str:
  if not hasattr(x, "dtype"):
    return _short(x)
  shape = ",".join(map(str, x.shape))
  aval = getattr(x, "aval", None)
  weak = " (weak type: of a Python number)" if getattr(aval, "weak_type", False) else ""
  partition = getattr(getattr(aval, "sharding", None), "spec", None) or ()
  spec = f" {partition}" if any(partition) else ""
  return f"{x.dtype}[{shape}]{weak}{spec}"


def _short(x: Any) -> str:
  text = f"{x!r}"
  return text if len(text) <= 60 else f"{text[:57]}..."


def difference(before: dict[str, str], now: dict[str, str]) -> list[str]:
  """What has changed from one description to another, in words."""
  changed = [f"{k}: {before[k]} -> {x}" for k, x in now.items() if k in before and before[k] != x]
  new = [f"{name}: new, {x}" for name, x in now.items() if name not in before]
  gone = [f"{name}: gone, was {x}" for name, x in before.items() if name not in now]
  return [*changed, *new, *gone]
