import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


@pytest.fixture
def embed():
  return nnx.Embed(5, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_embed_looks_up_rows(embed, dtype):
  np.testing.assert_array_equal(
    embed(jnp.array([[4, 0]], dtype)), embed.embedding[...][jnp.array([[4, 0]])]
  )


def test_negative_indices_count_from_the_end_and_others_give_nan(embed):
  y = embed(jnp.array([-1, 5, -6]))
  np.testing.assert_array_equal(y[0], embed.embedding[-1])
  assert jnp.isnan(y[1:]).all()


def test_numbers_and_lists_are_inputs(embed):
  assert embed(2).shape == (3,)
  assert embed([1, 2]).shape == (2, 3)


def test_attend_is_the_product_with_each_row(embed):
  query = jnp.ones((2, 3))
  np.testing.assert_allclose(embed.attend(query), query @ embed.embedding[...].T, rtol=1e-6)


def test_the_gradient_reaches_only_the_rows_that_were_looked_up(embed):
  embed = nnx.to_lojax(embed)
  gradient = jax.grad(lambda embed: embed(jnp.array([1, 1, 3])).sum())(embed)
  assert gradient.embedding[:, 0].tolist() == [0, 2, 0, 1, 0]


@pytest.mark.parametrize(("x", "got"), [
  (jnp.ones((2, 3)), "float32[2,3]"), (jnp.array([True]), "bool[1]"),
])  # fmt: skip
def test_an_input_that_is_no_integer_is_refused(embed, x, got):
  with pytest.raises(ShapeMismatchError) as error:
    embed(x)
  lines = error.value.args[0].split("\n")
  assert lines[0] == "Embed looks up integers"
  assert lines[1].startswith("  at:  Embed.embedding  (Param, created at test_embed.py:")
  assert lines[2] == f"  got: an input of {got}"
  assert lines[3] == "  fix: pass indices of an integer dtype: x.astype(int)"


def test_a_query_of_another_size_is_refused(embed):
  with pytest.raises(
    ShapeMismatchError, match=r"Embed.attend maps vectors of size 3(.|\n)*\(2, 4\)"
  ):
    embed.attend(jnp.ones((2, 4)))


def test_an_empty_table_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"Embed cannot .*\n  got: num_embeddings=0"):
    nnx.Embed(0, 3, rngs=nnx.Rngs(0))


def test_a_table_is_a_pytree(embed):
  x = jnp.array([1, 2])
  np.testing.assert_array_equal(jax.jit(lambda embed, x: embed(x))(embed, x), embed(x))
  stacked = jax.vmap(lambda rngs: nnx.Embed(5, 3, rngs=rngs))(nnx.Rngs(0).split(2))
  got = jax.vmap(lambda embed: embed(x))(stacked)
  np.testing.assert_array_equal(got, stacked.embedding[:, 1:3])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32])
def test_a_table_may_have_more_rows_than_the_indices_can_count(dtype):
  embed = nnx.Embed(300, 3, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(
    embed(jnp.array([3, 127], dtype)), embed.embedding[jnp.array([3, 127])]
  )
  np.testing.assert_array_equal(
    jax.jit(lambda embed, x: embed(x))(embed, jnp.array([5], dtype)), embed.embedding[5:6]
  )


@pytest.mark.parametrize(("query", "table", "dtype", "want"), [
  (jnp.float32, jnp.bfloat16, None, jnp.float32), (jnp.bfloat16, jnp.float32, None, jnp.float32),
  (jnp.bfloat16, jnp.bfloat16, None, jnp.bfloat16), (jnp.int32, jnp.float16, None, jnp.float16),
  (jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16),
])  # fmt: skip
def test_the_dtype_of_a_lookup_is_the_tables_and_that_of_attend_what_both_promote_to(
  query, table, dtype, want
):
  embed = nnx.Embed(5, 3, param_dtype=table, dtype=dtype, rngs=nnx.Rngs(0))
  assert embed(jnp.array([1])).dtype == (table if dtype is None else dtype)
  assert embed.attend(jnp.ones((2, 3), query)).dtype == want


@pytest.mark.skipif(_jax._private() is None, reason="looks at the buffer of a Ref")
def test_a_function_of_the_user_gets_no_buffer_of_the_table(embed):
  kept = []
  embed.promote_dtype = lambda xs, **_: (kept.extend(xs), xs)[1]
  embed(jnp.array([1]))
  embed.attend(jnp.ones(3))
  table = _jax.peek_cell(embed.embedding.get_raw_value()).unsafe_buffer_pointer()
  assert all(x.unsafe_buffer_pointer() != table for x in kept)
  before = np.asarray(embed.embedding)
  nnx.jit(lambda e: e.embedding.set_value(e.embedding * 0))(embed)
  assert (np.asarray(kept[0]) == before).all() and (np.asarray(kept[2]) == before).all()


@pytest.mark.skipif(_jax._private() is None, reason="counts copies of the buffer of a Ref")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_lookup_copies_no_table(monkeypatch, dtype):
  embed, copies = nnx.Embed(5, 3, dtype=dtype, rngs=nnx.Rngs(0)), []
  monkeypatch.setattr(_jax, "_copy", copies.append)
  rows = embed(jnp.array([1, 7]))
  logits = embed.attend(jnp.ones(3))
  assert not copies
  assert rows.dtype == logits.dtype == (dtype or jnp.float32)


def test_what_a_lookup_returns_outlives_the_table(embed):
  rows = embed(jnp.arange(5))
  before = np.asarray(rows).copy()
  nnx.jit(lambda e: e.embedding.set_value(e.embedding * 0))(embed)
  np.testing.assert_array_equal(rows, before)
