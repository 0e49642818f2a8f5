"""nnx.grad and nnx.value_and_grad: what is differentiated, in which form, and what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import AliasError, DifferentiatedWriteError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def param(x=1.0, **kwargs):
  return nnx.Param(jnp.full(2, x), **kwargs)


def plain(tree):
  """Values as lists, in the same structure of dicts."""
  if isinstance(tree, nnx.State):
    return {k: plain(tree[k]) for k in tree}
  if isinstance(tree, dict):
    return {k: plain(v) for k, v in tree.items()}
  if isinstance(tree, list | tuple):
    return [plain(x) for x in tree]
  return tree[...].tolist() if isinstance(tree, nnx.Variable) else np.asarray(tree).tolist()


def tracer_free(tree):
  """No leaf of any sort is a tracer: all can be read."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return all(np.asarray(x).shape is not None for x in leaves)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


# the form of the gradient
@STORAGE
def test_the_gradient_of_a_module_is_a_state_of_lojax_variables(hijax):
  m = Node(w=param(3.0, tag="t"), inner=[Node(v=param(2.0))], stat=nnx.BatchStat(1.0), n=2)
  m = nnx.to_hijax(m) if hijax else nnx.to_lojax(m)
  grads = nnx.grad(lambda m: (m.w * m.inner[0].v).sum() * m.n * m.stat)(m)
  assert isinstance(grads, nnx.State)
  assert plain(grads) == {"w": [4.0, 4.0], "inner": {0: {"v": [6.0, 6.0]}}}
  assert type(grads.w) is nnx.Param and not grads.w.is_hijax and grads.w.tag == "t"
  assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(m, nnx.Param))
  grads.w[...] = 0.0  # it is the caller's own, and writable
  assert plain(m.w) == [3.0, 3.0]


FORMS = {
  "variable": (lambda: param(3.0), lambda x: (x * x).sum(), [6.0, 6.0]),
  "array": (lambda: jnp.full(2, 3.0), lambda x: (x * x).sum(), [6.0, 6.0]),
  "number": (lambda: 3.0, lambda x: x * x, 6.0),
  "batch stat": (lambda: nnx.BatchStat(3.0), lambda x: x * x, 6.0),
  "dict": (
    lambda: {"m": Node(w=param(3.0), s=nnx.BatchStat(1.0)), "x": jnp.ones(2), "v": param(2.0)},
    lambda d: (d["m"].w * d["x"] * d["v"]).sum(),
    {"m": {"w": [2.0, 2.0]}, "x": [6.0, 6.0], "v": [3.0, 3.0]},
  ),
  "tuple": (
    lambda: (Node(w=param(3.0)), param(2.0)),
    lambda t: (t[0].w * t[1]).sum(),
    [{"w": [2.0, 2.0]}, [3.0, 3.0]],
  ),
  "state": (
    lambda: nnx.state(Node(w=param(3.0), s=Node(v=param(2.0)))),
    lambda s: (s.w * s["s"]["v"]).sum(),
    {"w": [2.0, 2.0], "s": {"v": [3.0, 3.0]}},
  ),
  "state of arrays": (
    lambda: nnx.State({"w": jnp.full(2, 3.0)}),
    lambda s: (s.w * s["w"]).sum(),
    {"w": [6.0, 6.0]},
  ),
  "pytree value": (
    lambda: Node(v=nnx.Param({"a": jnp.full(2, 3.0)})),
    lambda m: (m.v["a"] ** 2).sum(),
    {"v": {"a": [6.0, 6.0]}},
  ),
  "shared": (
    lambda: (lambda v: Node(a=v, b=Node(c=v)))(param(3.0)),
    lambda m: (m.a * m.b.c).sum(),
    {"a": [6.0, 6.0]},
  ),
}


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_has_the_form_of_the_argument(name, jit):
  make, loss, want = FORMS[name]
  grads = jit(lambda x: nnx.grad(loss)(x))(make())
  if name == "pytree value":
    grads = {"v": grads["v"].get_value()}
  assert plain(grads) == want


