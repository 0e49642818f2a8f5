"""nnx.effects, no_update, assert_no_writes, transaction: to know, forbid and undo writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import NonFiniteError, UnwantedWriteError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


def model(hijax=True):
  m = Node(
    linear=nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    stats=[nnx.BatchStat(jnp.zeros(2))],
    n=nnx.Variable(0),
    unused=nnx.Variable(0),
  )
  return m if hijax else nnx.to_lojax(m)


def forward(m, x):
  y = m.linear(x)
  m.n += 1
  m.stats[0][...] = y.mean(0)
  return y


X = jnp.ones((3, 2))
READS = ("linear.bias", "linear.kernel", "n")
WRITES = ("n", "stats[0]")


# effects
@STORAGE
def test_effects_of_arguments_keywords_and_nothing_else(hijax):
  m = model(hijax)
  by_position = nnx.effects(forward)(m, X)
  assert by_position == nnx.Effects(tuple(f"0.{p}" for p in READS), tuple(f"0.{p}" for p in WRITES))
  by_keyword = nnx.effects(forward)(x=X, m=m)
  assert by_keyword == nnx.Effects(tuple(f"m.{p}" for p in READS), tuple(f"m.{p}" for p in WRITES))
  assert int(m.n) == 0


def test_effects_of_closures_are_named_by_the_object_they_belong_to():
  m = model()
  assert nnx.effects(lambda x: forward(m, x))(X) == nnx.Effects(
    tuple(f"Node.{p}" for p in READS), tuple(f"Node.{p}" for p in WRITES)
  )
  ref = jax.new_ref(1.0)
  v = nnx.Variable(0)

  def f():
    ref[...] = 2.0
    return v + 1

  reads, writes = nnx.effects(f)()
  assert reads == ("(a Variable outside any Module)",) and writes == ("(a Ref by closure)",)
  assert ref[...] == 1.0


def test_effects_of_variables_and_of_pytrees_of_arguments():
  v, w = nnx.Variable(0), nnx.Variable(jnp.zeros(3))

  def f(args, v):
    args["w"][0][1] = v[...] * 1.0

  assert nnx.effects(f)({"w": [w]}, v) == nnx.Effects(("0.w[0]", "1"), ("0.w[0]",))


INSIDE = {
  "jax.jit": lambda f: jax.jit(f),
  "nnx.jit": lambda f: nnx.jit(f),
  "nnx.remat": lambda f: nnx.remat(f),
  "jax.checkpoint": lambda f: jax.checkpoint(f),
  "nnx.cond": lambda f: lambda m, x: nnx.cond(x[0, 0] > 5, f, lambda m, x: x, m, x),
  "jax.lax.cond": lambda f: (
    lambda m, x: jax.lax.cond(x[0, 0] > 5, lambda x: f(m, x), lambda x: x, x)
  ),
  "nnx.scan": lambda f: (
    lambda m, x: nnx.scan(
      lambda x, m: f(m, x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )(x, m)
  ),
  "jax.lax.scan": lambda f: lambda m, x: jax.lax.scan(lambda x, _: (f(m, x), None), x, length=2),
  "nnx.grad": lambda f: lambda m, x: nnx.grad(lambda m: f(m, x).sum())(m),
}


@pytest.mark.parametrize("name", INSIDE)
def test_effects_inside_transforms_are_seen(name):
  reads, writes = nnx.effects(INSIDE[name](forward))(model(), X)
  assert writes == ("0.n", "0.stats[0]")
  assert {"0.linear.bias", "0.linear.kernel", "0.n"} <= set(reads)
  if name in ("jax.jit", "jax.lax.cond", "jax.lax.scan", "jax.checkpoint", "nnx.jit", "nnx.grad"):
    assert "0.unused" not in reads


def test_effects_under_jit_and_of_the_modes_of_a_model():
  norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  call = nnx.effects(lambda m, x: m(x))
  assert call(norm, X).writes == ("0.mean", "0.var")
  norm.eval()
  assert call(norm, X) == nnx.Effects(("0.bias", "0.mean", "0.scale", "0.var"), ())
  found = []
  jax.jit(lambda norm: found.append(call(norm, X).writes))(norm)
  assert found == [()]


# no_update
@STORAGE
def test_no_update_computes_the_same_and_leaves_state_and_structure(hijax):
  m, twin = model(hijax), model(hijax)

  def f(m, x):
    y = forward(m, x)
    m.extra = nnx.Variable(y)
    m.mode = "new"
    m.linear.kernel.set_metadata(tag="new")
    return y, m.n + 0

  y, n = nnx.no_update(f)(m, X)
  want, want_n = f(twin, X)
  np.testing.assert_array_equal(y, want)
  assert int(n) == int(want_n) == 1 and int(m.n) == 0
  assert m.stats[0][...].tolist() == [0.0, 0.0]
  assert not hasattr(m, "extra") and not hasattr(m, "mode")
  assert not m.linear.kernel.has_metadata("tag")


def test_no_update_of_closures_and_of_new_objects():
  m = model()
  y, new = nnx.no_update(
    lambda: (forward(m, X), Node(v=nnx.Variable(m.n + 1), m=m.linear.kernel + 0))
  )()
  assert int(m.n) == 0 and int(new.v) == 2 and new.v.is_hijax
  assert y.shape == (3, 2)
  assert int(nnx.jit(lambda m: nnx.no_update(lambda m: forward(m, X))(m).sum() * 0 + m.n)(m)) == 0


# assert_no_writes
@STORAGE
def test_assert_no_writes_lets_reads_pass(hijax):
  m = model(hijax)
  np.testing.assert_array_equal(nnx.assert_no_writes(lambda m, x: m.linear(x))(m, X), m.linear(X))
  assert nnx.assert_no_writes(lambda m: m)(m) is m


@STORAGE
def test_assert_no_writes_names_what_is_written(hijax):
  m = model(hijax)
  with pytest.raises(UnwantedWriteError) as caught:
    nnx.assert_no_writes(forward)(m, X)
  assert str(caught.value) == (
    "forward writes state\n"
    "  at:  0.n, 0.stats[0]\n"
    "  got: a function under nnx.assert_no_writes\n"
    "  fix: call model.eval(), or nnx.no_update to drop what it writes"
  )
  assert int(m.n) == 0


@pytest.mark.parametrize(
  "change",
  [
    lambda m: setattr(m, "extra", nnx.Variable(0)),
    lambda m: setattr(m, "mode", "new"),
    lambda m: m.stats.append(nnx.Variable(0)),
    lambda m: delattr(m, "unused"),
  ],
  ids=["variable", "static", "list", "deleted"],
)
def test_assert_no_writes_sees_structural_changes(change):
  m = model()
  before = nnx.graphdef(m)
  with pytest.raises(UnwantedWriteError, match="at:  an attribute of an argument"):
    nnx.assert_no_writes(change)(m)
  assert nnx.graphdef(m) == before


def test_assert_no_writes_sees_closures():
  m = model()
  with pytest.raises(UnwantedWriteError, match=r"at:  Node\.n, Node\.stats\[0\]"):
    nnx.assert_no_writes(lambda: forward(m, X))()
  assert int(m.n) == 0


# transaction
def bits(tree):
  """Every Variable and array, bit by bit, by path."""
  found = {}
  for path, x in nnx.iter_graph(tree):
    if isinstance(x, nnx.Variable | jax.Array):
      x = x[...]
      x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
      found[path] = (str(x.dtype), np.asarray(x).tobytes())
  return found


class Boom(Exception):
  pass


@STORAGE
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_an_exception_undoes_everything_bit_by_bit(hijax, compiled):
  odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]).view(jnp.int32).at[0].add(3).view(jnp.float32)
  m = Node(
    odd=nnx.Param(odd),
    half=nnx.Param(jnp.full(2, 0.1, jnp.bfloat16)),
    rngs=nnx.Rngs(0),
    array=jnp.arange(3),
    shared=None,
  )
  m.shared = [m.odd]
  m = m if hijax else nnx.to_lojax(m)
  before, graphdef = bits(m), nnx.graphdef(m)

  def change(m):
    m.odd[...] = 0.0
    m.half[0] = 7.0
    m.rngs()
    m.array = m.array + 1

  with pytest.raises(Boom), nnx.transaction(m):
    (nnx.jit(change) if compiled else change)(m)
    assert bits(m) != before
    raise Boom
  assert bits(m) == before and nnx.graphdef(m) == graphdef and m.shared[0] is m.odd


def test_structural_changes_are_undone():
  v = nnx.Variable(1.0, tag="t")
  m = Node(v=v, layers=[nnx.Variable(0), {"a": nnx.Variable(1)}], table=nnx.data({"k": 1.0}), k=1)
  objects = {
    path: id(x) for path, x in nnx.iter_graph(m) if isinstance(x, nnx.Module | nnx.Variable)
  }
  before, graphdef = bits(m), nnx.graphdef(m)
  step = jax.jit(lambda m: m.v * m.k)
  step(m)
  with pytest.raises(Boom), nnx.transaction(m):
    m.layers.append(nnx.Variable(5))
    m.layers[1]["a"] = nnx.Variable(9)
    m.table["k"] = 2.0
    m.v = nnx.Variable(jnp.zeros(3))
    v.set_metadata(tag="changed")
    m.k, m.extra = 2, "new"
    del m.layers[0]
    raise Boom
  assert nnx.graphdef(m) == graphdef and bits(m) == before and m.v is v and v.tag == "t"
  assert {
    p: id(x) for p, x in nnx.iter_graph(m) if isinstance(x, nnx.Module | nnx.Variable)
  } == objects
  assert m.table == {"k": 1.0} and float(step(m)) == 1.0


def test_several_objects_and_a_training_step():
  import optax

  m = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(m, optax.adam(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(m, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(m)
    optimizer.update(m, grads)
    return loss

  step(m, optimizer, jnp.ones((3, 2)))
  before = bits([m, optimizer])
  with pytest.raises(NonFiniteError), nnx.transaction(m, optimizer) as transaction:
    loss = step(m, optimizer, jnp.full((3, 2), jnp.nan))
    assert bits([m, optimizer]) != before
    transaction.require_finite(loss)
  assert bits([m, optimizer]) == before
  with nnx.transaction(m, optimizer) as transaction:
    transaction.require_finite(step(m, optimizer, jnp.ones((3, 2))), {"more": jnp.ones(3)})
  assert bits([m, optimizer]) != before and int(optimizer.step) == 2


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf, jnp.array([1.0, jnp.nan]), {"a": [jnp.inf]}])
def test_what_is_not_finite(value):
  v = nnx.Variable(0)
  refused = pytest.raises(NonFiniteError, match="a value is not finite; the transaction is undone")
  with refused, nnx.transaction(v) as transaction:
    v[...] = 1
    transaction.require_finite(value)
  assert int(v) == 0


def test_without_an_error_everything_stays():
  m = Node(v=nnx.Variable(0))
  with nnx.transaction(m) as transaction:
    m.v += 1
    m.new = nnx.Variable(2)
    transaction.require_finite(1.0, jnp.ones(2), 3)
  assert int(m.v) == 1 and int(m.new) == 2


def test_transactions_nest():
  v = nnx.Variable(0)
  with pytest.raises(Boom), nnx.transaction(v):
    v += 1
    with pytest.raises(Boom), nnx.transaction(v):
      v += 10
      raise Boom
    assert int(v) == 1
    raise Boom
  assert int(v) == 0


def test_a_transaction_while_tracing():
  v = nnx.Variable(1)

  @jax.jit
  def f(v):
    try:
      with nnx.transaction(v):
        v[...] = 5
        raise Boom
    except Boom:
      v[...] += 1

  f(v)
  assert int(v) == 2


@pytest.mark.parametrize("bare", [True, False], ids=["a Variable", "a Module"])
def test_what_a_transaction_undoes_is_seen_by_compiled_functions(bare):
  v = nnx.Variable(jnp.zeros(2), tag="old")
  holder = v if bare else nnx.Dict(v=v)
  get = lambda x: x if isinstance(x, nnx.Variable) else x["v"]
  step = nnx.jit(lambda x: (get(x).set_value(get(x) + 1), 0.0 if get(x).tag == "old" else 1.0)[1])
  assert float(step(holder)) == 0.0
  with pytest.raises(KeyError), nnx.transaction(holder):
    v.set_metadata(tag="new")
    v.set_raw_value(nnx.Variable(jnp.full(2, 7.0)).get_raw_value())
    assert float(step(holder)) == 1.0
    raise KeyError
  assert v.tag == "old"
  assert float(step(holder)) == 0.0
  np.testing.assert_array_equal(v, [2.0, 2.0])
