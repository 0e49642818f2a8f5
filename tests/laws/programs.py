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


@jax.custom_vjp
def doubled(x):
  """The sine, with twice its derivative: a custom rule that gets lost shows in the gradient."""
  return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


@jax.custom_jvp
def tripled(x):
  """The sine, with three times its derivative."""
  return jnp.sin(x)


@tripled.defjvp
def _(primals, tangents):
  return jnp.sin(primals[0]), 3 * jnp.cos(primals[0]) * tangents[0]


# Simple steps: how each reads `x` and the state `s` (arrays), and what it gives back.
def _linear(x, s):
  return jnp.tanh(x * s["w"]), {}


def _read_stat(x, s):
  return x + 0.1 * s["stat"], {}


def _read_memory(x, s):
  return x + jnp.sin(s["memory"]), {}


def _read_count(x, s):
  return x * (1 + 0.1 * s["count"]), {}


def _custom_vjp(x, s):
  return doubled(x * s["w"]), {}


def _custom_jvp(x, s):
  return tripled(x + 0.1 * s["stat"]), {}


def _write_stat(x, s):
  return x, {"stat": 0.5 * s["stat"] + jnp.sin(x)}


def _write_memory(x, s):
  return x, {"memory": 0.5 * s["memory"] + s["count"] + 0.25}


def _write_count(x, s):
  return x, {"count": s["count"] + 1}


