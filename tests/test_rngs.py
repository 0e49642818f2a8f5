"""Rngs and RngStream: streams of keys, never the same key twice, the same keys as Flax NNX."""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import MissingRngError, RngKeyError, SharedWriteError
from refax.rngs import INITIALIZERS, SAMPLERS


def bits(key):
  return np.asarray(jax.random.key_data(key)).tolist()


def keys(stream, n=3):
  return [bits(stream()) for _ in range(n)]


def folded(seed, *counts):
  return [bits(jax.random.fold_in(jax.random.key(seed), i)) for i in counts]


# streams
def test_the_nth_key_is_the_seed_folded_with_n():
  rngs = nnx.Rngs(7, params=3)
  assert keys(rngs) == folded(7, 0, 1, 2)
  assert keys(rngs.params, 2) == folded(3, 0, 1)
  assert keys(rngs["params"], 1) == folded(3, 2)
  assert int(rngs.default.count) == 3 and int(rngs.params.count) == 3
  assert rngs.params.count.dtype == jnp.uint32 and rngs.params.key.tag == "params"


def test_a_name_that_was_not_given_falls_back_to_default():
  rngs = nnx.Rngs(7, params=3)
  assert bits(rngs.dropout()) == folded(7, 0)[0] and bits(rngs["noise"]()) == folded(7, 1)[0]
  assert bits(rngs()) == folded(7, 2)[0]
  assert "dropout" not in rngs and "default" in rngs and list(rngs) == ["default", "params"]
  assert len(rngs) == 2 and dict(rngs.items())["params"] is rngs.params


@pytest.mark.parametrize(
  "access", [lambda r: r.dropout, lambda r: r["dropout"], lambda r: r.dropout.normal((2,))]
)
def test_a_missing_stream_without_default_is_an_error_that_says_what_there_is(access):
  with pytest.raises(MissingRngError) as error:
    access(nnx.Rngs(params=0, noise=1))
  assert error.value.args[0] == (
    "no random stream 'dropout'\n"
    "  got: Rngs with the streams noise, params\n"
    "  fix: nnx.Rngs(0) for a default stream, or nnx.Rngs(dropout=0)"
  )
  assert isinstance(error.value, AttributeError) and isinstance(error.value, KeyError)


def test_calling_rngs_without_default_is_an_error():
  with pytest.raises(MissingRngError, match="no random stream 'default'"):
    nnx.Rngs(params=0)()
  with pytest.raises(MissingRngError, match=r"streams \(none\)"):
    nnx.Rngs().params


SEEDS = {
  "int": lambda: 7,
  "numpy int": lambda: np.int32(7),
  "jax int": lambda: jnp.asarray(7),
  "key": lambda: jax.random.key(7),
  "raw key": lambda: jax.random.PRNGKey(7),
  "variable": lambda: nnx.Variable(jax.random.key(7)),
  "stream key": lambda: nnx.RngStream(7, tag="x").key,
}


@pytest.mark.parametrize("name", SEEDS)
def test_any_sort_of_seed_starts_the_same_stream(name):
  assert keys(nnx.Rngs(SEEDS[name]())) == folded(7, 0, 1, 2)
  assert keys(nnx.Rngs(params=SEEDS[name]()).params) == folded(7, 0, 1, 2)
  assert keys(nnx.Rngs({"params": SEEDS[name]()}).params) == folded(7, 0, 1, 2)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_any_implementation_of_keys_is_kept(impl):
  key = jax.random.key(7, impl=impl)
  rngs = nnx.Rngs(key)
  assert rngs().dtype == key.dtype and rngs.fork(split=2).default.key.dtype == key.dtype
  twin = pickle.loads(pickle.dumps(rngs))
  assert keys(twin) == keys(copy.deepcopy(rngs)) == keys(rngs)


BAD = ["seed", 1.5, jnp.ones(2), None, nnx.Rngs(0), nnx.Rngs(a=0), [1]]


@pytest.mark.parametrize(
  "bad", BAD, ids=["str", "float", "floats", "none", "rngs", "named", "list"]
)
def test_what_is_neither_seed_nor_key_is_refused(bad):
  with pytest.raises(RngKeyError) as error:
    nnx.Rngs(params=bad)
  message = error.value.args[0]
  assert message.startswith("a random stream starts from a seed or a PRNG key\n  at:  params\n")
  assert message.endswith("  fix: pass an int, or jax.random.key(seed)")


