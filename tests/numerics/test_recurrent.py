import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import (
  GRADIENT_TOLERANCE,
  QUICK,
  TOLERANCE,
  assert_close,
  linen,
  normal,
  project,
)

GATES = {
  "LSTMCell": {
    **{f"i{g}": (["ii", "if_", "ig", "io"][i], 0) for i, g in enumerate("ifgo")},
    **{f"h{g}": (["hi", "hf", "hg", "ho"][i], 0) for i, g in enumerate("ifgo")},
  },
  "OptimizedLSTMCell": {
    f"{side}{g}": (f"dense_{side}", i) for side in "ih" for i, g in enumerate("ifgo")
  },
  "GRUCell": {f"{side}{g}": (f"dense_{side}", i) for side in "ih" for i, g in enumerate("rzn")},
  "SimpleCell": {"i": ("dense_i", 0), "h": ("dense_h", 0)},
}
"""Where the parameters of each gate of Linen are: the attribute, and which part of its columns."""

SIZE = 4
# Linen adds up the products of the gates in bfloat16, where ours are one product.
ROUGH = dict.fromkeys(map(jnp.dtype, (jnp.float32, jnp.bfloat16)), 2e-2)
FLOATS = st.sampled_from((jnp.float32, jnp.bfloat16))


def to_linen(name, tree, like):
  """Parameters or gradients of a cell of Refax, as Linen names them; zeros where it has more."""
  out = {}
  for gate, (layer, part) in GATES[name].items():
    columns = slice(part * SIZE, (part + 1) * SIZE)
    found = {k: v[..., columns] for k, v in tree[layer].items() if v is not None}
    out[gate] = {k: found.get(k, jnp.zeros_like(v)) for k, v in like[gate].items()}
  return out


def values(state):
  return {name: {k: v[...] for k, v in layer.items()} for name, layer in state.items()}


def twins(name, dtype, param_dtype, **more):
  """A cell of Refax with random parameters, and the cell of Linen with its parameters."""
  options = {"dtype": dtype, "param_dtype": param_dtype, **more}
  zeros = {f"{prefix}kernel_init": nnx.initializers.zeros for prefix in ("", "recurrent_")}
  model = getattr(nnx, name)(3, SIZE, **options | zeros, rngs=nnx.Rngs(0))
  for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
    p[...] = normal(i, p.shape, p.dtype) / 2
  layer = getattr(linen, name)(SIZE, **options)
  x = jnp.ones((2, 3))
  carry = jax.eval_shape(lambda: layer.initialize_carry(jax.random.key(0), x.shape))
  like = jax.eval_shape(lambda c: layer.init(jax.random.key(0), c, x), carry)["params"]
  like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  return model, layer, to_linen(name, values(nnx.state(model, nnx.Param)), like), like


def grads(fn, *args):
  fn = jax.grad(fn, argnums=tuple(range(len(args))), has_aux=True)
  return jax.jit(fn, compiler_options=QUICK)(*args)


def total(tree):
  return sum(map(project, jax.tree.leaves(tree)))


def assert_equal(name, got, want, like, of, rough=False):
  (own, *own_inputs), own_out = got
  (gradients, *inputs), out = want
  close, close_gradient = (ROUGH, ROUGH) if rough else (TOLERANCE, GRADIENT_TOLERANCE)
  for a, b in zip(jax.tree.leaves(own_out), jax.tree.leaves(out), strict=True):
    assert_close(a, b, close, of=of)
  own = to_linen(name, values(own), like)
  for gate, parameters in gradients.items():
    for kind, gradient in parameters.items():
      if (name, gate, kind) != ("GRUCell", "hn", "bias"):  # Flax NNX has none, nor have we
        assert_close(own[gate][kind], gradient, close_gradient, of=of)
  for a, b in zip(jax.tree.leaves(own_inputs), jax.tree.leaves(inputs), strict=True):
    assert_close(a, b, close_gradient, of=of)