def test_value_and_grad_with_aux_returns_models_and_arrays():
  m = Node(w=param(3.0))

  @nnx.value_and_grad(has_aux=True)
  def loss(m, x):
    new = Node(w=nnx.Param(x), same=m, v=nnx.Variable(jax.lax.stop_gradient(m.w * 2)))
    return (m.w * x).sum(), {"new": new, "m": m, "x": m.w * 5, "n": 3}

  (value, aux), grads = loss(m, jnp.ones(2))
  assert float(value) == 6.0 and plain(grads) == {"w": [1.0, 1.0]}
  assert aux["m"] is m and aux["new"].same is m
  assert aux["new"].w.is_hijax and plain(aux["new"].v) == [6.0, 6.0]
  assert aux["x"].tolist() == [15.0, 15.0] and int(aux["n"]) == 3
  aux["new"].w[...] = 0.0
  grads, aux = nnx.grad(lambda m: ((m.w * 2).sum(), "x" and m.w * 1), has_aux=True)(m)
  assert plain(grads) == {"w": [2.0, 2.0]} and aux.tolist() == [3.0, 3.0]


def test_the_value_may_be_a_variable():
  v = nnx.Param(3.0)
  assert float(nnx.grad(lambda v: v)(v)) == 1.0


# what is selected
def test_wrt_selects_variables_of_modules():
  m = Node(a=param(2.0, tag="x"), b=param(3.0), s=nnx.BatchStat(jnp.full(2, 5.0)))
  loss = lambda m: (m.a * m.b * m.s).sum()
  grad = lambda wrt: plain(nnx.grad(loss, wrt=wrt)(m))
  assert grad(nnx.BatchStat) == {"s": [6.0, 6.0]}
  assert grad("x") == {"a": [15.0, 15.0]}
  assert grad((nnx.BatchStat, "x")) == {"a": [15.0, 15.0], "s": [6.0, 6.0]}
  assert grad(...) == {"a": [15.0, 15.0], "b": [10.0, 10.0], "s": [6.0, 6.0]}
  assert grad(nnx.All(nnx.Param, nnx.Not("x"))) == {"b": [10.0, 10.0]}
  assert grad(nnx.PathContains("b")) == {"b": [10.0, 10.0]}
  assert grad(lambda path, v: path == ("a",)) == {"a": [15.0, 15.0]}
  assert grad(None) == {}


def test_argnums_select_arguments():
  m, x = Node(w=param(3.0), s=nnx.BatchStat(2.0)), jnp.full(2, 5.0)
  loss = lambda x, m: (m.w * x * m.s).sum()
  assert plain(nnx.grad(loss, argnums=1)(x, m)) == {"w": [10.0, 10.0]}
  assert plain(nnx.grad(loss, argnums=(0, 1))(x, m)) == [[6.0, 6.0], {"w": [10.0, 10.0]}]
  assert plain(nnx.grad(loss, argnums=(1, 0))(x, m)) == [{"w": [10.0, 10.0]}, [6.0, 6.0]]
  assert plain(nnx.grad(loss, argnums=-1)(x, m)) == {"w": [10.0, 10.0]}
  assert plain(nnx.grad(loss, argnums=[1])(x, m)) == [{"w": [10.0, 10.0]}]
  diff = nnx.DiffState(1, nnx.BatchStat)
  assert plain(nnx.grad(loss, argnums=diff)(x, m)) == {"s": 30.0}
  assert plain(nnx.grad(loss, argnums=(0, diff))(x, m)) == [[6.0, 6.0], {"s": 30.0}]


def test_an_argnum_out_of_range_is_an_error():
  with pytest.raises((IndexError, ValueError)):
    nnx.grad(lambda m: m.w.sum(), argnums=3)(Node(w=param()))


def test_keywords_are_passed_and_written():
  m, k = Node(w=param(3.0)), Node(s=nnx.Variable(0.0), w=param(2.0))

  def loss(m, *, k):
    k.s[...] += 1
    return (m.w * k.w).sum()

  assert plain(nnx.grad(loss)(m, k=k)) == {"w": [2.0, 2.0]}
  assert float(k.s) == 1.0