@pytest.mark.filterwarnings("ignore:The .split. argument:DeprecationWarning")
def test_streams_are_the_same_as_flaxs():
  flax = pytest.importorskip("flax.nnx", reason="flax is the oracle here")
  for make in (
    lambda lib: lib.Rngs(3, params=5),
    lambda lib: lib.Rngs(jax.random.key(3), params=5).fork(),
    lambda lib: lib.Rngs(3, params=5).fork(split={"params": 4, ...: None}),
    lambda lib: lib.Rngs(3, params=5).fork(split=4),
    lambda lib: lib.Rngs(3, params=5).split((2, 2)),
    lambda lib: lib.Rngs(3, params=5).broadcast(3),
  ):
    got, want = make(nnx), make(flax)
    assert sorted(got) == sorted(want)
    for name in got:
      assert bits(got[name].key[...]) == bits(want[name].key[...])
      if got[name].key.shape == ():
        assert keys(got[name]) == keys(want[name])
  got, want = nnx.Rngs(0), flax.Rngs(0)
  for name in ("normal", "uniform", "bernoulli", "truncated_normal"):
    args = (-1, 1, (3,)) if name == "truncated_normal" else (0.5, (3,)) * (name == "bernoulli")
    args = args or ((3,),)
    np.testing.assert_array_equal(getattr(got, name)(*args), getattr(want, name)(*args))


# split, fork, broadcast
def test_split_gives_an_axis_of_different_keys():
  rngs = nnx.Rngs(0, params=1).split(4)
  assert rngs.params.key.shape == rngs.default.count.shape == (4,)
  flat = bits(rngs.params.key[...])
  assert len({tuple(k) for k in flat}) == 4
  assert nnx.Rngs(0).split((2, 3)).default.key.shape == (2, 3)


def test_split_by_filter_leaves_the_others_the_same_stream():
  rngs = nnx.Rngs(params=0, dropout=1, noise=2)
  used = [keys(rngs.dropout, 2), keys(rngs.params, 2)]
  for split in (rngs.split, lambda k: rngs.broadcast(k)):
    part = split({"params": 4, "noise": (2, 2), ...: None})
    assert part.params.key.shape == (4,) and part.noise.key.shape == (2, 2)
    fresh = keys(part.dropout, 2) + keys(rngs.dropout, 2)
    assert not any(k in used[0] for k in fresh) and len({tuple(k) for k in fresh}) == 4
    used[0] += fresh


def test_a_fork_is_a_stream_of_its_own():
  rngs = nnx.Rngs(0, params=1)
  fork = rngs.fork()
  assert int(rngs.params.count) == 1 and int(fork.params.count) == 0
  seen = keys(fork.params) + keys(rngs.params)
  assert len({tuple(k) for k in seen}) == 6
  assert rngs.params.fork(split=3).key.shape == (3,)


def test_broadcast_gives_the_same_new_key_everywhere():
  rngs = nnx.Rngs(0)
  b = rngs.broadcast((2, 2))
  assert b.default.key.shape == (2, 2) and int(rngs.default.count) == 1
  assert bits(b.default.key[...]) == [[folded(0, 0)[0]] * 2] * 2
  assert rngs.default.broadcast(3).key.shape == (3,)


def test_a_stream_given_to_other_rngs_gives_no_key_twice():
  a = nnx.Rngs(0, params=1)
  seen = keys(a.params, 2)
  b, c = nnx.Rngs(params=a.params), nnx.Rngs(dropout=a.params)
  seen += keys(b.params, 2) + keys(c.dropout, 2) + keys(a.params, 2)
  assert len({tuple(k) for k in seen}) == len(seen)


# under transforms
def test_streams_advance_under_plain_jit():
  rngs = nnx.Rngs(0, dropout=1)
  draw = jax.jit(lambda rngs: (rngs(), rngs.dropout()))
  got = [bits(draw(rngs)[i]) for i in (0, 1)]
  assert got[0] == folded(0, 0)[0] and got[1] == folded(1, 1)[0]
  assert keys(rngs, 1) == folded(0, 2)
  by_closure = jax.jit(lambda: rngs())
  assert bits(by_closure()) == folded(0, 3)[0] and bits(by_closure()) == folded(0, 4)[0]


def test_streams_advance_under_plain_vmap_and_scan():
  rngs = nnx.Rngs(0).fork(split=3)
  want = [bits(jax.random.fold_in(k, 0)) for k in rngs.default.key[...]]
  assert bits(jax.vmap(lambda r: r())(rngs)) == want
  assert rngs.default.count[...].tolist() == [1, 1, 1]

  one = nnx.Rngs(0)
  _, got = jax.lax.scan(lambda c, _: (c, one()), 0, None, length=3)
  assert bits(got) == folded(0, 0, 1, 2) and int(one.default.count) == 3
  _, got = jax.lax.scan(lambda c, r: (c, r()), 0, nnx.Rngs(0).fork(split=3))
  assert bits(got) == want


