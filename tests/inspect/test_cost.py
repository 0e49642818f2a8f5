"""Operations counted in a jaxpr are those of XLA's cost analysis, and loops count as they run."""

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from refax.inspect.cost import Cost, by_path, layer_of, operations, with_all_below

X = jnp.ones((8, 16, 16, 3))

FUNCTIONS = {
  "matmul": lambda: (lambda a, b: a @ b, jnp.ones((4, 5)), jnp.ones((5, 6))),
  "batched": lambda: (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((2, 4, 5)),
                      jnp.ones((2, 5, 6))),
  "conv": lambda: (nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0)), X),
  "groups": lambda: (nnx.Conv(4, 8, (3, 3), padding="VALID", feature_group_count=2,
                              rngs=nnx.Rngs(0)), jnp.ones((8, 16, 16, 4))),
  "elementwise": lambda: (lambda x: x * 2 + x / 3, X),
  "linear": lambda: (nnx.Linear(3, 7, rngs=nnx.Rngs(0)), X),
  "gradient": lambda: (jax.grad(lambda w, x: ((x @ w) ** 2).sum()), jnp.ones((16, 4)),
                       jnp.ones((32, 16))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_flops_are_those_that_xla_counts(name):
  f, *args = FUNCTIONS[name]()
  want = jax.jit(f).lower(*args).cost_analysis()
  want = want[0] if isinstance(want, list) else want
  found = sum((x.cost for x in operations(jax.make_jaxpr(f)(*args).jaxpr)), Cost())
  assert found.flops == pytest.approx(want["flops"], rel=0.05)


def test_transcendentals_are_counted_apart():
  f = lambda x: jnp.exp(x) + jnp.tanh(x)
  found = sum((x.cost for x in operations(jax.make_jaxpr(f)(X).jaxpr)), Cost())
  assert (found.transcendentals, found.flops) == (2 * X.size, X.size)


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  w = jnp.ones((4, 4))
  f = lambda x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=10)[0]
  found = sum((x.cost for x in operations(jax.make_jaxpr(f)(jnp.ones((2, 4))).jaxpr)), Cost())
  assert found.flops == 10 * 2 * 2 * 4 * 4


def test_the_dearest_branch_counts():
  w = jnp.ones((4, 4))
  f = lambda p, x: jax.lax.cond(p, lambda x: x @ w @ w, lambda x: x @ w, x)
  found = operations(jax.make_jaxpr(f)(True, jnp.ones((2, 4))).jaxpr)
  assert sum(x.cost.flops for x in found if x.eqn.primitive.name == "dot_general") == 2 * 64


def test_costs_belong_to_the_innermost_layer_and_add_up():
  model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(0)))
  jaxpr = jax.make_jaxpr(model)(jnp.ones((3, 4))).jaxpr
  costs = by_path(operations(jaxpr), {"layers/0", "layers/1"})
  own = {path: cost.flops for (path, _), cost in costs.items()}
  assert own["layers/0"] == 2 * 3 * 4 * 8 + 3 * 8
  total = with_all_below({path: cost for (path, _), cost in costs.items()})
  assert total[""].flops == sum(own.values())
  assert total["layers"].flops == own["layers/0"] + own["layers/1"]
  assert layer_of(("a", "b", "jnp.dot"), {"a", "a/b"}) == "a/b"
  assert layer_of(("x",), {"a"}) == ""


def test_a_layer_that_is_called_transpose_is_not_backward():
  class Net(nnx.Module):
    def __init__(self):
      self.transpose = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.transpose(x)

  found = operations(jax.make_jaxpr(Net())(jnp.ones((2, 4))).jaxpr)
  assert not any(x.is_backward for x in found)
