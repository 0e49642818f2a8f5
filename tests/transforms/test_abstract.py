"""nnx.eval_shape and nnx.make_jaxpr: what a function would do, without doing it."""

import jax
import jax.numpy as jnp
import optax
import pytest

from refax import nnx
from refax.errors import ShapeMismatchError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def shapes(tree):
  is_variable = lambda x: isinstance(x, nnx.Variable)
  leaves = jax.tree.leaves(tree, is_leaf=is_variable)
  return [x.get_value() if is_variable(x) else x for x in leaves]


# eval_shape
def test_a_constructor_gives_an_abstract_model_without_memory():
  size = 10**6  # 4 TB, if it were computed
  m = nnx.eval_shape(lambda: nnx.Linear(size, size, rngs=nnx.Rngs(0)))
  assert type(m) is nnx.Linear and type(m.kernel) is nnx.Param and m.kernel.is_hijax
  assert m.kernel[...] == jax.ShapeDtypeStruct((size, size), jnp.float32)
  assert m.in_features == size and m.kernel.shape == (size, size)
  assert m.kernel.nbytes == 4 * size**2


def test_an_abstract_model_has_the_structure_of_the_real_one():
  create = lambda: Node(
    norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)), layers=[nnx.Dropout(0.5, rngs=nnx.Rngs(0))], k=1
  )
  abstract, real = nnx.eval_shape(create), nnx.to_lojax(create())
  assert nnx.graphdef(abstract) == nnx.graphdef(real)
  assert [(x.shape, x.dtype) for x in shapes(abstract)] == [
    (x.shape, x.dtype) for x in shapes(real)
  ]
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in shapes(abstract))


def test_a_real_model_grows_out_of_an_abstract_one():
  abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(abstract)
  state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state)
  assert nnx.merge(graphdef, state)(jnp.ones(2)).tolist() == [3.0, 3.0, 3.0]


def test_abstract_arguments():
  abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  x = jax.ShapeDtypeStruct((5, 2), jnp.float32)
  want = jax.ShapeDtypeStruct((5, 3), jnp.float32)
  for m in (abstract, nnx.Linear(2, 3, rngs=nnx.Rngs(0))):
    assert nnx.eval_shape(lambda m, x: {"y": m(x)}, m, x) == {"y": want}
    assert nnx.eval_shape(lambda m, *, x: m(x), m, x=x) == want


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_nothing_is_written_and_copies_are_returned(hijax):
  m = Node(v=nnx.Variable(1.0), n=nnx.Variable(0))
  m = m if hijax else nnx.to_lojax(m)
  v = m.v

  def f(m):
    m.v[...] = 5.0
    m.n = nnx.Variable(jnp.zeros(3))
    m.extra = "new"
    return m

  out = nnx.eval_shape(f, m)
  assert out is not m and out.n.shape == (3,) and out.extra == "new"
  assert m.v is v and float(v) == 1.0 and not hasattr(m, "extra") and m.v.is_hijax == hijax
  assert isinstance(out.v[...], jax.ShapeDtypeStruct)


def test_closures_are_not_written():
  count = nnx.Variable(0)

  def f(x):
    count[...] += 1
    return x + count

  assert nnx.eval_shape(f, 1.0).shape == ()
  assert int(count) == 0


def test_sharing_is_kept():
  def create():
    v = nnx.Param(jnp.zeros(3))
    return Node(a=v, b=[v])

  m = nnx.eval_shape(create)
  assert m.a is m.b[0]


def test_transforms_inside():
  stack = nnx.eval_shape(
    lambda: nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(nnx.Rngs(0).split(7))
  )
  assert stack.kernel.shape == (7, 4, 4)
  grads = nnx.eval_shape(nnx.grad(lambda m: m.kernel.sum()), stack)
  assert isinstance(grads, nnx.State) and grads["kernel"].shape == (7, 4, 4)


# make_jaxpr
def test_state_is_input_and_output_of_the_jaxpr():
  m = Node(v=nnx.Variable(jnp.zeros(3)), n=nnx.Variable(0))

  def f(m, x):
    m.n += 1
    return m.v * x

  jaxpr, out = nnx.make_jaxpr(f, return_shape=True)(m, jnp.float32(2.0))
  assert sorted(str(a) for a in jaxpr.in_avals) == ["float32[3]", "float32[]", "int32[]"]
  assert sorted(str(a) for a in jaxpr.out_avals) == ["float32[3]", "float32[3]", "int32[]"]
  assert out[0] == (jax.ShapeDtypeStruct((3,), jnp.float32),)
  assert int(m.n) == 0
  text = str(jaxpr)
  assert " mul " in text and " add " in text


def test_nothing_is_computed():
  ran = []
  f = lambda v: jax.pure_callback(
    lambda: ran.append(0) or 1.0, jax.ShapeDtypeStruct((), jnp.float32)
  )
  nnx.make_jaxpr(f)(nnx.Variable(1.0))
  nnx.eval_shape(f, nnx.Variable(1.0))
  assert ran == []


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("fill", ["update", "assignment", "restore", "safetensors"])
def test_an_abstract_model_that_is_filled_trains_as_one_that_was_built(fill, hijax, tmp_path):
  def start():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)}

  x = jax.random.normal(jax.random.key(1), (4, 2))

  def train(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 3).mean())(model)
    optimizer.update(model, grads)
    return loss

  with nnx.use_hijax(hijax):
    built, abstract = start(), nnx.eval_shape(start)
    for v in jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nnx.Variable)):
      assert v.is_hijax == hijax
    if fill == "update":
      nnx.update(abstract, nnx.state(built))
    elif fill == "restore":
      with nnx.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, built)
        checkpointer.restore(abstract)
    elif fill == "safetensors":
      nnx.save_safetensors(built, tmp_path / "m.safetensors")
      nnx.load_safetensors(abstract, tmp_path / "m.safetensors")
    else:
      pairs = zip(*(nnx.to_flat_state(nnx.variables(x)) for x in (built, abstract)), strict=True)
      for (_, source), (_, target) in pairs:
        target[...] = source[...]
    for v in jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nnx.Variable)):
      assert v.is_hijax == hijax
    step = jax.jit(train) if hijax else nnx.jit(train)
    losses = [[float(step(**x)) for _ in range(3)] for x in (built, abstract)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_an_abstract_variable_takes_what_fits_and_no_more():
  m = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  with pytest.raises(ShapeMismatchError, match=r"Linear\.kernel(.|\n)*got: float32\[5,5\]"):
    m.kernel[...] = jnp.ones((5, 5))
  assert isinstance(m.kernel.get_raw_value(), jax.ShapeDtypeStruct)
  x = jnp.ones((2, 3))
  m.kernel[...] = x
  nnx.jit(lambda m: m.kernel.set_value(m.kernel * 2))(nnx.Dict(kernel=m.kernel))
  assert not x.is_deleted() and float(m.kernel[0, 0]) == 2.0


def test_the_gradients_of_an_abstract_model_are_lojax():
  grads = nnx.eval_shape(
    lambda: nnx.grad(lambda m: m(jnp.ones(2)).sum())(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  )
  assert not grads["kernel"].is_hijax and grads["kernel"].shape == (2, 3)
