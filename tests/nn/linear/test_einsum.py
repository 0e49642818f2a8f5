import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


def einsum(*args, **options):
  return nnx.Einsum(*args, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(("spec", "shape", "bias", "broadcast"), [
  ("abc,cde->abde", (2, 6, 3), (4, 5), (1, 1, 4, 5)),
  ("abc,cde->aedb", (2, 6, 3), (5, 4), (1, 5, 4, 1)),
  ("bcd,cde->bce", (2, 3, 4), (3, 5), (1, 3, 5)),
  ("...c,cde->...de", (2, 6, 3), (4, 5), (1, 1, 4, 5)),
  ("...c,cde->d...e", (2, 6, 3), (4, 5), (4, 1, 1, 5)),
  ("...c,c...e->...e", (2, 4, 3), (4, 5), (1, 4, 5)),
  ("abc , cde -> abde", (2, 6, 3), (4, 5), (1, 1, 4, 5)),
  ("xcd,cde->x", (2, 3, 4), (), ()),
])  # fmt: skip
def test_einsum_multiplies_sums_and_adds_a_bias(spec, shape, bias, broadcast):
  model = einsum(spec, (3, 4, 5), bias, bias_init=nnx.initializers.normal())
  x = jax.random.normal(jax.random.key(0), shape)
  assert (model.kernel.shape, model.bias.shape) == ((3, 4, 5), bias)
  want = jnp.einsum(spec, x, model.kernel[...]) + model.bias[...].reshape(broadcast)
  np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)


def test_without_a_bias_shape_bias_is_none():
  model = einsum("ab,bc->ac", (3, 4))
  assert model.bias is None
  assert len(jax.tree.leaves(nnx.state(model))) == 1
  np.testing.assert_allclose(model(jnp.ones((2, 3))), model.kernel[...].sum(0)[None].repeat(2, 0),
                             rtol=1e-5)  # fmt: skip


def test_the_argument_of_the_call_goes_before_the_attribute():
  model, x = einsum("ab,bc->ac", (3, 4), (4,)), jnp.ones((2, 3))
  np.testing.assert_allclose(model(x, "ab,bc->ca"), model(x).T, rtol=1e-6)
  assert model.einsum_str == "ab,bc->ac"


def test_options_are_passed_on():
  seen = {}

  def op(*args, **kwargs):
    seen.update(kwargs)
    return jnp.einsum(*args, **kwargs)

  einsum("a,ab->b", (2, 3), einsum_op=op, precision="highest")(jnp.ones(2))
  assert seen == {"precision": "highest"}
  einsum("a,ab->b", (2, 3), einsum_op=op, preferred_element_type=jnp.float32)(jnp.ones(2))
  assert seen["preferred_element_type"] is jnp.float32
  meta = {"kernel_metadata": {"tag": "k"}, "bias_metadata": {"tag": "b"}}
  model = einsum("a,ab->b", (2, 3), (3,), **meta)
  assert (model.kernel.tag, model.bias.tag) == ("k", "b")


@pytest.mark.parametrize(("args", "got", "fix"), [
  (("abc,cde", (3, 4, 5)), "einsum_str='abc,cde'", 'two operands, input and kernel, and an output'),
  (("a,b,c->abc", (3,)), "einsum_str='a,b,c->abc'", "two operands"),
  (("a1,ab->b", (3, 4)), "einsum_str='a1,ab->b'", "two operands"),
  ((None, (3,)), "einsum_str=None", "two operands"),
  (("abc,cd->abd", (3, 4, 5)), "kernel_shape=(3, 4, 5)", "2 sizes, as 'abc,cd->abd' names"),
  (("abc,cd->abd", (3,)), "kernel_shape=(3,)", "2 sizes"),
  (("ab,...bc->...ac", (3,)), "kernel_shape=(3,)", "2 sizes"),
  (("abc,cde->abde", (3, 0, 5)), "kernel_shape=0", "an int of at least 1"),
  (("abc,cde->abde", (3, 4, 5), (5,)), "bias_shape=(5,)", "(4, 5)"),
  (("abc,cde->aedb", (3, 4, 5), (4, 5)), "bias_shape=(4, 5)", "(5, 4)"),
])  # fmt: skip
def test_what_does_not_fit_the_notation_is_refused(args, got, fix):
  with pytest.raises(InvalidArgumentError) as error:
    einsum(*args)
  lines = error.value.args[0].split("\n")
  assert lines[0].startswith("Einsum cannot work with this ")
  assert lines[1] == f"  got: {got}"
  assert lines[2].startswith(f"  fix: pass {fix}")


def test_a_notation_of_the_call_that_does_not_fit_is_refused():
  model = einsum("ab,bc->ac", (3, 4), (4,))
  with pytest.raises(InvalidArgumentError, match=r"bias_shape=\(4,\)\n  fix: pass \(3,\)"):
    model(jnp.ones((2, 4)), "ac,bc->ab")


@pytest.mark.parametrize(("spec", "shape", "got", "fix"), [
  ("abc,cde->abde", (1, 2, 4), "(1, 2, 4): c of size 4", "c of size 3"),
  ("bcd,cde->bce", (1, 1, 9), "(1, 1, 9): c of size 1, d of size 9", "c of size 3, d of size 4"),
  ("abc,cde->abde", (2, 3), "(2, 3): 2 axes", "axes abc"),
  ("abc,cde->abde", (2, 2, 2, 3), "(2, 2, 2, 3): 4 axes", "axes abc"),
  ("...ac,cde->...ade", (3,), "(3,): 1 axes", "axes ...ac"),
])  # fmt: skip
def test_an_input_of_other_axes_names_layer_place_axes_and_fix(spec, shape, got, fix):
  with pytest.raises(ShapeMismatchError) as error:
    einsum(spec, (3, 4, 5))(jnp.ones(shape))
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"Einsum {spec!r} takes an input of axes {spec.split(',')[0]}"
  assert lines[1].startswith("  at:  Einsum.kernel  (Param, created at test_einsum.py:")
  assert lines[2] == f"  got: an input of shape {got}"
  assert lines[3] == f"  fix: pass an input with {fix}, or build Einsum with other sizes"


@pytest.mark.parametrize("hijax", [True, False])
def test_a_layer_under_transforms(hijax):
  with nnx.use_hijax(hijax):
    model = einsum("nta,hab->nthb", (4, 6, 3), (4, 3))
  x = jax.random.normal(jax.random.key(0), (2, 5, 6))
  apply, want = lambda model, x: model(x), model(x)
  for transform in (jax.jit, nnx.jit, nnx.remat):
    np.testing.assert_allclose(transform(apply)(model, x), want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(nnx.merge(*nnx.split(model))(x), want, rtol=1e-6)
  assert nnx.graphdef(model) == nnx.graphdef(nnx.merge(*nnx.split(model)))


def test_stacked_layers_are_mapped():
  build = lambda rngs: nnx.Einsum("ab,bc->ac", (2, 3), (3,), rngs=rngs)
  layers = nnx.vmap(build)(nnx.Rngs(0).split(3))
  got = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, jnp.ones((5, 2)))
  assert got.shape == (3, 5, 3)
  assert not np.allclose(got[0], got[1])