_STEPS = (
  _linear, _custom_vjp, _custom_jvp, _read_stat, _read_memory, _read_count,
  _write_stat, _write_memory, _write_count,
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
  kind = name.removeprefix("nnx_").removesuffix("_closure").removesuffix("_carry")
  if kind == "jit":
    return jax.jit(run)(carry)
  if kind == "checkify":
    return run(carry)
  if kind == "grad":  # a step along the gradient of the body
    s, dx = _gradient(lambda x: run((s, x)), x)
    return s, x + 0.1 * dx
  if kind == "vmap":  # two inputs, and the state that the first of them leaves
    s, xs = jax.vmap(lambda x: run((s, x)))(jnp.stack([x, -x]))
    return jax.tree.map(lambda a: a[0], s), xs.mean(0)
  if kind == "checkpoint":
    return jax.checkpoint(run)(carry)
  if kind == "scan":
    return jax.lax.scan(lambda carry, _: (run(carry), None), carry, None, length=3)[0]
  if kind == "fori":
    return jax.lax.fori_loop(0, 2, lambda i, carry: run(carry), carry)
  if kind == "cond":
    return jax.lax.cond(x.sum() > 0, *runs, carry)
  assert kind == "switch"
  return jax.lax.switch(s["count"] % 2, runs, carry)


def _gradient(run, x):
  def total(x):
    s, y = run(x)
    return jnp.sin(y).sum(), s

  dx, s = jax.grad(total, has_aux=True)(x)
  return s, dx


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
  by_argument = [lambda net, x, body=body: run_stateful(body, net, x) for body in bodies]
  by_closure = [lambda x, body=body: run_stateful(body, net, x) for body in bodies]
  transform = NNX if name.startswith("nnx_") else PLAIN
  return transform[name.removeprefix("nnx_")](by_argument, by_closure, net, x)


PLAIN = {
  "jit": lambda f, g, net, x: jax.jit(f[0])(net, x),
  "jit_closure": lambda f, g, net, x: jax.jit(g[0])(x),
  "checkpoint": lambda f, g, net, x: jax.checkpoint(f[0])(net, x),
  "checkpoint_closure": lambda f, g, net, x: jax.checkpoint(g[0])(x),
  "scan": lambda f, g, net, x: jax.lax.scan(lambda x, _: (g[0](x), None), x, None, length=3)[0],
  "fori": lambda f, g, net, x: jax.lax.fori_loop(0, 2, lambda i, x: g[0](x), x),
  "cond": lambda f, g, net, x: jax.lax.cond(x.sum() > 0, *g, x),
  "switch": lambda f, g, net, x: jax.lax.switch(net.count[...] % 2, g, x),
}


def _with_net(f):
  """A step whose carry holds the Module too."""

  def step(carry):
    net, x = carry
    return net, f(net, x)

  return step


NNX = {
  "jit": lambda f, g, net, x: nnx.jit(f[0])(net, x),
  "jit_closure": lambda f, g, net, x: nnx.jit(g[0])(x),
  "checkpoint": lambda f, g, net, x: nnx.remat(f[0])(net, x),
  "checkpoint_closure": lambda f, g, net, x: nnx.remat(g[0])(x),
  "scan": lambda f, g, net, x: nnx.scan(
    lambda x, net: f[0](net, x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3
  )(x, net),
  "scan_closure": lambda f, g, net, x: nnx.scan(
    g[0], in_axes=(nnx.Carry,), out_axes=nnx.Carry, length=3
  )(x),
  "scan_carry": lambda f, g, net, x: nnx.scan(
    _with_net(f[0]), in_axes=(nnx.Carry,), out_axes=nnx.Carry, length=3
  )((net, x))[1],
  "fori": lambda f, g, net, x: nnx.fori_loop(0, 2, lambda i, c: _with_net(f[0])(c), (net, x))[1],
  "fori_closure": lambda f, g, net, x: nnx.fori_loop(0, 2, lambda i, x: g[0](x), x),
  "checkify": lambda f, g, net, x: nnx.checkify(f[0])(net, x)[1],
  "grad": lambda f, g, net, x: x + 0.1 * nnx.grad(lambda x: jnp.sin(g[0](x)).sum())(x),
  "vmap": lambda f, g, net, x: nnx.vmap(f[0], in_axes=(None, 0), reduce={...: "first"})(
    net, jnp.stack([x, -x])
  ).mean(0),
  "vmap_closure": lambda f, g, net, x: nnx.vmap(g[0], reduce={...: "first"})(
    jnp.stack([x, -x])
  ).mean(0),
  "cond": lambda f, g, net, x: nnx.cond(x.sum() > 0, *f, net, x),
  "cond_closure": lambda f, g, net, x: nnx.cond(x.sum() > 0, *g, x),
  "switch": lambda f, g, net, x: nnx.switch(net.count % 2, f, net, x),
}

ONE_BODY = ("jit", "jit_closure", "checkpoint", "checkpoint_closure", "scan", "fori")
TWO_BODIES = ("cond", "switch")
NNX_ONE_BODY = tuple("nnx_" + name for name in NNX if not name.startswith(TWO_BODIES))
NNX_TWO_BODIES = tuple("nnx_" + name for name in NNX if name.startswith(TWO_BODIES))


def uses(program, names) -> bool:
  """Whether a program has a step of one of these sorts."""
  return any(name in names or any(uses(b, names) for b in bodies) for name, bodies in program)


def jax_drops_writes() -> bool:
  """Whether this JAX has a bug of 0.10: under a gradient, a loop inside a checkpoint inside a loop
  is removed, and with it what it writes, if its results do not depend on the writes."""
  ref = jax.new_ref(jnp.zeros((), jnp.int32), kind="no_grad_no_remat")

  def write(x, _):
    ref[...] += 1
    return x, None

  inner = jax.checkpoint(lambda x: jax.lax.scan(write, x, length=1)[0])
  jax.grad(lambda x: jax.lax.scan(lambda x, _: (inner(x), None), x, length=1)[0])(1.0)
  return int(ref[...]) == 0


def is_dropped(program, outside=()) -> bool:
  """Whether a program has a plain loop inside a checkpoint inside a loop; see above."""
  for name, bodies in program:
    kind = "loop" if "scan" in name or "fori" in name else name
    kind = "checkpoint" if "checkpoint" in kind else kind
    if name in ("scan", "fori") and outside[-1:] == ("checkpoint",):
      return True
    expected = "checkpoint" if outside else "loop"
    inside = (*outside, kind) if kind == expected and len(outside) < 2 else outside
    if any(is_dropped(body, inside) for body in bodies):
      return True
  return False


def programs(depth: int = 3, *, transforms: str = "plain") -> st.SearchStrategy:
  """Programs whose transforms nest up to `depth` deep.

  The transforms are `plain` ones, `straight` ones (plain, without branches), `nnx` ones, or `mixed`
  (`straight` and `nnx`).
  """
  simple = st.sampled_from(sorted(SIMPLE)).map(Step)
  ones = {"nnx": NNX_ONE_BODY, "mixed": ONE_BODY + NNX_ONE_BODY}.get(transforms, ONE_BODY)
  twos = {"plain": TWO_BODIES, "straight": ()}.get(transforms, NNX_TWO_BODIES)

  def block(inner):
    one = st.builds(lambda name, body: Step(name, (body,)), st.sampled_from(ones), inner)
    steps = [simple, simple, one, one, one]
    if twos:
      steps.append(st.builds(lambda n, a, b: Step(n, (a, b)), st.sampled_from(twos), inner, inner))
    steps = st.one_of(*steps)
    return st.lists(steps, min_size=1, max_size=3).map(tuple)

  body = st.lists(simple, min_size=1, max_size=3).map(tuple)
  for _ in range(depth):
    body = block(body)
  return body