def test_holomorphic_and_allow_int_are_those_of_jax():
  v = nnx.Param(jnp.array(2.0 + 1j))
  grads = nnx.grad(lambda v: v * v, holomorphic=True)(v)
  assert complex(grads) == 4 + 2j
  n = nnx.Param(3)
  with pytest.raises(TypeError, match=r"grad requires real- or complex-valued inputs"):
    nnx.grad(lambda n: n * 1.0)(n)
  got = nnx.grad(lambda n: n * 1.0, allow_int=True)(n)
  assert got[...].dtype == jax.dtypes.float0


def test_a_scalar_is_required_as_in_jax():
  big = jnp.ones(1000)
  for f, got in (
    (lambda m: m.w * big, r"float32\[1000\]"),
    (lambda m: (m.w.sum(), big), r"\(float32\[\], float32\[1000\]\)"),
    (lambda m: None, "None"),
  ):
    with pytest.raises(TypeError, match=rf"one number(.|\n)*got: {got}\n(.|\n)*has_aux=True"):
      nnx.grad(f)(Node(w=nnx.Param(1.0)))
  with pytest.raises(TypeError, match=r"returns \(loss, aux\)(.|\n)*got: float32\[\]"):
    nnx.value_and_grad(lambda m: m.w * 2, has_aux=True)(Node(w=nnx.Param(1.0)))


# sharing
def test_a_variable_in_two_differentiated_arguments_is_refused():
  v = param()
  m = Node(w=v)
  with pytest.raises(AliasError) as error:
    nnx.grad(lambda a, b: (a.w * b).sum(), argnums=(0, 1))(m, v)
  assert error.value.args[0] == (
    "one Variable is in two differentiated arguments\n"
    f"  at:  Node.w  (Param, created at test_autodiff.py:{v._def.origin.line})\n"
    "  got: the same Variable in argument 0 and in argument 1\n"
    "  fix: differentiate one argument that holds both"
  )


def test_a_variable_shared_with_an_argument_that_is_not_differentiated_counts_everywhere():
  v = param(3.0)
  assert plain(nnx.grad(lambda a, b: (a.w * b).sum())(Node(w=v), v)) == {"w": [6.0, 6.0]}


def test_a_module_by_closure_is_a_constant_and_its_state_is_written():
  m, other = Node(w=param(3.0)), Node(w=param(2.0), s=nnx.BatchStat(0.0), c=nnx.Variable(0))

  def loss(m):
    other.s[...] = (m.w * other.w).sum()
    other.c[...] += 1
    return (m.w * other.w).sum()

  assert plain(nnx.grad(loss)(m)) == {"w": [2.0, 2.0]}
  assert float(other.s) == 12.0 and int(other.c) == 1


# writes
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
def test_other_state_is_written_in_place(jit):
  m = Node(w=param(3.0), stat=nnx.BatchStat(0.0), count=nnx.Variable(0), rngs=nnx.Rngs(0))

  def loss(m):
    m.stat[...] = (m.w * 2).sum()
    m.count[...] += 1
    return (m.w * jax.random.normal(m.rngs(), (2,))).sum()

  step = jit(lambda m: nnx.value_and_grad(loss)(m))
  for i in range(3):
    _, grads = step(m)
    want = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (2,))
    np.testing.assert_allclose(grads.w[...], want, rtol=1e-6)
  assert float(m.stat) == 12.0 and int(m.count) == 3 and int(m.rngs.default.count) == 3


def test_writes_to_lojax_state_reach_the_caller():
  m = nnx.to_lojax(Node(w=param(3.0), stat=nnx.BatchStat(0.0), count=nnx.Variable(0)))

  def loss(m):
    m.stat[...] = (m.w * 2).sum()
    m.count[...] += 1
    return m.w.sum()

  nnx.grad(loss)(m)
  nnx.grad(loss)(m)
  assert float(m.stat) == 12.0 and int(m.count) == 2
  assert tracer_free(m)


