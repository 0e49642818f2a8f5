import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, MissingRngError, ShapeMismatchError

CELLS = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]
of_each_cell = pytest.mark.parametrize("Cell", CELLS, ids=lambda c: c.__name__)


def is_pair(Cell):
  return "LSTM" in Cell.__name__


@of_each_cell
def test_a_step_returns_the_carry_and_the_output(Cell):
  cell, x = Cell(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 3))
  carry, y = cell(cell.initialize_carry(x.shape), x)
  assert y.shape == (2, 5, 4)
  assert (carry[1] if is_pair(Cell) else carry) is y
  assert cell.num_feature_axes == 1


@of_each_cell
def test_the_first_carry_is_zeros_and_needs_no_random_numbers(Cell):
  carry = Cell(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).initialize_carry((2, 3))
  for part in jax.tree.leaves(carry):
    assert part.shape == (2, 4)
    assert part.dtype == jnp.bfloat16
    assert not part.any()


@of_each_cell
def test_a_carry_may_be_drawn(Cell):
  draw = nnx.initializers.normal()
  cell = Cell(3, 4, carry_init=draw, keep_rngs=True, rngs=nnx.Rngs(0, carry=1))
  assert cell.rngs.tag == "carry"
  first, second = (jax.tree.leaves(cell.initialize_carry((2, 3))) for _ in range(2))
  assert (first[0] != second[0]).any()
  assert not is_pair(Cell) or (first[0] != first[1]).any()
  rngs = nnx.Rngs(carry=5)
  other = jax.tree.leaves(cell.initialize_carry((2, 3), rngs))[0]
  np.testing.assert_array_equal(other, draw(nnx.Rngs(carry=5).carry(), (2, 4), jnp.float32))
  assert int(rngs.carry.count) == 1 + is_pair(Cell)
  ones = cell.initialize_carry((2, 3), carry_init=nnx.initializers.ones)
  assert all((part == 1).all() for part in jax.tree.leaves(ones))


def test_a_carry_that_is_drawn_needs_random_numbers():
  cell = nnx.GRUCell(3, 4, carry_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
  assert cell.rngs is None
  with pytest.raises(MissingRngError) as error:
    cell.initialize_carry((2, 3))
  assert error.value.args[0] == (
    "the carry_init of GRUCell needs random numbers\n"
    "  got: no rngs, neither when it was built (with keep_rngs=True) nor now\n"
    "  fix: pass rngs=nnx.Rngs(carry=0)"
  )
  with pytest.raises(InvalidArgumentError, match=r"got: rngs=3\n  fix: pass nnx.Rngs\(carry=0\)"):
    cell.initialize_carry((2, 3), 3)


@of_each_cell
def test_options_and_metadata_reach_the_parameters(Cell):
  metadata = {"kernel": "k", "recurrent_kernel": "r", "bias": "b"}
  options = {f"{name}_metadata": {"tag": tag} for name, tag in metadata.items()}
  options |= {"param_dtype": jnp.bfloat16, "bias_init": nnx.initializers.ones}
  cell = Cell(3, 4, **options, rngs=nnx.Rngs(0))
  tags = {}
  for path, p in nnx.to_flat_state(nnx.state(cell)):
    assert p.dtype == jnp.bfloat16
    tags.setdefault(p.tag, []).append(path)
    assert p.tag != "b" or (p[...] == 1).all()
  assert tags.keys() == {"k", "r", "b"}
  assert len(tags["k"]) == len(tags["r"])


def test_recurrent_matrices_are_orthogonal():
  kernel = nnx.LSTMCell(3, 6, rngs=nnx.Rngs(0)).hi.kernel[...]
  np.testing.assert_allclose(kernel @ kernel.T, np.eye(6), atol=1e-5)


@of_each_cell
def test_a_wrong_input_is_named(Cell):
  cell = Cell(3, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ShapeMismatchError) as error:
    cell(cell.initialize_carry((2, 3)), jnp.ones((2, 5)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"{Cell.__name__} maps vectors of size 3"
  assert lines[1].startswith(
    f"  at:  {Cell.__name__}.{'ii' if Cell is CELLS[0] else 'dense_i'}.ker"
  )
  assert lines[2:] == [
    "  got: an input of shape (2, 5)",
    f"  fix: make the last axis 3, or build {Cell.__name__} with the input's size",
  ]


@of_each_cell
def test_a_wrong_carry_is_named(Cell):
  cell = Cell(3, 4, rngs=nnx.Rngs(0))
  part = jnp.ones((2, 5))
  carry, shape = ((part, part), ((2, 5), (2, 5))) if is_pair(Cell) else (part, (2, 5))
  with pytest.raises(ShapeMismatchError) as error:
    cell(carry, jnp.ones((2, 3)))
  lines = error.value.args[0].split("\n")
  one = "[..., 4]"
  assert lines[0] == f"{Cell.__name__} carries {f'{one} and {one}' if is_pair(Cell) else one}"
  assert lines[2:] == [
    f"  got: a carry of shape {shape}",
    "  fix: start with cell.initialize_carry(inputs.shape)",
  ]


def test_an_lstm_does_not_take_one_array_for_a_carry():
  cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ShapeMismatchError, match=r"LSTMCell carries \[..., 4\] and \[..., 4\]"):
    cell(jnp.ones((2, 4)), jnp.ones((2, 3)))


@of_each_cell
@pytest.mark.parametrize(("sizes", "got"), [((0, 4), "in_features=0"), ((3, 2.0), "hidden_feat")])
def test_sizes_that_are_none_are_refused(Cell, sizes, got):
  with pytest.raises(InvalidArgumentError, match=f"{Cell.__name__} cannot(.|\n)*got: {got}"):
    Cell(*sizes, rngs=nnx.Rngs(0))
  with pytest.raises(InvalidArgumentError, match=f"{Cell.__name__} cannot(.|\n)*got: rngs=0"):
    Cell(3, 4, rngs=0)


def test_the_base_says_what_a_cell_lacks():
  with pytest.raises(NotImplementedError, match=r"RNNCellBase\.initialize_carry"):
    nnx.RNNCellBase().initialize_carry((2, 3))
  with pytest.raises(NotImplementedError, match=r"RNNCellBase\.__call__"):
    nnx.RNNCellBase()(None, None)
