"""to_hijax and to_lojax: copies in the other storage, whole or in part."""

import jax
import jax.numpy as jnp
import optax
import pytest

from refax import nnx


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def model():
  tied = nnx.Param(jnp.ones(2), tag="t")
  return Node(
    a=tied, l=[tied, nnx.BatchStat(0.0), "x"], d=nnx.Variable({"k": jnp.ones(2)}), x=jnp.ones(1),
    key=nnx.Variable(jax.random.key(0)),
  )  # fmt: skip


def storages(m):
  return {path: v.is_hijax for path, v in nnx.iter_graph(m) if isinstance(v, nnx.Variable)}


def test_all_variables_change_their_storage_and_nothing_else():
  m = model()
  lojax = nnx.to_lojax(m)
  assert set(storages(m).values()) == {True} and set(storages(lojax).values()) == {False}
  assert set(storages(nnx.to_hijax(lojax)).values()) == {True}
  assert jax.tree.structure(lojax) == jax.tree.structure(m)
  assert lojax.a is lojax.l[0] and lojax.a.tag == "t" and type(lojax.l[1]) is nnx.BatchStat
  assert isinstance(lojax.d.get_raw_value()["k"], jax.Array)
  assert lojax.x is m.x
  assert jnp.issubdtype(lojax.key.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("convert", [nnx.to_hijax, nnx.to_lojax])
def test_the_copy_has_cells_of_its_own(convert):
  m = model()
  twin = convert(m)
  twin.a[...] = 5.0
  twin.d["k"] = 5.0
  m.l[1][...] = 7.0
  assert m.a.tolist() == [1.0, 1.0] and m.d["k"].tolist() == [1.0, 1.0] and float(twin.l[1]) == 0.0


ONLY = {
  "type": nnx.Param,
  "tag": "t",
  "path": nnx.PathContains("a"),
  "predicate": lambda path, v: path[-1] == "a",
}


@pytest.mark.parametrize("name", ONLY)
def test_only_what_the_filter_selects_is_converted(name):
  m = model()
  twin = nnx.to_lojax(m, only=ONLY[name])
  assert [path for path, hijax in storages(twin).items() if not hijax] == [("a",)]
  assert twin.a is twin.l[0]
  back = nnx.to_hijax(nnx.to_lojax(m), only=ONLY[name])
  assert [path for path, hijax in storages(back).items() if hijax] == [("a",)]


def test_what_is_not_selected_is_the_same_cell():
  m = model()
  twin = nnx.to_lojax(m, only=nnx.Param)
  assert twin is not m and twin.l[1].get_raw_value() is m.l[1].get_raw_value()
  m.l[1][...] = 7.0
  assert float(twin.l[1]) == 7.0
  assert set(storages(nnx.to_lojax(m, only=None)).values()) == {True}


@pytest.mark.parametrize(
  "tree",
  [
    lambda: nnx.Param(1.0),
    lambda: nnx.state(model()),
    lambda: [model(), {"v": nnx.Param(1.0), "n": 3}],
    lambda: nnx.Rngs(0),
    lambda: (),
  ],
  ids=["variable", "state", "pytree", "rngs", "empty"],
)
def test_any_pytree_is_converted(tree):
  x = tree()
  is_variable = lambda v: isinstance(v, nnx.Variable)
  for convert, want in ((nnx.to_lojax, False), (nnx.to_hijax, True)):
    twin = convert(x)
    assert jax.tree.structure(twin) == jax.tree.structure(x)
    variables = [v for v in jax.tree.leaves(twin, is_leaf=is_variable) if is_variable(v)]
    assert all(v.is_hijax is want for v in variables)


def test_a_converted_model_crosses_the_border_of_plain_transforms():
  stack = nnx.to_hijax(jax.vmap(lambda k: nnx.to_lojax(Node(w=nnx.Param(k))))(jnp.arange(3.0)))
  assert stack.w.is_hijax and stack.w.tolist() == [0.0, 1.0, 2.0]

  @jax.jit
  def step(m):
    twin = nnx.to_lojax(m)
    twin.w[...] = twin.w * 2
    inner = nnx.to_hijax(twin)
    inner.w[...] += 1
    return nnx.to_lojax(inner)

  assert step(stack).w.tolist() == [1.0, 3.0, 5.0]
  assert stack.w.tolist() == [0.0, 1.0, 2.0]


def test_a_hijax_model_returned_from_plain_jit_is_refused_aloud():
  with pytest.raises(Exception, match=r"[Rr]ef"):
    jax.jit(lambda: Node(w=nnx.Param(1.0)))()


@pytest.mark.parametrize("hijax", [False, True])
def test_pure_has_an_array_in_the_place_of_each_variable(hijax):
  with nnx.use_hijax(hijax):
    m = model()
  pure = nnx.pure(m)
  assert type(pure) is Node and type(pure.l) is nnx.List and pure.l[2] == "x"
  assert all(isinstance(x, jax.Array) and type(x) is not jax.Ref for x in jax.tree.leaves(pure))
  assert not any(isinstance(v, nnx.Variable) for _, v in nnx.iter_graph(pure))
  assert pure.a.tolist() == [1.0, 1.0] and pure.d["k"].tolist() == [1.0, 1.0] and pure.x is m.x
  assert type(nnx.pure(m.a)) is type(pure.a) and nnx.pure({"v": m.a, "x": 1})["x"] == 1


def test_pure_arrays_stay_when_the_variables_are_written():
  v = nnx.Variable(jnp.zeros(2))
  before = nnx.pure([v])[0]
  nnx.jit(lambda v: v.set_value(v + 1))(v)
  v[0] = 5.0
  assert before.tolist() == [0.0, 0.0] and v[...].tolist() == [5.0, 1.0]


def test_functions_for_pytrees_of_arrays_take_what_pure_returns():
  layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  arrays = nnx.pure(nnx.state(layer, nnx.Param))
  assert type(arrays) is nnx.State
  want = jnp.sqrt((layer.kernel[...] ** 2).sum())
  assert jnp.allclose(optax.global_norm(arrays), want)
  assert jnp.allclose(jax.jit(lambda m: optax.global_norm(nnx.pure(nnx.state(m))))(layer), want)
  zeros = jax.tree.map(lambda x: x * 0, nnx.pure(layer))
  assert not zeros.kernel.any() and zeros(jnp.ones((1, 2))).shape == (1, 3)