@STORAGE
def test_a_write_to_what_is_differentiated_is_refused(hijax):
  m = Node(w=param(3.0, is_hijax=hijax), inner=Node(s=nnx.BatchStat(1.0, is_hijax=hijax)))

  def loss(m, how):
    how(m)
    return m.w.sum()

  hows = [
    lambda m: m.w.set_value(jnp.zeros(2)),
    lambda m: m.w.__iadd__(1),
    lambda m: m.w.__setitem__(0, 1.0),
    lambda m: setattr(m, "w", jnp.zeros(2)),
    lambda m: m.w.set_metadata(tag="x"),
    lambda m: jax.jit(lambda m: m.w.set_value(jnp.zeros(2)))(m),
    lambda m: nnx.jit(lambda m: m.w.set_value(jnp.zeros(2)))(m),
    lambda m: nnx.update(m, {"w": jnp.zeros(2)}),
  ]
  for how in hows:
    with pytest.raises(DifferentiatedWriteError) as error:
      nnx.grad(loss)(m, how)
    assert error.value.args[0] == (
      "a Variable cannot be written while it is differentiated\n"
      f"  at:  Node.w  (Param, created at test_autodiff.py:{m.w._def.origin.line})\n"
      "  got: a write inside a function whose gradient is taken with respect to it\n"
      "  fix: write it after the gradient, or leave it out with wrt=: it has no gradient then"
    )
    assert plain(m.w) == [3.0, 3.0]
  m.w[...] = 1.0  # afterwards it is writable again
  assert plain(m.w) == [1.0, 1.0]
  grads = nnx.grad(lambda m: (m.w.sum(), m.inner.s.set_value(2.0))[0])(m)
  assert plain(grads) == {"w": [1.0, 1.0]} and float(m.inner.s) == 2.0


def test_a_helper_under_plain_jit_that_a_loss_used_returns_writable_models_afterwards():
  """`jax.jit` keeps the structure of its first trace, so the mark must not outlive the loss."""
  m = Node(w=param(3.0))
  twice = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))
  assert plain(nnx.grad(lambda m: twice(m).w.sum())(m)) == {"w": [2.0, 2.0]}
  out = twice(nnx.to_lojax(m))
  out.w[...] = 0.0
  assert plain(out.w) == [0.0, 0.0]


def test_a_clone_or_copy_of_what_is_differentiated_may_be_written():
  m = Node(w=param(3.0))

  def loss(m):
    twin = nnx.to_lojax(m)
    twin.w[...] = twin.w * twin.w
    return twin.w.sum()

  assert plain(nnx.grad(loss)(m)) == {"w": [6.0, 6.0]}
  assert plain(m.w) == [3.0, 3.0]


def test_through_lets_gradients_flow_through_state():
  m = Node(w=nnx.Param(3.0), memory=nnx.Variable(1.0), other=nnx.Variable(0.0))

  def loss(m):
    for _ in range(2):
      m.memory[...] = m.memory * m.w
    return m.memory[...]

  with pytest.raises(DifferentiatedWriteError, match=r"at:  Node\.memory"):
    nnx.grad(loss)(m)
  assert float(m.memory) == 1.0
  for through in (nnx.PathContains("memory"), nnx.Variable):
    m.memory[...] = 1.0
    grads = nnx.grad(loss, through=through)(m)
    assert float(grads.w) == 6.0 and float(m.memory) == 9.0
  m.memory[...] = 1.0
  value, grads = jax.jit(lambda m: nnx.value_and_grad(loss, through=nnx.Variable)(m))(m)
  assert float(value) == 9.0 and float(grads.w) == 6.0 and float(m.memory) == 9.0


