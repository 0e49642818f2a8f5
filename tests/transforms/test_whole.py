"""What a transform writes to arguments and to what is reached by closure: all of it, or nothing."""

import signal

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from refax import nnx
from refax.core import storage


def custom(f, v, x):
  rule = nnx.custom_vjp(f)
  rule.defvjp(lambda v, x: (f(v, x), None), lambda _, g: (g, g))
  return rule(v, x)


def shard(f, v, x):
  mesh, spec = jax.make_mesh((1,), ("data",)), jax.P()
  return nnx.shard_map(f, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(v, x)


WAYS = {
  "fori_loop": lambda f, v, x: nnx.fori_loop(0, 1, lambda _, c: (c[0], f(*c)), (v, x)),
  "while_loop": lambda f, v, x: nnx.while_loop(
    lambda c: c[1].sum() < 1, lambda c: (c[0], f(*c)), (v, x)
  ),
  "scan": lambda f, v, x: nnx.scan(f, in_axes=(None, 0), out_axes=0)(v, x[None]),
  "cond": lambda f, v, x: nnx.cond(True, f, f, v, x),
  "vmap": lambda f, v, x: nnx.vmap(f, in_axes=(None, None), axis_size=2)(v, x),
  "custom_vjp": custom,
  "checkify": lambda f, v, x: nnx.checkify(f, errors=checkify.nan_checks)(v, x),
  "shard_map": shard,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_all_is_written_though_a_signal_comes(way, monkeypatch):
  class Late(Exception):
    pass

  def late(*_):
    raise Late

  def ringing(*args):
    if not isinstance(args[1], jax.core.Tracer):
      rings.append(None)
      signal.raise_signal(signal.SIGUSR1)
    return write_ref(*args)

  rings, write_ref, counts = [], storage.write_ref, [nnx.Variable(0.0) for _ in range(4)]

  def step(v, x):
    for count in (*counts, v):
      count[...] = count[...] + 1
    return x + 1

  argument, x = nnx.Variable(0.0), jnp.zeros(3)
  monkeypatch.setattr(storage, "write_ref", ringing)
  old = signal.signal(signal.SIGUSR1, late)
  try:
    way(step, argument, x)
  except Late:
    pass
  finally:
    signal.signal(signal.SIGUSR1, old)
  assert len(rings) == 5
  assert [float(count[...]) for count in (*counts, argument)] in ([1.0] * 5, [0.0] * 5)