def test_one_stream_for_a_whole_batch_is_refused_with_what_to_do():
  rngs = nnx.Rngs(0)
  with pytest.raises(SharedWriteError, match=r"for Rngs: rngs\.split\(n\)"):
    jax.vmap(lambda x: x * jax.random.normal(rngs.fork()(), ()) + rngs.default.count.set_value(
      x.astype(jnp.uint32)
    ))(jnp.arange(3.0))  # fmt: skip


def test_streams_advance_under_nnx_jit_and_nnx_grad():
  class Net(nnx.Module):
    def __init__(self):
      self.w, self.rngs = nnx.Param(2.0), nnx.Rngs(0)

  loss = lambda net: (net.w * jax.random.normal(net.rngs(), ())) ** 1
  for step in (nnx.grad(loss), nnx.jit(nnx.grad(loss)), jax.jit(lambda net: nnx.grad(loss)(net))):
    net = Net()
    got = [float(step(net).w) for _ in range(2)]
    want = [float(jax.random.normal(jax.random.fold_in(jax.random.key(0), i), ())) for i in (0, 1)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# samplers
ARGUMENTS = {
  "ball": (2,), "beta": (1.0, 2.0), "bernoulli": (), "binomial": (5, 0.5), "bits": (),
  "categorical": (jnp.zeros(3),), "cauchy": (), "chisquare": (3.0,), "choice": (5,),
  "dirichlet": (jnp.ones(3),), "double_sided_maxwell": (0.0, 1.0), "exponential": (),
  "f": (2.0, 3.0), "gamma": (1.0,), "generalized_normal": (2.0,), "geometric": (0.5,),
  "gumbel": (), "laplace": (), "loggamma": (1.0,), "logistic": (), "lognormal": (),
  "maxwell": (), "multinomial": (5, jnp.ones(3) / 3),
  "multivariate_normal": (jnp.zeros(2), jnp.eye(2)),
  "normal": ((3,),), "orthogonal": (3,), "pareto": (2.0,), "permutation": (5,), "poisson": (2.0,),
  "rademacher": (), "randint": ((3,), 0, 9), "rayleigh": (1.0,), "t": (3.0,),
  "triangular": (0.0, 0.5, 1.0), "truncated_normal": (-1.0, 1.0), "uniform": (), "wald": (1.0,),
  "weibull_min": (1.0, 2.0),
}  # fmt: skip
NOT_SAMPLERS = {
  "key", "PRNGKey", "split", "fold_in", "clone", "key_data", "key_impl", "wrap_key_data",
  "random_gamma_p",
}  # fmt: skip


def test_every_sampler_of_jax_random_is_a_method():
  takes_key = {
    name
    for name, f in vars(jax.random).items()
    if callable(f) and not name.startswith("_") and "key" in list(_parameters(f))[:1]
  }
  assert takes_key - NOT_SAMPLERS == set(SAMPLERS) == set(ARGUMENTS)


def _parameters(f):
  try:
    return inspect.signature(f).parameters
  except (TypeError, ValueError):
    return ()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_with_the_next_key(name):
  sample, args = getattr(jax.random, name), ARGUMENTS[name]

  def draw(name):
    rngs = nnx.Rngs(0, noise=1)
    return getattr(rngs, name)(*args), getattr(rngs.noise, name)(*args), rngs.default.count[...]

  # Traced only: to compile all of them takes a minute.
  drawn, again, _ = jax.eval_shape(lambda: draw(name))
  assert drawn == again == jax.eval_shape(lambda: sample(jax.random.key(0), *args))
  method = getattr(nnx.Rngs, name)
  assert method.__name__ == name and f"jax.random.{name}" in method.__doc__
  if name in ("bits", "normal", "randint", "uniform"):
    drawn, again, count = draw(name)
    for seed, x in enumerate([drawn, again]):
      key = jax.random.fold_in(jax.random.key(seed), 0)
      np.testing.assert_array_equal(x, sample(key, *args))
    assert int(count) == 1


@pytest.mark.parametrize("name", INITIALIZERS)
def test_an_initializer_draws_with_the_next_key_at_each_call(name):
  args = (1.0, "fan_in", "normal") if name == "variance_scaling" else ()
  shape = (3, 4, 4) if name == "delta_orthogonal" else (4, 4)
  want = getattr(jax.nn.initializers, name)(*args)

  def draw():
    rngs = nnx.Rngs(0)
    init = getattr(rngs, name)(*args)
    return init(shape, jnp.float32), init(shape, jnp.float32), rngs.default.count[...]

  assert jax.eval_shape(draw)[0] == jax.eval_shape(lambda: want(jax.random.key(0), shape))
  if name in ("glorot_normal", "lecun_uniform"):
    a, b, count = draw()
    np.testing.assert_array_equal(a, want(jax.random.fold_in(jax.random.key(0), 0), shape))
    assert bool((a != b).any()) and int(count) == 2


# reseed
class Net(nnx.Module):
  """Streams in several places."""

  def __init__(self):
    self.a = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))
    self.rngs = nnx.Rngs(params=1, dropout=2)
    self.stack = nnx.Rngs(dropout=3).split(4)


