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
  assert nnx.effects(INSIDE[name](forward))(model(), X) == nnx.Effects(
    ("0.linear.bias", "0.linear.kernel", "0.n"), ("0.n", "0.stats[0]")
  )


OURS = [name for name in INSIDE if name.startswith("nnx.")]


@STORAGE
@pytest.mark.parametrize("outer", OURS)
@pytest.mark.parametrize("inner", OURS)
def test_reads_inside_two_transforms_are_exact(inner, outer, hijax):
  apply = INSIDE[inner](forward)
  keeps = lambda m, x: (apply(m, x), x)[1]  # gradients are no carry and no result of a branch
  both = INSIDE[outer](keeps if inner == "nnx.grad" else apply)
  assert nnx.effects(both)(model(hijax), X) == nnx.Effects(
    ("0.linear.bias", "0.linear.kernel", "0.n"), ("0.n", "0.stats[0]")
  )


@STORAGE
def test_reads_of_mapped_state_are_exact(hijax):
  v, w, unused = nnx.Variable(jnp.zeros(3)), nnx.Variable(jnp.zeros(3)), nnx.Variable(jnp.zeros(3))
  m = Node(v=v, w=w, unused=unused)
  m = m if hijax else nnx.to_lojax(m)

  def body(m, x):
    m.w[...] = m.v * x
    return m.v + 1

  assert nnx.effects(nnx.vmap(body))(m, jnp.ones(3)) == nnx.Effects(("0.v",), ("0.w",))
  over = nnx.scan(lambda m, x: body(m, x), in_axes=(0, 0), out_axes=0)
  assert nnx.effects(over)(m, jnp.ones(3)) == nnx.Effects(("0.v",), ("0.w",))


@STORAGE
def test_a_value_that_is_carried_along_is_read_if_something_depends_on_it(hijax):
  def with_state(body):
    m = Node(a=nnx.Variable(1.0), b=nnx.Variable(2.0), c=nnx.Variable(3.0))
    return nnx.effects(body)(m if hijax else nnx.to_lojax(m))

  def swap(m):
    a, b = m.a[...], m.b[...]
    m.a[...], m.b[...] = b, a

  assert with_state(swap) == nnx.Effects(("0.a", "0.b"), ("0.a", "0.b"))
  assert with_state(nnx.jit(swap)) == nnx.Effects(("0.a", "0.b"), ("0.a", "0.b"))

  def loop(m):  # what one step writes, the next one reads
    def step(i, m):
      m.a[...] = m.b * 1.0
      m.b[...] = m.c * 1.0
      return m

    nnx.fori_loop(0, 3, step, m)

  assert with_state(loop) == nnx.Effects(("0.b", "0.c"), ("0.a", "0.b"))

  def until(m):
    nnx.while_loop(lambda m: m.a < 3.0, lambda m: (setattr(m, "a", m.a + 1.0), m)[1], m)

  assert with_state(until) == nnx.Effects(("0.a",), ("0.a",))


@STORAGE
def test_what_decides_about_a_write_is_read(hijax):
  m = Node(flag=nnx.Variable(jnp.array(True)), a=nnx.Variable(0.0), b=nnx.Variable(1.0))
  m = m if hijax else nnx.to_lojax(m)

  def choose(m):
    def yes(m):
      m.a[...] = 5.0

    nnx.cond(m.flag[...], yes, lambda m: None, m)

  assert nnx.effects(choose)(m) == nnx.Effects(("0.flag",), ("0.a",))

  def pick(m):
    return nnx.switch(m.flag.astype(int), [lambda m: m.a + 0, lambda m: m.b + 0], m)

  assert nnx.effects(pick)(m) == nnx.Effects(("0.a", "0.b", "0.flag"), ())


def test_what_is_printed_is_read_and_what_is_dropped_is_not():
  m = Node(a=nnx.Variable(1.0), b=nnx.Variable(2.0))

  def shows(m):
    jax.debug.print("{}", m.a[...])
    m.b + 1

  assert nnx.effects(nnx.jit(shows))(m) == nnx.Effects(("0.a",), ())


