import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError, TreeMismatchError
from refax.nn.recurrent.rnn import flip_sequences
from tests.numerics.twin import normal


def gru(seed=0, **options):
  return nnx.GRUCell(3, 4, rngs=nnx.Rngs(seed), **options)


class Stateful(nnx.RNNCellBase):
  """A cell with a Dropout, running statistics and a counter."""

  def __init__(self, rngs):
    self.inner = nnx.GRUCell(3, 4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
    self.steps = nnx.Variable(0)

  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    return self.inner.initialize_carry(input_shape, rngs, carry_init)

  def __call__(self, carry, inputs):
    self.steps[...] += 1
    carry, y = self.inner(carry, self.norm(inputs))
    return carry, self.dropout(y)


def loop(cell, x):
  """The cell over `[batch, time, features]`, in Python."""
  carry, outputs = cell.initialize_carry(x[:, 0].shape), []
  for t in range(x.shape[1]):
    carry, y = cell(carry, x[:, t])
    outputs.append(y)
  return carry, jnp.stack(outputs, 1)


def assert_close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def assert_same_state(a, b):
  flat = [dict(nnx.to_flat_state(nnx.state(m, nnx.Not(nnx.RngKey)))) for m in (a, b)]
  assert flat[0].keys() == flat[1].keys()
  for path, value in flat[0].items():
    np.testing.assert_allclose(value, flat[1][path], rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("Cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_rnn_is_a_loop_over_its_cell(Cell, dtype):
  cell, x = Cell(3, 4, dtype=dtype, rngs=nnx.Rngs(0)), normal(0, (2, 5, 3))
  want = loop(cell, x)
  got = nnx.RNN(cell)(x, return_carry=True)
  dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
  assert dtypes(got) == dtypes(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2), got, want)


def test_it_is_one_scan():
  text = str(nnx.make_jaxpr(lambda rnn, x: rnn(x))(nnx.RNN(gru()), normal(0, (2, 5, 3))))
  assert text.count("scan[") == 1


@pytest.mark.parametrize("run", [
  lambda rnn, x: rnn(x, return_carry=True),
  lambda rnn, x: jax.jit(lambda rnn, x: rnn(x, return_carry=True))(rnn, x),
  lambda rnn, x: nnx.jit(lambda rnn, x: rnn(x, return_carry=True))(rnn, x),
  lambda rnn, x: nnx.remat(lambda rnn, x: rnn(x, return_carry=True))(rnn, x),
], ids=["eager", "jax.jit", "nnx.jit", "nnx.remat"])  # fmt: skip
def test_state_of_the_cell_is_that_of_a_loop(run):
  cells, x = [Stateful(nnx.Rngs(0)) for _ in range(2)], normal(0, (2, 5, 3))
  want, rnn = loop(cells[0], x), nnx.RNN(cells[1])
  got = run(rnn, x)
  assert_close(got, want)
  assert_same_state(rnn.cell, cells[0])
  assert int(rnn.cell.steps) == int(rnn.cell.dropout.rngs.count) == 5
  zeros = np.asarray(got[1] == 0).reshape(2, 5, 4)
  assert any((zeros[:, 0] != zeros[:, t]).any() for t in range(1, 5))


def test_gradients_through_a_stateful_cell_are_those_of_a_loop():
  cells, x = [Stateful(nnx.Rngs(0)) for _ in range(2)], normal(0, (2, 5, 3))
  want = nnx.grad(lambda cell: (loop(cell, x)[1] ** 2).sum())(cells[0])
  loss = lambda rnn: (rnn(x) ** 2).sum()
  rnn = nnx.RNN(cells[1])
  got = nnx.grad(loss)(rnn)["cell"]
  for path, value in nnx.to_flat_state(want):
    np.testing.assert_allclose(dict(nnx.to_flat_state(got))[path], value, rtol=1e-4, atol=1e-5)
  assert_same_state(rnn.cell, cells[0])


def test_random_streams_may_give_the_same_keys_at_every_step():
  class Noise(nnx.RNNCellBase):
    def __init__(self):
      self.rngs = nnx.Rngs(noise=0, other=1)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
      return jnp.zeros(input_shape[:-1])

    def __call__(self, carry, inputs):
      draws = (
        self.rngs.noise.normal((2,)),
        self.rngs.noise.normal((2,)),
        self.rngs.other.normal((2,)),
      )
      return carry, jnp.stack(draws, -1)

  rnn, x = nnx.RNN(Noise(), broadcast_rngs="noise"), jnp.ones((2, 4, 3))
  y = rnn(x)
  assert (y[:, :, :2] == y[:, :1, :2]).all()
  assert (y[:, 0, 0] != y[:, 0, 1]).all()
  assert (y[:, 1:, 2] != y[:, :1, 2]).all()
  counts = [int(stream.count) for _, stream in rnn.cell.rngs.items()]
  assert counts == [2, 4]


def test_steps_may_have_state_of_their_own():
  class Scale(nnx.RNNCellBase):
    def __init__(self):
      self.scale = nnx.Param(jnp.arange(4.0))
      self.seen = nnx.BatchStat(jnp.zeros(()))

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
      return jnp.zeros(input_shape)

    def __call__(self, carry, inputs):
      self.seen[...] += 1
      return carry + 1, inputs * self.scale[...]

  rnn = nnx.RNN(Scale(), state_axes={nnx.Param: 0, ...: nnx.Carry})
  y = rnn(jnp.ones((4, 1)))
  assert y[:, 0].tolist() == [0, 1, 2, 3]
  assert float(rnn.cell.seen) == 4


def test_lengths_say_which_carry_is_returned():
  cell, x = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)), normal(0, (4, 5, 3))
  lengths = jnp.array([2, 5, 0, 9])
  (c, h), outputs = nnx.RNN(cell)(x, seq_lengths=lengths, return_carry=True)
  assert_close(outputs, loop(cell, x)[1])
  for i, n in enumerate((2, 5, 0, 5)):
    want = loop(cell, x[i : i + 1, :n])[0] if n else cell.initialize_carry((1, 3))
    assert_close((c[i : i + 1], h[i : i + 1]), want)