@pytest.mark.parametrize("name", GATES)
@settings(max_examples=3, deadline=None)
@given(
  dtype=st.sampled_from((None, jnp.float32, jnp.bfloat16)),
  param_dtype=FLOATS,
  input_dtype=FLOATS,
  residual=st.booleans(),
)
def test_a_cell_equals_that_of_linen(name, dtype, param_dtype, input_dtype, residual):
  more = {"residual": residual} if name == "SimpleCell" else {}
  if param_dtype == jnp.bfloat16:
    more["recurrent_kernel_init"] = nnx.initializers.normal()  # Linen's QR knows no bfloat16
  model, layer, params, like = twins(name, dtype, param_dtype, **more)
  parts = tuple(normal(8 + i, (2, SIZE), param_dtype) for i in range(model.states))
  carry, x = parts if model.states > 1 else parts[0], normal(7, (2, 3), input_dtype)

  def theirs(params, carry, x):
    out = layer.apply({"params": params}, carry, x)
    return total(out), out

  graphdef, own, rest = nnx.split(model, nnx.Param, ...)

  def ours(own, carry, x):
    out = nnx.merge(graphdef, own, rest)(carry, x)
    return total(out), out

  want, got = grads(theirs, params, carry, x), grads(ours, nnx.to_lojax(own), carry, x)
  rough = jnp.bfloat16 in (dtype, param_dtype, input_dtype)
  assert_equal(name, got, want, like, (name, "Flax Linen"), rough)


@settings(max_examples=6, deadline=None)
@given(
  name=st.sampled_from(sorted(GATES)),
  time_major=st.booleans(),
  reverse=st.booleans(),
  keep_order=st.booleans(),
  lengths=st.one_of(st.none(), st.lists(st.integers(1, 4), min_size=2, max_size=2)),
  unroll=st.sampled_from((1, 3)),
)
def test_an_rnn_equals_that_of_linen(name, lengths, **options):
  model, layer, params, like = twins(name, None, jnp.float32)
  rnn = nnx.RNN(model, **options, return_carry=True)
  theirs_rnn = linen.RNN(layer, **options, return_carry=True)
  x = normal(7, (4, 2, 3) if options["time_major"] else (2, 4, 3))
  seq_lengths = None if lengths is None else jnp.array(lengths)

  def theirs(params, x):
    out = theirs_rnn.apply({"params": {"cell": params}}, x, seq_lengths=seq_lengths)
    return total(out), out

  graphdef, own, rest = nnx.split(rnn, nnx.Param, ...)

  def ours(own, x):
    out = nnx.merge(graphdef, own, rest)(x, seq_lengths=seq_lengths)
    return total(out), out

  want, got = grads(theirs, params, x), grads(ours, nnx.to_lojax(own), x)
  (gradients, *inputs), out = got
  got = (gradients["cell"], *inputs), out
  assert_equal(name, got, want, like, ("RNN", "Flax Linen"))


@pytest.mark.parametrize("lengths", [None, [3, 1]])
def test_bidirectional_equals_that_of_linen(lengths):
  pairs = [twins("GRUCell", None, jnp.float32) for _ in range(2)]
  first = pairs[0][0].dense_i.kernel
  first[...] = first[...] * 2  # so that the two differ
  like = pairs[0][3]
  cells = [to_linen("GRUCell", values(nnx.state(p[0], nnx.Param)), like) for p in pairs]
  seq_lengths = None if lengths is None else jnp.array(lengths)
  x, options = normal(7, (2, 4, 3)), {"return_carry": True, "seq_lengths": seq_lengths}
  got = nnx.Bidirectional(*(nnx.RNN(p[0]) for p in pairs))(x, **options)
  layer = linen.Bidirectional(*(linen.RNN(linen.GRUCell(SIZE)) for _ in range(2)))
  params = {"forward_rnn": {"cell": cells[0]}, "backward_rnn": {"cell": cells[1]}}
  want = layer.apply({"params": params}, x, **options)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert_close(a, b, of=("Bidirectional", "Flax Linen"))


@pytest.mark.filterwarnings("ignore:keep_rngs:UserWarning")
@pytest.mark.parametrize("name", GATES)
def test_initial_weights_are_those_of_flax_nnx(name):
  flax_nnx = pytest.importorskip("flax.nnx", reason="initial weights are compared with Flax NNX")
  own = getattr(nnx, name)(3, SIZE, keep_rngs=True, rngs=nnx.Rngs(7))
  other = getattr(flax_nnx, name)(3, SIZE, keep_rngs=True, rngs=flax_nnx.Rngs(7))
  draw = nnx.initializers.normal()
  got, want = (cell.initialize_carry((2, 3), carry_init=draw) for cell in (own, other))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)
  x, carry = normal(7, (2, 3)), got
  for a, b in zip(jax.tree.leaves(own(carry, x)), jax.tree.leaves(other(carry, x)), strict=True):
    assert_close(a, b, of=(name, "Flax NNX"))