def test_reseed_starts_the_named_streams_again_in_place():
  net = Net()
  cells = [net.rngs.dropout.key.get_raw_value(), net.stack.dropout.key.get_raw_value()]
  keys(net.rngs.dropout), keys(net.rngs.params, 2)
  nnx.reseed(net, dropout=9)
  assert keys(net.rngs.dropout) == folded(9, 0, 1, 2)
  forked = jax.random.fold_in(jax.random.key(9), 0)
  assert bits(net.a.rngs.key[...]) == bits(forked)
  assert int(net.rngs.params.count) == 2
  assert net.stack.dropout.count[...].tolist() == [0] * 4
  assert bits(net.stack.dropout.key[...]) == bits(jax.random.split(forked, 4))
  assert net.rngs.dropout.key.get_raw_value() is cells[0]
  assert net.stack.dropout.key.get_raw_value() is cells[1]


def test_reseed_takes_keys_streams_and_a_policy():
  net = Net()
  nnx.reseed(net, params=jax.random.key(5), dropout=nnx.RngStream(6, tag="x"),
             policy=lambda old, key, path: jnp.broadcast_to(key, old.shape))  # fmt: skip
  assert keys(net.rngs.params, 1) == folded(5, 0)
  first = bits(net.stack.dropout.key[...])
  assert first == [first[0]] * 4


@pytest.mark.parametrize(
  ("streams", "error"),
  [
    ({"dropout": 5, "noise": 1}, r"no random stream 'noise'(.|\n)*dropout, params(.|\n)*fix"),
    ({"dropout": 5, "params": 0.5}, "a random stream starts from a seed"),
  ],
)
def test_reseed_names_a_stream_that_is_not_there_and_changes_nothing(streams, error):
  net = Net()
  drawn = keys(net.rngs.dropout)
  with pytest.raises(ValueError, match=error):
    nnx.reseed(net, **streams)
  assert int(net.rngs.dropout.count) == len(drawn)
  assert keys(net.rngs.dropout, 1) == folded(2, len(drawn))


def test_reseed_works_under_plain_jit():
  net = Net()
  jax.jit(lambda net, seed: nnx.reseed(net, params=seed))(net, 5)
  assert keys(net.rngs.params, 1) == folded(5, 0)


class Layers(nnx.Module):
  """Layers whose names are not in the order in which they are built."""

  def __init__(self, rngs):
    self.z = nnx.Dropout(0.5, rngs=rngs)
    self.a = nnx.Dropout(0.5, rngs=rngs)
    self.m = [nnx.Dropout(0.5, rngs=rngs) for _ in range(2)]
    self.attention = nnx.MultiHeadAttention(2, 4, 4, dropout_rate=0.5, rngs=rngs)

  def streams(self):
    return [self.z, self.a, *self.m, self.attention]


def test_reseed_gives_each_stream_the_key_of_a_model_that_is_built_so():
  model, want = Layers(nnx.Rngs(0, dropout=1)), Layers(nnx.Rngs(0, dropout=42))
  for layer in model.streams():
    layer.rngs()
  nnx.reseed(model, dropout=42)
  for a, b in zip(model.streams(), want.streams(), strict=True):
    assert bits(a.rngs.key[...]) == bits(b.rngs.key[...])
    assert int(a.rngs.count) == 0


@pytest.mark.parametrize("copied", [nnx.clone, nnx.to_lojax, lambda m: nnx.merge(*nnx.split(m))])
def test_reseed_gives_the_streams_of_a_copy_keys_of_their_own(copied):
  model = copied(Layers(nnx.Rngs(0, dropout=1)))
  nnx.reseed(model, dropout=42)
  assert len({str(bits(x.rngs.key[...])) for x in model.streams()}) == 5
  x = jnp.ones((1, 64))
  assert not bool((model.z(x) == model.a(x)).all())


def test_reseed_tells_streams_of_equal_ancestry_apart():
  model = [nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=i)) for i in range(3)]
  nnx.reseed(model, dropout=42)
  assert len({str(bits(x.rngs.key[...])) for x in model}) == 3