def test_a_sown_activation_carries_its_gradient():
  class Net(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(3.0)

    def __call__(self, x):
      self.sow(nnx.Intermediate, "h", self.w * x)
      return x

  def loss(net):
    net(2.0)
    return nnx.pop(net, nnx.Intermediate)["h"][0] ** 2

  net = Net()
  assert float(nnx.grad(loss)(net).w) == 24.0
  assert not hasattr(net, "h")


def test_structural_changes_reach_the_caller():
  m = Node(w=param(3.0), n=1)

  def loss(m):
    m.n = 2
    m.stat = nnx.BatchStat((m.w * 2).sum())
    m.layers = [m.stat]
    return m.w.sum()

  nnx.grad(loss)(m)
  assert m.n == 2 and float(m.stat) == 12.0 and m.layers[0] is m.stat and m.stat.is_hijax
  assert len(jax.tree.leaves(m)) == 2 and tracer_free(m)


# errors
@STORAGE
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_after_an_exception_no_tracer_is_left_and_the_parameters_are_as_before(jit, hijax):
  m = Node(w=param(3.0), lo=nnx.Variable(1.0), stat=nnx.BatchStat(1.0), n=1, layers=[1])
  m = nnx.to_hijax(m) if hijax else nnx.to_lojax(m)

  def loss(m, fail):
    m.lo[...] = 7.0
    m.stat[...] = m.w.sum()
    m.n = 2
    m.layers.append(3)
    m.new = nnx.Variable(0.0)
    if fail:
      raise RuntimeError("boom")
    return m.w.sum()

  def step(m):
    return nnx.grad(loss)(m, True)

  with pytest.raises(RuntimeError, match="boom"):
    (nnx.jit(step) if jit else step)(m)
  assert tracer_free(m) and m.n == 1 and len(m.layers) == 1 and not hasattr(m, "new")
  assert plain(m.w) == [3.0, 3.0]
  if jit or not hijax:
    assert float(m.lo) == float(m.stat) == 1.0
  assert plain(nnx.grad(loss)(m, False)) == {"w": [1.0, 1.0]}
  assert m.n == 2 and float(m.lo) == 7.0 and float(m.stat) == 6.0


# nesting
def test_plain_transforms_inside():
  m = Node(w=param(3.0), stat=nnx.BatchStat(0.0))

  def loss(m):
    @jax.jit
    def f(m, x):
      m.stat[...] += 1
      return m.w * x

    y = f(m, jnp.ones(2)) + jax.checkpoint(lambda m: jnp.sin(m.w))(m)
    z = jax.vmap(lambda x: (m.w * x).sum())(jnp.arange(3.0))
    s, _ = jax.lax.scan(lambda c, x: (c + (m.w * x).sum(), None), 0.0, jnp.arange(3.0))
    return y.sum() + z.sum() + s

  for step in (nnx.grad(loss), jax.jit(lambda m: nnx.grad(loss)(m))):
    grads = step(m)
    np.testing.assert_allclose(grads.w[...], 1 + np.cos(3.0) + 6, rtol=1e-6)
  assert float(m.stat) == 2.0


def test_gradients_under_plain_vmap_and_scan():
  stack = Node(w=nnx.Param(jnp.arange(6.0).reshape(3, 2)), c=nnx.Variable(jnp.zeros(3)))

  def loss(m):
    m.c[...] += 1
    return (m.w**2).sum()

  grads = jax.vmap(lambda m: nnx.grad(loss)(m))(stack)
  np.testing.assert_allclose(grads.w[...], 2 * stack.w[...])
  _, grads = jax.lax.scan(lambda c, m: (c, nnx.grad(loss)(m)), 0, stack)
  np.testing.assert_allclose(grads.w[...], 2 * stack.w[...])
  assert stack.c[...].tolist() == [2.0] * 3


def test_second_derivatives():
  m = Node(w=nnx.Param(3.0), c=nnx.Variable(0))

  def loss(m):
    m.c[...] += 1
    return m.w**3

  second = nnx.grad(lambda m: nnx.grad(loss)(m).w[...])(m)
  assert float(second.w) == 18.0 and int(m.c) == 1
  # jax.grad over nnx.grad, and the other way round
  assert float(jax.grad(lambda x: nnx.grad(lambda m: m.w**2 * x)(m).w[...])(2.0)) == 6.0
  inner = lambda m: jax.grad(lambda x: m.w**2 * x**2)(2.0)
  assert float(nnx.grad(inner)(m).w) == 24.0


def test_meta_learning_differentiates_through_an_inner_step():
  m = Node(w=nnx.Param(3.0))

  def outer(m):
    grads = nnx.grad(lambda m: m.w**2)(m)
    fast = nnx.to_lojax(m)
    fast.w[...] = fast.w - 0.1 * grads.w
    return fast.w**2

  # (w - 0.2 w)^2 = 0.64 w^2
  np.testing.assert_allclose(nnx.grad(outer)(m).w[...], 1.28 * 3, rtol=1e-6)


def test_plain_grad_of_a_functional_model_equals_nnx_grad():
  m = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  loss = lambda m: (m(jnp.arange(3.0)) ** 2).sum()
  want = jax.grad(loss)(nnx.to_lojax(m))
  got = nnx.grad(loss)(m)
  np.testing.assert_allclose(got.kernel[...], want.kernel[...], rtol=1e-6)
  np.testing.assert_allclose(got.bias[...], want.bias[...], rtol=1e-6)


def test_the_decorated_function_keeps_its_name_and_docstring():
  @nnx.grad
  def loss(m):
    """The loss."""
    return m.w.sum()

  assert loss.__name__ == "loss" and loss.__doc__ == "The loss."
  assert plain(loss(Node(w=param()))) == {"w": [1.0, 1.0]}


def test_flax_nnx_gives_the_same_gradients():
  flax = pytest.importorskip("flax.nnx", reason="flax is the oracle here")
  x = jnp.arange(6.0).reshape(2, 3)

  def gradients(lib):
    class Net(lib.Module):
      def __init__(self, rngs):
        self.a = lib.Linear(3, 4, rngs=rngs)
        self.b = lib.Linear(4, 2, rngs=rngs)

      def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))

    value, grads = lib.value_and_grad(lambda m: (m(x) ** 2).mean())(Net(lib.Rngs(0)))
    flat = [(p, np.asarray(v[...])) for p, v in lib.to_flat_state(grads)]
    return float(value), [p for p, _ in flat], [v for _, v in flat]

  got, want = gradients(nnx), gradients(flax)
  assert got[0] == pytest.approx(want[0], rel=1e-6) and got[1] == want[1]
  for a, b in zip(got[2], want[2], strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "value_and_grad"])
