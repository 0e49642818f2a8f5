"""Arguments that argnums and in_axes count, given by keyword."""

import functools

import jax.numpy as jnp
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, TreeMismatchError
from refax.transforms.positions import by_position

X = jnp.arange(6.0).reshape(3, 2)


def loss(model, x, *, scale=1.0):
  return model(x).sum() * scale


@pytest.fixture
def model():
  return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


CALLS = {
  "model by keyword": lambda f, m: f(model=m, x=X),
  "all by keyword, in another order": lambda f, m: f(scale=1.0, x=X, model=m),
  "x by keyword": lambda f, m: f(m, x=X),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_gradients_are_of_the_argument_of_that_name(model, name, wrap):
  want = nnx.grad(loss)(model, X)
  found = CALLS[name](wrap(nnx.grad(loss)), model)
  assert found["kernel"].tolist() == want["kernel"].tolist()
  value, grads = CALLS[name](wrap(nnx.value_and_grad(loss)), model)
  assert float(value) == float(loss(model, X))
  assert grads["bias"].tolist() == want["bias"].tolist()


def test_gradients_of_several_arguments_and_of_a_later_one(model):
  want = nnx.grad(loss, argnums=(0, 1))(model, X)
  found = nnx.grad(loss, argnums=(0, 1))(x=X, model=model)
  assert found[1].tolist() == want[1].tolist()
  assert nnx.grad(loss, argnums=1)(model, x=X).tolist() == want[1].tolist()
  state = nnx.DiffState(1, ...)
  assert nnx.grad(loss, argnums=state)(x=X, model=model).tolist() == want[1].tolist()


@pytest.mark.parametrize("argnums", [2, (0, 5), -3])
def test_an_argument_that_is_not_there_is_named(model, argnums):
  with pytest.raises(InvalidArgumentError, match=r"argnums=-?\d\n  fix: .*there are 2"):
    nnx.grad(loss, argnums=argnums)(model, X)


def test_keyword_only_arguments_are_not_counted(model):
  with pytest.raises(InvalidArgumentError, match="there are 0"):
    nnx.grad(lambda *, model: model(X).sum())(model=model)
  with pytest.raises(InvalidArgumentError, match="there are 0"):
    nnx.grad(lambda **models: models["model"](X).sum())(model=model)


def test_axes_are_of_the_argument_of_that_name(model):
  want = nnx.vmap(model)(X).tolist()
  mapped = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))
  assert mapped(model=model, x=X).tolist() == want
  assert mapped(x=X, model=model).tolist() == want
  assert mapped(model, x=X).tolist() == want
  assert nnx.jit(mapped)(model=model, x=X).tolist() == want
  more = nnx.vmap(lambda model, x, scale: model(x) * scale, in_axes=(None, 0))
  assert more(model, x=X, scale=jnp.ones(3)).tolist() == want  # beyond the tuple: axis 0, as in JAX


def test_a_scan_takes_its_carry_by_keyword():
  run = nnx.scan(lambda carry, x: (carry + x, carry), in_axes=(nnx.Carry, 0))
  total, steps = run(x=jnp.arange(3.0), carry=jnp.zeros(()))
  assert float(total) == 3.0
  assert steps.tolist() == [0, 0, 1]


def test_axes_for_arguments_that_are_not_there_are_refused(model):
  mapped = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0, 0))
  with pytest.raises(TreeMismatchError, match="3 axes for 2 positional"):
    mapped(model, X)
  with pytest.raises(TreeMismatchError, match="2 axes for 0 positional"):
    nnx.vmap(lambda **kw: kw["x"], in_axes=(None, 0))(model=model, x=X)


def test_what_has_no_signature_is_called_as_it_is():
  assert by_position(dict, (), {"a": 1}, 1) == ((), {"a": 1})
  f = functools.partial(lambda a, b, c: None, 1)
  assert by_position(f, (), {"c": 3, "b": 2}, 1) == ((2,), {"c": 3})
  assert by_position(lambda a, /, b: None, (1,), {"b": 2}, 2) == ((1, 2), {})
  assert by_position(lambda a, /, b: None, (), {"a": 1, "b": 2}, 2) == ((), {"a": 1, "b": 2})
