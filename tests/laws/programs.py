"""Programs of reads and writes under nested transforms, run in two ways.

A program is a tuple of steps on a vector `x` and a small state. `run_stateful` runs it on a Module,
whose Variables are written in place; `run_functional` on a dict of arrays that every transform
takes and returns by hand. The law is that both agree: outputs, gradients, final state.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

from refax import nnx

SIZE = 3
covered: Counter[str] = Counter()
"""How often each sort of step was run; the tests print it."""


class Step(NamedTuple):
  """One step; `bodies` are the sub-programs of a transform."""

  name: str
  bodies: tuple = ()


class Net(nnx.Module):
  """The state: a parameter, a detached statistic, a plain memory, and a counter."""

  def __init__(self, state: dict[str, Any]):
    self.w = nnx.Param(state["w"])
    self.stat = nnx.BatchStat(state["stat"])
    self.memory = nnx.Variable(state["memory"])
    self.count = nnx.Variable(state["count"])

  def values(self) -> dict[str, jax.Array]:
    return {name: getattr(self, name)[...] for name in ("w", "stat", "memory", "count")}


def initial_state(key: jax.Array, lead: tuple[int, ...] = ()) -> dict[str, jax.Array]:
  k = jax.random.split(key, 3)
  return {
    "w": jax.random.normal(k[0], (*lead, SIZE)),
    "stat": jax.random.normal(k[1], (*lead, SIZE)),
    "memory": jax.random.normal(k[2], lead),
    "count": jnp.zeros(lead, jnp.int32),
  }


# Simple steps: how each reads `x` and the state `s` (arrays), and what it gives back.
def _linear(x, s):
  return jnp.tanh(x * s["w"]), {}


def _read_stat(x, s):
  return x + 0.1 * s["stat"], {}


def _read_memory(x, s):
  return x + jnp.sin(s["memory"]), {}


def _read_count(x, s):
  return x * (1 + 0.1 * s["count"]), {}


def _write_stat(x, s):
  return x, {"stat": 0.5 * s["stat"] + jnp.sin(x)}


def _write_memory(x, s):
  return x, {"memory": 0.5 * s["memory"] + s["count"] + 0.25}


def _write_count(x, s):
  return x, {"count": s["count"] + 1}


_STEPS = (
  _linear, _read_stat, _read_memory, _read_count, _write_stat, _write_memory, _write_count
)  # fmt: skip
SIMPLE = {f.__name__[1:]: f for f in _STEPS}
DETACHED = ("stat", "count")


def simple_functional(name, x, s):
  x, written = SIMPLE[name](x, s)
  detached = {k: jax.lax.stop_gradient(v) if k in DETACHED else v for k, v in written.items()}
  return x, s | detached


class _Reader:
  """Reads a Variable when it is asked for, as a layer does."""

  def __init__(self, net):
    self.net = net

  def __getitem__(self, name):
    return getattr(self.net, name)[...]


def simple_stateful(name, net, x):
  x, written = SIMPLE[name](x, _Reader(net))
  for key, value in written.items():
    getattr(net, key)[...] = value
  return x


def run_functional(program, s, x):
  """The program by hand: (state, x) -> (state, x)."""
  for name, bodies in program:
    if name in SIMPLE:
      x, s = simple_functional(name, x, s)
    else:
      s, x = _transform_functional(name, bodies, s, x)
  return s, x


def _transform_functional(name, bodies, s, x):
  runs = [lambda carry, body=body: run_functional(body, *carry) for body in bodies]
  run, carry = runs[0], (s, x)
  if name in ("jit", "jit_closure"):
    return jax.jit(run)(carry)
  if name in ("checkpoint", "checkpoint_closure"):
    return jax.checkpoint(run)(carry)
  if name == "scan":
    return jax.lax.scan(lambda carry, _: (run(carry), None), carry, None, length=3)[0]
  if name == "fori":
    return jax.lax.fori_loop(0, 2, lambda i, carry: run(carry), carry)
  if name == "cond":
    return jax.lax.cond(x.sum() > 0, *runs, carry)
  assert name == "switch"
  return jax.lax.switch(s["count"] % 2, runs, carry)


def run_stateful(program, net, x):
  """The program on a Module: x -> x; the state is written in place."""
  for name, bodies in program:
    covered[name] += 1
    if name in SIMPLE:
      x = simple_stateful(name, net, x)
    else:
      x = _transform_stateful(name, bodies, net, x)
  return x


def _transform_stateful(name, bodies, net, x):
  runs = [lambda x, body=body: run_stateful(body, net, x) for body in bodies]  # net by closure
  run = runs[0]
  if name == "jit":
    return jax.jit(lambda net, x: run_stateful(bodies[0], net, x))(net, x)
  if name == "jit_closure":
    return jax.jit(run)(x)
  if name == "checkpoint":
    return jax.checkpoint(lambda net, x: run_stateful(bodies[0], net, x))(net, x)
  if name == "checkpoint_closure":
    return jax.checkpoint(run)(x)
  if name == "scan":
    return jax.lax.scan(lambda x, _: (run(x), None), x, None, length=3)[0]
  if name == "fori":
    return jax.lax.fori_loop(0, 2, lambda i, x: run(x), x)
  if name == "cond":
    return jax.lax.cond(x.sum() > 0, *runs, x)
  assert name == "switch"
  return jax.lax.switch(net.count[...] % 2, runs, x)


ONE_BODY = ("jit", "jit_closure", "checkpoint", "checkpoint_closure", "scan", "fori")
TWO_BODIES = ("cond", "switch")


def programs(depth: int = 3) -> st.SearchStrategy:
  """Programs whose transforms nest up to `depth` deep."""
  simple = st.sampled_from(sorted(SIMPLE)).map(Step)

  def block(inner):
    one = st.builds(
      lambda name, body: Step(name, (body,)),
      st.sampled_from(ONE_BODY),
      inner,
    )
    two = st.builds(
      lambda name, a, b: Step(name, (a, b)),
      st.sampled_from(TWO_BODIES),
      inner,
      inner,
    )
    # Branches are rarer: JAX refuses state in them under grad and vmap, and that proves little.
    steps = st.one_of(simple, simple, one, one, one, two)
    return st.lists(steps, min_size=1, max_size=3).map(tuple)

  body = st.lists(simple, min_size=1, max_size=3).map(tuple)
  for _ in range(depth):
    body = block(body)
  return body