@pytest.mark.parametrize("late", [False, True], ids=["inside", "after"])
def test_an_eager_derivative_that_raises_leaves_all_state_as_it_was(transform, late):
  stat, count, w = nnx.BatchStat(jnp.zeros(2)), nnx.Variable(0), nnx.Param(jnp.ones(2))
  parts = nnx.Variable({"a": jnp.zeros(2)})

  def f(w):
    stat[...] = w * 2
    stat[...] = w * 3
    count[...] += 1
    parts["a"] = parts["a"] + 1
    if not late:
      raise KeyError("from inside")
    return "not a number"

  calls = {
    "grad": lambda: nnx.grad(f)(w),
    "value_and_grad": lambda: nnx.value_and_grad(f)(w),
    "vjp": lambda: nnx.vjp(f, w),
    "jvp": lambda: nnx.jvp(f, (w,), (jnp.ones(2),)),
  }
  with pytest.raises((KeyError, TypeError)):
    calls[transform]()
  np.testing.assert_array_equal(stat, [0.0, 0.0])
  np.testing.assert_array_equal(parts["a"], [0.0, 0.0])
  assert int(count) == 0
  nnx.grad(lambda w: (stat.set_value(w * 2), w.sum())[1])(w)
  np.testing.assert_array_equal(stat, [2.0, 2.0])


def test_gradients_flow_through_state_in_loops_remat_and_branches():
  memory, w = nnx.Variable(1.0), nnx.Param(3.0)

  def step(m, w):
    m[...] = m * w

  def loss(w, m):
    nnx.remat(step)(m, w)
    nnx.fori_loop(0, 2, lambda i, m: (step(m, w), m)[1], m)
    nnx.cond(True, step, lambda m, w: None, m, w)
    return m[...]

  value, grad = nnx.value_and_grad(loss, through=nnx.Variable)(w, memory)
  assert float(value) == float(memory) == 3.0**4
  assert float(grad) == 4 * 3.0**3


def test_what_a_nested_transform_wrote_by_closure_is_taken_back_too():
  count, w = nnx.Variable(0), nnx.Param(jnp.ones(2))

  def increment(x):
    count[...] += 1
    return x

  def f(w):
    nnx.fori_loop(0, 3, lambda i, x: increment(x), w[...])
    raise KeyError

  with pytest.raises(KeyError):
    nnx.grad(f)(w)
  assert int(count) == 0


def test_what_a_compiled_function_inside_wrote_is_taken_back_too():
  count, w = nnx.Variable(0), nnx.Param(jnp.ones(2))
  increment = jax.jit(lambda count: count.set_value(count + 1))
  increment(count)  # compiled: the next call runs no Python

  def f(w, count):
    increment(count)
    raise KeyError

  with pytest.raises(KeyError):
    nnx.grad(f)(w, count)
  assert int(count) == 1