def test_a_reversed_sequence_starts_at_its_length():
  cell, x, lengths = gru(), normal(0, (3, 5, 3)), [2, 5, 1]
  rnn = nnx.RNN(cell, reverse=True, return_carry=True)
  carry, outputs = rnn(x, seq_lengths=jnp.array(lengths))
  kept = rnn(x, seq_lengths=jnp.array(lengths), keep_order=True)[1]
  for i, n in enumerate(lengths):
    last, want = loop(cell, x[i : i + 1, :n][:, ::-1])
    assert_close(carry[i : i + 1], last)
    assert_close(outputs[i : i + 1, :n], want)
    assert_close(kept[i : i + 1, :n], want[:, ::-1])


def test_time_may_be_first_and_the_batch_of_any_rank():
  rnn, x = nnx.RNN(gru()), normal(0, (2, 3, 5, 3))
  want = rnn(x)
  assert want.shape == (2, 3, 5, 4)
  first = jnp.moveaxis(x, 2, 0)
  assert_close(rnn(first, time_major=True), jnp.moveaxis(want, 2, 0))
  assert_close(rnn(x[0, 0]), want[0, 0])
  lengths = jnp.array([[1, 2, 3], [4, 5, 1]])
  options = {"seq_lengths": lengths, "reverse": True, "return_carry": True}
  carry, outputs = rnn(x, **options)
  carry_first, outputs_first = rnn(first, time_major=True, **options)
  assert_close(carry_first, carry)
  assert_close(outputs_first, jnp.moveaxis(outputs, 0 + 2, 0))


def test_a_carry_is_handed_over():
  rnn, x = nnx.RNN(gru(), return_carry=True), normal(0, (2, 6, 3))
  carry, first = rnn(x[:, :4])
  last, second = rnn(x[:, 4:], initial_carry=carry)
  assert_close((last, jnp.concatenate([first, second], 1)), rnn(x))


def test_the_first_carry_is_drawn_from_the_streams_of_the_rnn():
  cell = gru(carry_init=nnx.initializers.normal())
  x = jnp.ones((2, 1, 3))
  run = lambda rnn, **options: rnn(x, **options)
  rnn = nnx.RNN(cell, rngs=nnx.Rngs(1))
  assert (run(rnn) != run(rnn)).any()
  assert (run(rnn, rngs=nnx.Rngs(2)) == run(rnn, rngs=nnx.Rngs(2))).all()
  assert (run(nnx.RNN(cell)) == run(nnx.RNN(cell))).all()
  assert nnx.RNN(cell, rngs=False).rngs is None


def test_an_empty_sequence_gives_the_first_carry():
  carry, outputs = nnx.RNN(gru())(jnp.ones((2, 0, 3)), return_carry=True)
  assert not carry.any()
  assert outputs.shape == (2, 0, 4)


def test_stacked_rnns_are_mapped():
  make = lambda rngs: nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))
  rnns, x = nnx.vmap(make)(nnx.Rngs(0).split(3)), normal(0, (2, 5, 3))
  got = nnx.vmap(lambda rnn, x: rnn(x), in_axes=(0, None))(rnns, x)
  assert_close(jax.vmap(lambda rnn, x: rnn(x), in_axes=(0, None))(rnns, x), got)
  keys = nnx.Rngs(0).split(3)
  for i in range(3):
    key = keys.default.key[i]
    assert_close(got[i], make(nnx.Rngs(key))(x))
  rnn = make(nnx.Rngs(0))
  assert_close(jax.vmap(lambda x: rnn(x))(x), rnn(x))


def test_it_survives_split_and_merge():
  rnn, x = nnx.RNN(gru()), normal(0, (2, 5, 3))
  graphdef, params, rest = nnx.split(rnn, nnx.Param, ...)
  assert_close(nnx.merge(graphdef, params, rest)(x), rnn(x))
  assert nnx.graphdef(nnx.RNN(gru())) == graphdef


