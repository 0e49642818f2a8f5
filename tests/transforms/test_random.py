"""nnx.split_rngs and nnx.fork_rngs: other streams for a while, and then back."""

import jax
import jax.numpy as jnp
import pytest

from refax import nnx


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def key_data(tree):
  return [jax.random.key_data(s.key[...]).tolist() for s in streams(tree)]


def streams(tree):
  return [x for _, x in nnx.iter_graph(tree) if isinstance(x, nnx.RngStream)]


def counts(tree):
  return [s.count[...].tolist() for s in streams(tree)]


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


def rngs(hijax=True):
  made = nnx.Rngs(params=0, dropout=1)
  return made if hijax else nnx.to_lojax(made)


# split_rngs
@STORAGE
@pytest.mark.parametrize("splits", [3, (2, 3)], ids=str)
def test_split_as_a_context_gives_each_stream_an_axis_and_takes_it_back(splits, hijax):
  r = rngs(hijax)
  before = key_data(r)
  shape = (splits,) if isinstance(splits, int) else splits
  with nnx.split_rngs(r, splits=splits):
    assert [s.key.shape for s in streams(r)] == [shape, shape]
    assert [s.count.shape for s in streams(r)] == [shape, shape]
    assert all(s.key.is_hijax == hijax for s in streams(r))
    flat = jax.random.key_data(r.params.key[...]).reshape(-1, 2)
    assert len({tuple(k) for k in flat.tolist()}) == len(flat)
  assert key_data(r) == before and counts(r) == [1, 1]
  assert all(s.key.is_hijax == hijax for s in streams(r))


def test_two_splits_give_other_keys():
  r = rngs()
  found = []
  for _ in range(2):
    with nnx.split_rngs(r, splits=2):
      found.append(key_data(r))
  assert found[0] != found[1]


@pytest.mark.parametrize(
  "only", ["params", lambda path, s: s.tag == "params"], ids=["tag", "predicate"]
)
def test_only_some_streams(only):
  r = rngs()
  with nnx.split_rngs(r, splits=2, only=only):
    assert (r.params.key.shape, r.dropout.key.shape) == ((2,), ())
  assert int(r.params.count) == 1 and int(r.dropout.count) == 0


def test_squeeze():
  r = rngs()
  with nnx.split_rngs(r, splits=1, squeeze=True):
    assert r.params.key.shape == ()
  with nnx.split_rngs(r, splits=1):
    assert r.params.key.shape == (1,)


def test_split_as_a_decorator_for_arguments_in_any_place():
  m, r = Node(drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0))), rngs()

  @nnx.split_rngs(splits=4)
  def f(ms, *, r):
    assert ms[0].drop.rngs.key.shape == (4,) and r.params.key.shape == (4,)
    return nnx.vmap(lambda m, r: m.drop(jnp.ones(16)) + r.params.normal())(ms[0], r)

  ys = f([m], r=r)
  assert ys.shape == (4, 16) and len({tuple(y) for y in ys.tolist()}) == 4
  assert m.drop.rngs.key.shape == () and counts([m, r]) == [1, 1, 1]


def test_shared_streams_are_split_once():
  r = nnx.Rngs(0)
  m = Node(a=r, b=r.default)
  with nnx.split_rngs(m, splits=2):
    assert m.b.key.shape == (2,) and m.a.default is m.b
  assert int(m.b.count) == 1


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax", "nnx"])
def test_inside_a_compiled_function(jit):
  r, twin = rngs(), rngs()

  def f(r):
    with nnx.split_rngs(r, splits=3):
      return nnx.vmap(lambda r: r.params.normal())(r)

  assert jit(f)(r).tolist() == f(twin).tolist()
  assert counts(r) == [1, 1] == counts(twin) and key_data(r) == key_data(twin)


def test_an_error_inside_brings_the_streams_back():
  r = rngs()
  with pytest.raises(RuntimeError, match="boom"), nnx.split_rngs(r, splits=2):
    raise RuntimeError("boom")
  assert [s.key.shape for s in streams(r)] == [(), ()]
  with pytest.raises(RuntimeError, match="boom"):
    nnx.fork_rngs()(lambda r: (_ for _ in ()).throw(RuntimeError("boom")))(r)
  assert counts(r) == [2, 2]


def test_when_one_stream_cannot_be_split_none_is():
  r = nnx.Rngs(a=0, b=jax.random.split(jax.random.key(0), 3))
  before = key_data(r)
  with pytest.raises(ValueError, match="single key"):
    nnx.split_rngs(r, splits=2)
  assert key_data(r) == before and counts(r) == [0, [0, 0, 0]]


# fork_rngs
@STORAGE
def test_fork_as_a_context_continues_elsewhere_and_comes_back(hijax):
  r, twin = rngs(hijax), rngs(hijax)
  before = key_data(r)
  with nnx.fork_rngs(r):
    assert key_data(r) != before and counts(r) == [0, 0]
    drawn = [r.params.uniform().item() for _ in range(3)]
  assert key_data(r) == before and counts(r) == [1, 1]
  key = twin.params()
  want = [jax.random.uniform(jax.random.fold_in(key, i)).item() for i in range(3)]
  assert drawn == want


def test_fork_as_a_decorator_for_some_streams():
  r = rngs()

  @nnx.fork_rngs(only="dropout")
  def f(r):
    return [r.params.normal().item() for _ in range(2)] + [r.dropout.normal().item() for _ in "ab"]

  assert f(r) != f(r)
  assert {s.tag: int(s.count) for s in streams(r)} == {"params": 4, "dropout": 2}