def test_reads_of_closures_in_nested_transforms_are_exact():
  m = model()
  for name in ("nnx.jit", "nnx.remat", "nnx.cond", "nnx.scan"):
    inside = INSIDE[name](lambda _, x: forward(m, x))
    reads, writes = nnx.effects(lambda x, inside=inside: inside(nnx.Variable(0), x))(X)
    assert reads == tuple(f"Node.{p}" for p in READS), name
    assert writes == tuple(f"Node.{p}" for p in WRITES), name


def test_layers_say_what_they_read():
  rngs = nnx.Rngs(0)
  net = Node(norm=nnx.BatchNorm(2, rngs=rngs), drop=nnx.Dropout(0.5, rngs=rngs), v=nnx.Param(1.0))
  call = lambda net, x: net.drop(net.norm(x))
  assert str(nnx.effects(call)(net, X)) == "\n".join(
    [
      "0.drop.rngs: reads key; updates count",
      "0.norm: reads bias, scale; updates mean, var",
    ]
  )
  net.eval()
  assert str(nnx.effects(call)(net, X)) == "0.norm: reads bias, mean, scale, var"


# print and as_graph
def test_effects_print_a_line_for_each_layer():
  effects = nnx.effects(forward)(model(), X)
  assert (
    str(effects)
    == f"{effects}"
    == "\n".join(["0: updates n", "0.linear: reads bias, kernel", "0.stats: writes [0]"])
  )
  assert repr(effects).startswith("Effects(reads=('0.linear.bias',")
  assert str(nnx.Effects((), ())) == "no state is read or written"
  assert str(nnx.effects(lambda v: v + 1)(nnx.Variable(0))) == "0: reads"
  outside = nnx.Effects(("(a Variable outside any Module)",), ())
  assert str(outside) == "(a Variable outside any Module): reads"
  keyed = nnx.Effects(("0.d['a.b'].kernel", "0.d['a.b']"), ())
  assert str(keyed) == "0.d: reads ['a.b']\n0.d['a.b']: reads kernel"


def test_the_graph_is_an_svg_with_a_box_a_layer_and_an_arrow_a_variable():
  from xml.etree import ElementTree

  graph = nnx.effects(forward)(model(), X).as_graph()
  root = ElementTree.fromstring(graph)
  find = lambda tag: root.findall(f"{{http://www.w3.org/2000/svg}}{tag}")
  assert [x.text for x in find("text") if x.get("class") == "title"] == [
    "0",
    "0.linear",
    "0.stats",
  ]
  assert len(find("path")) == 4 and len(find("rect")) == 4
  assert graph._repr_svg_() == graph
  assert "no state" in nnx.Effects((), ()).as_graph()
  odd = nnx.Effects(("0['<b>&\"'].x", "0." + "long." * 40 + "y"), ("0['<b>&\"'].x",)).as_graph()
  assert "<b>" not in odd and ElementTree.fromstring(odd) is not None


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
  assert caught.value.args[0] == (
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


class Sowing(nnx.Module):
  def __init__(self):
    self.count = nnx.Variable(0)

  def __call__(self, x):
    self.count += 1
    self.sow(nnx.Intermediate, "seen", x)
    return x * 2

  def named(self, x):
    return self(x) + 1


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.named], ids=["module", "method"])
@pytest.mark.parametrize(
  "way",
  [
    lambda f, x: nnx.no_update(f)(x),
    lambda f, x: jax.vmap(lambda x: nnx.no_update(f)(x))(x),
    lambda f, x: jax.jit(lambda x: nnx.no_update(f)(x))(x),
    lambda f, x: jax.grad(lambda x: nnx.no_update(f)(x).sum())(x),
  ],
  ids=["eager", "vmap", "jit", "grad"],
)
def test_a_module_that_sows_may_be_called_without_updates(way, of):
  model = Sowing()
  assert jnp.isfinite(way(of(model), jnp.arange(3.0))).all()
  assert int(model.count) == 0 and not hasattr(model, "seen")