@pytest.mark.parametrize("time_major", [False, True])
def test_bidirectional_merges_both_directions(time_major):
  there, back, x = nnx.RNN(gru(0)), nnx.RNN(gru(1)), normal(0, (2, 5, 3))
  both = nnx.Bidirectional(there, back, time_major=time_major)
  lengths = jnp.array([3, 5])
  carry, outputs = both(
    jnp.swapaxes(x, 0, 1) if time_major else x, return_carry=True, seq_lengths=lengths
  )
  outputs = jnp.swapaxes(outputs, 0, 1) if time_major else outputs
  options = {"return_carry": True, "seq_lengths": lengths}
  forward, backward = there(x, **options), back(x, reverse=True, keep_order=True, **options)
  assert_close(carry, (forward[0], backward[0]))
  assert_close(outputs, jnp.concatenate([forward[1], backward[1]], -1))
  added = nnx.Bidirectional(there, back, merge_fn=jnp.add)(x, initial_carry=(carry[1], carry[0]))
  want = there(x, initial_carry=carry[1])
  want += back(x, initial_carry=carry[0], reverse=True, keep_order=True)
  assert_close(added, want)


def test_bidirectional_may_be_reversed_and_nested():
  there, back, x = nnx.RNN(gru(0)), nnx.RNN(gru(1)), normal(0, (2, 5, 3))
  both = nnx.Bidirectional(there, back)
  want = nnx.Bidirectional(there, back)(x[:, ::-1])
  assert_close(both(x, reverse=True), want)
  assert_close(both(x, reverse=True, keep_order=True), want[:, ::-1])
  nested = nnx.Bidirectional(both, nnx.RNN(gru(2)))
  assert nested(x).shape == (2, 5, 12)
  assert_close(nested(x)[..., :8], both(x))
  assert_close(nested(x, reverse=True), nested(x[:, ::-1]))


def test_flipped_sequences_keep_their_padding_behind():
  x = jnp.array([[1, 2, 3, 0, 9], [4, 0, 0, 8, 9], [5, 6, 7, 8, 9]])
  lengths = jnp.array([3, 1, 9])
  want = [[3, 2, 1, 9, 0], [4, 9, 8, 0, 0], [9, 8, 7, 6, 5]]
  assert flip_sequences(x, lengths, 1, False).tolist() == want
  assert flip_sequences(x.T, lengths, 1, True).T.tolist() == want
  assert flip_sequences(x, None, 1, False).tolist() == x[:, ::-1].tolist()
  assert flip_sequences(x[..., None], lengths, 1, False)[..., 0].tolist() == want


def test_an_input_without_time_is_named():
  with pytest.raises(ShapeMismatchError) as error:
    nnx.RNN(gru())(jnp.ones(3))
  assert error.value.args[0] == (
    "RNN works on an axis of time and 1 of features\n"
    "  got: an input of shape (3,)\n"
    "  fix: pass an input of shape (..., time, features)"
  )


@pytest.mark.parametrize("lengths", [jnp.ones((3,), int), jnp.ones((2,)), jnp.ones((), int)])
def test_lengths_that_do_not_fit_are_named(lengths):
  got = f"{lengths.dtype}[{','.join(map(str, lengths.shape))}]"
  with pytest.raises(ShapeMismatchError) as error:
    nnx.RNN(gru())(jnp.ones((2, 5, 3)), seq_lengths=lengths)
  assert error.value.args[0] == (
    "RNN needs one length for each sequence\n"
    f"  got: seq_lengths of {got} for a batch of shape (2,)\n"
    "  fix: pass integers of shape (2,)"
  )


def test_a_wrong_input_is_named_before_any_state_changes():
  rnn = nnx.RNN(Stateful(nnx.Rngs(0)))
  with pytest.raises(ShapeMismatchError, match="BatchNorm was built for 3 features"):
    rnn(jnp.ones((2, 5, 4)))
  assert int(rnn.cell.steps) == 0
  with pytest.raises(TreeMismatchError, match="must return a carry like the one that it got"):
    rnn(jnp.ones((2, 5, 3)), initial_carry=jnp.ones(4))
  assert int(rnn.cell.steps) == 0


@pytest.mark.parametrize(("make", "got", "fix"), [
  (lambda: nnx.RNN(nnx.relu), "cell=", "an nnx.RNNCellBase"),
  (lambda: nnx.RNN(gru(), rngs=3), "rngs=3", r"nnx.Rngs\(carry=0\), True or False"),
  (lambda: nnx.Bidirectional(nnx.RNN(gru()), nnx.RNN(gru()), rngs=3), "rngs=3", r"nnx.Rngs\(ca"),
])  # fmt: skip
def test_what_is_no_cell_and_no_stream_is_refused(make, got, fix):
  with pytest.raises(InvalidArgumentError, match=f"got: {got}(.|\n)*fix: pass {fix}"):
    make()
