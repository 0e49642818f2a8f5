"""torch_layout: each layer computes what torch's does, and nothing is guessed from a shape.

`torch_reference.safetensors` has layers of torch with an input and the output of each;
`write_torch_reference.py` wrote it.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as oracle

from refax import nnx
from refax.errors import CheckpointMismatchError, InvalidArgumentError

REFERENCE = oracle.load_file(Path(__file__).with_name("torch_reference.safetensors"))


@pytest.fixture
def path(tmp_path):
  return tmp_path / "torch.safetensors"


def stored(name, path):
  """Write the tensors of a layer of the reference to a file of their own."""
  start = f"{name}/"
  tensors = {key.removeprefix(start): x for key, x in REFERENCE.items() if key.startswith(start)}
  pair = tensors.pop("in"), tensors.pop("out")
  oracle.save_file(tensors, path)
  return pair


def load(model, path, rules, **kwargs):
  return nnx.load_safetensors(model, path, rename=nnx.torch_layout(model, rules), **kwargs)


RNGS = {"rngs": nnx.Rngs(0)}
last = lambda x: np.moveaxis(x, 1, -1)  # torch has channels first
NORM = {"epsilon": 1e-6} | RNGS
LAYERS = {
  "linear": lambda: nnx.Linear(4, 4, **RNGS),
  "linear_wide": lambda: nnx.Linear(3, 5, use_bias=False, **RNGS),
  "conv1d": lambda: nnx.Conv(3, 4, 3, padding=1, **RNGS),
  "conv2d": lambda: nnx.Conv(
    4, 6, (3, 2), strides=2, padding="VALID", feature_group_count=2, **RNGS
  ),
  "conv2d_square": lambda: nnx.Conv(3, 3, (3, 3), padding="VALID", **RNGS),
  "conv3d": lambda: nnx.Conv(2, 3, (1, 2, 3), padding="VALID", use_bias=False, **RNGS),
  "conv_transpose1d": lambda **k: nnx.ConvTranspose(3, 4, 3, 2, padding="VALID", **RNGS, **k),
  "conv_transpose2d": lambda **k: nnx.ConvTranspose(3, 3, (3, 2), 2, padding="VALID", **RNGS, **k),
  "conv_transpose3d": lambda **k: nnx.ConvTranspose(
    2, 3, (2, 2, 2), kernel_dilation=2, padding="VALID", **RNGS, **k
  ),
  "batch_norm": lambda: nnx.BatchNorm(3, use_running_average=True, **RNGS),
  "layer_norm": lambda: nnx.LayerNorm(6, **NORM),
  "rms_norm": lambda: nnx.RMSNorm(6, **NORM),
  "group_norm": lambda: nnx.GroupNorm(6, num_groups=2, **NORM),
  "instance_norm": lambda: nnx.InstanceNorm(3, epsilon=1e-5, **RNGS),
  "embedding": lambda: nnx.Embed(5, 5, **RNGS),
  "prelu": lambda: nnx.PReLU(),
  "weight_norm": lambda: nnx.WeightNorm(nnx.Linear(3, 5, **RNGS), **RNGS),
  "weight_norm_conv": lambda: nnx.WeightNorm(nnx.Conv(3, 3, 3, padding="VALID", **RNGS), **RNGS),
  "attention": lambda: nnx.MultiHeadAttention(2, 8, **RNGS),
  "attention_context": lambda: nnx.MultiHeadAttention(2, 6, in_kv_features=8, **RNGS),
}
TRANSPOSED = [f"conv_transpose{n}d" for n in (1, 2, 3)]


def apply(name, model, x):
  if name == "attention_context":
    return model(x, np.concatenate([x, x], -1)[..., :8])
  if x.ndim > 2 and name not in ("attention", "projections", "fused"):
    return np.moveaxis(model(last(x)), -1, 1)
  return model(x)


def check(name, model, path, rules=None):
  x, want = stored(name, path)
  report = load(model, path, rules or {})
  assert not report.missing and not report.unexpected
  np.testing.assert_allclose(apply(name, model, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_torchs_weights_computes_what_torch_does(path, name, hijax):
  with nnx.use_hijax(hijax):
    check(name, LAYERS[name](), path)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_has_two_layouts(path, name):
  check(name, LAYERS[name](transpose_kernel=True), path)


@pytest.mark.parametrize("name", ["linear", "conv2d", "batch_norm", "weight_norm"])
def test_an_abstract_layer_is_filled(path, name):
  check(name, nnx.eval_shape(LAYERS[name]), path)


def test_the_reference_has_no_layer_that_is_not_tested():
  names = {key.partition("/")[0] for key in REFERENCE}
  assert names == {*LAYERS, "projections", "fused"}


HEADS = {r"(q|k|v)_proj": r"\1", "q": "query", "k": "key", "v": "value", "o_proj": "out"}


def without_bias(**kwargs):
  """Attention whose output has no bias, as in the reference."""
  model = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, **kwargs)
  model.out.bias = None
  return model


def test_projections_of_fewer_heads(path):
  check("projections", without_bias(**RNGS), path, HEADS)


FUSED = {"c_attn": (["query", "key", "value"], np.transpose), "c_proj": ("out", np.transpose)}


def test_one_tensor_for_queries_keys_and_values(path):
  check("fused", nnx.MultiHeadAttention(2, 8, **RNGS), path, FUSED)


def test_one_tensor_of_queries_and_of_fewer_keys_is_cut_where_they_end(path):
  x, want = stored("projections", path)
  tensors = oracle.load_file(path)
  for kind in ("weight", "bias"):
    parts = [tensors.pop(f"{part}_proj.{kind}") for part in "qkv"]
    tensors[f"qkv.{kind}"] = np.concatenate(parts)
  oracle.save_file(tensors, path)
  model = without_bias(**RNGS)
  load(model, path, {"qkv": ["query", "key", "value"], "o_proj": "out"})
  np.testing.assert_allclose(model(x), want, rtol=1e-5, atol=1e-5)


# what has the weights: stacks, lists, other dtypes


class Block(nnx.Module):
  def __init__(self, *, rngs, dtype=jnp.float32):
    self.attention = nnx.MultiHeadAttention(2, 8, param_dtype=dtype, rngs=rngs)
    self.norm = nnx.LayerNorm(8, param_dtype=dtype, rngs=rngs)
    self.gain = nnx.Param(jnp.ones(8, dtype))

  def __call__(self, x):
    return x + self.gain * self.attention(self.norm(x))


def write_blocks(path, count=3):
  """A file with a tensor for each of many layers, as torch has them."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  tensors = {}
  for i in range(count):
    tensors |= {
      f"model.layers.{i}.attn.in_proj_weight": draw(24, 8),
      f"model.layers.{i}.attn.in_proj_bias": draw(24),
      f"model.layers.{i}.attn.out_proj.weight": draw(8, 8),
      f"model.layers.{i}.attn.out_proj.bias": draw(8),
      f"model.layers.{i}.ln.weight": draw(8),
      f"model.layers.{i}.ln.bias": draw(8),
      f"model.layers.{i}.gain": draw(8),
    }
  oracle.save_file(tensors, path)
  return tensors


BLOCKS = {
  r"model\.layers\.(\d+)": r"blocks.\1",
  r"(.*)\.attn": r"\1.attention",
  r"(.*)\.ln": r"\1.norm",
}
KINDS = {
  "list": lambda make: nnx.List([make(nnx.Rngs(0)) for _ in range(3)]),
  "stack": lambda make: nnx.Stack(lambda rngs: make(rngs), 3, rngs=nnx.Rngs(0)),
  "abstract": lambda make: nnx.eval_shape(lambda: KINDS["stack"](make)),
}


def model_of(kind, dtype=jnp.float32):
  blocks = KINDS[kind](lambda rngs: Block(rngs=rngs, dtype=dtype))
  return nnx.Dict(blocks=blocks)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "hijax"), list(itertools.product(KINDS, [True, False])))
def test_layers_of_a_stack_take_one_tensor_each(path, kind, hijax, dtype):
  write_blocks(path)
  with nnx.use_hijax(hijax):
    model, listed = model_of(kind, dtype), model_of("list", dtype)
  load(listed, path, BLOCKS, cast=True)
  report = load(model, path, BLOCKS, cast=True)
  assert not report.missing and len(report.loaded) == 3 * 11
  for i, block in enumerate(listed.blocks):
    got, want = (nnx.to_flat_state(nnx.state(b)) for b in (list(model.blocks)[i], block))
    for (at, a), (_, b) in zip(got, want, strict=True):
      assert a.dtype == dtype and np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes(), at
  if kind == "stack":
    name = "blocks.layers.norm.scale[2]"
    assert report.loaded[name] == "model.layers.2.ln.weight"


def values(model):
  return [np.asarray(v[...]).tobytes() for _, v in nnx.to_flat_state(nnx.state(model))]


def test_a_layer_that_is_missing_is_named_and_nothing_is_written(path):
  tensors = write_blocks(path)
  del tensors["model.layers.1.ln.bias"]
  oracle.save_file(tensors, path)
  model = model_of("stack")
  before = values(model)
  row = r"-  +blocks\.layers\.norm\.bias\[1\]  +nothing  +float32\[8\]"
  with pytest.raises(CheckpointMismatchError, match=rf"one mismatch\n.*\n +{row}"):
    load(model, path, BLOCKS)
  assert values(model) == before
  model.blocks.layers.norm.bias[...] = 7.0
  report = load(model, path, BLOCKS, strict=False)
  assert report.missing == ("blocks.layers.norm.bias[1]",)
  bias = model.blocks.layers.norm.bias[...]
  assert bias[1].tolist() == [7] * 8
  assert bias[2].tolist() == tensors["model.layers.2.ln.bias"].tolist()
  with pytest.raises(CheckpointMismatchError, match="abstract Variable has no values for the oth"):
    load(model_of("abstract"), path, BLOCKS, strict=False)


def test_a_layer_too_many_is_unexpected(path):
  write_blocks(path, count=4)
  with pytest.raises(CheckpointMismatchError) as error:
    load(model_of("stack"), path, BLOCKS)
  assert "7 mismatches" in str(error.value)
  assert str(error.value).count("rename it, drop it") == 7


def test_plain_rules_name_a_part_too(path):
  stack = nnx.Stack(nnx.Linear, 2, 3, 3, rngs=nnx.Rngs(0))
  w = np.arange(18, dtype="f").reshape(2, 3, 3)
  oracle.save_file({"0": w[0], "1": w[1], "bias": np.ones((2, 3), "f")}, path)
  rules = {r"(\d)": (r"layers.kernel[\1]", np.transpose), "bias": "layers.bias"}
  nnx.load_safetensors(stack, path, rename=rules)
  assert stack.layers.kernel[...].tolist() == w.transpose(0, 2, 1).tolist()
  both = {r"0": "layers.kernel[0]", "1": "layers.kernel", "bias": "layers.bias"}
  with pytest.raises(CheckpointMismatchError, match="rename to the whole, or each tensor to a par"):
    nnx.load_safetensors(stack, path, rename=both)
  twice = {r"(\d)": "layers.kernel[1]", "bias": "layers.bias"}
  with pytest.raises(CheckpointMismatchError, match=r"layers.kernel\[0\](.|\n)*rename a tensor"):
    nnx.load_safetensors(stack, path, rename=twice)
  with pytest.raises(CheckpointMismatchError, match="it differs from 0"):
    nnx.load_safetensors(stack, path, rename=twice, strict=False)
  assert stack.layers.kernel[...].tolist() == w.transpose(0, 2, 1).tolist()


def test_keys_of_a_stack_have_no_parts(path):
  model = nnx.Dict(k=nnx.Variable(jax.random.split(jax.random.key(0), 2)))
  oracle.save_file({"k.0": np.ones(2, np.uint32), "k.1": np.ones(2, np.uint32)}, path)
  rules = {r"k\.(\d)": (r"k[\1]", jax.random.wrap_key_data)}
  with pytest.raises(CheckpointMismatchError, match="keys have no parts"):
    nnx.load_safetensors(model, path, rename=rules)


def test_a_stack_at_two_places_is_filled_once(path):
  oracle.save_file({f"h.{i}.weight": np.full((2, 2), i, "f") for i in range(2)}, path)
  model = nnx.Dict(h=nnx.Stack(nnx.Linear, 2, 2, 2, use_bias=False, rngs=nnx.Rngs(0)))
  model.again = model.h
  report = load(model, path, {})
  first = next(iter(report.loaded)).partition(".")[0]
  other = {"h": "again", "again": "h"}[first]
  assert report.loaded == {f"{first}.layers.kernel[{i}]": f"h.{i}.weight" for i in range(2)}
  assert report.aliases == {f"{other}.layers.kernel[{i}]": f"h.{i}.weight" for i in range(2)}


def test_tied_weights_fill_one_variable_and_two_that_are_apart(path):
  w = np.arange(12, dtype="f").reshape(4, 3)
  oracle.save_file({"wte.weight": w}, path)
  tied = nnx.Dict(embed=nnx.Embed(4, 3, **RNGS))
  tied.again = tied.embed
  report = load(tied, path, {"wte": "embed"})
  assert report.aliases == {"embed.embedding": "wte.weight"}
  assert tied.embed.embedding[...].tolist() == w.tolist()
  apart = nnx.Dict(embed=nnx.Embed(4, 3, **RNGS), head=nnx.Linear(3, 4, use_bias=False, **RNGS))
  both = ["embed.embedding", ("head.kernel", np.transpose)]
  nnx.load_safetensors(apart, path, rename={r"wte\.weight": both})
  assert apart.head.kernel[...].tolist() == w.T.tolist()
  oracle.save_file({"wte.weight": w, "head.weight": w + 1}, path)
  with pytest.raises(CheckpointMismatchError, match="do not share: it differs from "):
    load(tied, path, {"wte": "embed", "head": "again"})


# rules


def test_a_rule_is_for_a_layer_and_for_what_is_inside(path):
  x = np.ones(3, "f")
  names = ["pooler.a.x", "enc.ln.weight", "enc.ln.bias", "cls", "ids"]
  oracle.save_file(dict.fromkeys(names, x), path)
  model = nnx.Dict(norm=nnx.LayerNorm(3, **RNGS), token=nnx.Param(jnp.zeros(3)))
  rules = {"enc.ln": "norm", "pooler": None, r"id\w": None, "cls": ("token", lambda x: 2 * x)}
  report = load(model, path, rules)
  assert report.loaded == {
    "norm.scale": "enc.ln.weight",
    "norm.bias": "enc.ln.bias",
    "token": "cls",
  }
  assert model.token[...].tolist() == [2, 2, 2]


def test_names_of_ours_stay_as_they_are(path):
  model = nnx.Dict(a=nnx.Linear(2, 2, **RNGS))
  nnx.save_safetensors(model, path)
  kernel = model.a.kernel[...]
  model.a.kernel[...] = 0.0
  load(model, path, {})
  assert (model.a.kernel[...] == kernel).all()


@pytest.mark.parametrize(
  ("rules", "text"),
  [
    ({"(": "a"}, r"regular expression \(missing \)"),
    ({"a": r"\2"}, r"a replacement for 'a' \(invalid group reference"),
    ({"b": 3}, "for 'b' a name, a list of names, "),
    ({"b": []}, "for 'b' a name, a list of names, "),
    ({"b": ("a", 3)}, r"\(name or names, function\) or None"),
    ([("a", "b")], "a dict from names of layers"),
  ],
)
def test_a_rule_that_makes_no_sense_is_refused(path, rules, text):
  oracle.save_file({"a.weight": np.ones((2, 2), "f")}, path)
  with pytest.raises(
    InvalidArgumentError, match=f"torch_layout cannot.*(rule|rename)(.|\n)*{text}"
  ):
    load(nnx.Linear(2, 2, **RNGS), path, rules)


@pytest.mark.parametrize("heads", [0, 1.5, "2"])
def test_a_number_of_heads_is_a_positive_int(heads):
  with pytest.raises(InvalidArgumentError, match=r"rope_halves cannot(.|\n)*a positive int"):
    nnx.rope_halves(heads)


# what does not fit


def refusal(model, path, tensors, rules=()):
  oracle.save_file(tensors, path)
  before = values(model)
  with pytest.raises(CheckpointMismatchError) as error:
    load(model, path, dict(rules))
  assert values(model) == before
  return error.value.args[0]


def test_a_size_that_reshapes_is_not_a_size_that_fits(path):
  heads = nnx.LinearGeneral(6, (2, 4), use_bias=False, **RNGS)
  text = refusal(heads, path, {"weight": np.ones((6, 8), "f")})
  assert "LinearGeneral here takes [8, 6] of torch: rename to (name, np.transpose)" in text
  text = refusal(heads, path, {"weight": np.ones((4, 12), "f")})
  assert "build the model with this size: LinearGeneral here takes [8, 6] of torch" in text


def test_the_input_first_is_refused_with_what_to_write(path):
  model = nnx.MultiHeadAttention(2, 8, use_bias=False, **RNGS)
  rules = {"c_attn": ["query", "key", "value"], "c_proj": "out"}
  tensors = {"c_attn.weight": np.ones((8, 24), "f"), "c_proj.weight": np.ones((8, 8), "f")}
  text = refusal(model, path, tensors, rules)
  assert "take 24 rows together: rename to (names, np.transpose) if the file has [in, out]" in text
  tensors["c_attn.weight"] = np.ones((20, 8), "f")
  text = refusal(model, path, tensors, rules)
  assert "build the model with this size: the layers of this list take 24 rows together" in text


def test_a_list_names_layers_only(path):
  model = nnx.Dict(a=nnx.Linear(2, 2, use_bias=False, **RNGS), b=nnx.Param(jnp.zeros((2, 2))))
  text = refusal(model, path, {"f.weight": np.ones((4, 2), "f")}, {"f": ["a", "c"]})
  assert "list layers of nnx: nothing is known of the rows of c.weight" in text
  assert "f.weight" in text and "rename it, drop it" in text


def test_layers_that_are_mapped_without_a_stack_are_not_taken_for_one(path):
  model = nnx.vmap(lambda rngs: nnx.Linear(2, 3, use_bias=False, rngs=rngs))(
    nnx.Rngs(0).fork(split=4)
  )
  text = refusal(model, path, {"weight": np.ones((6, 4), "f")})  # [2 * 3, 4] would fit [4, 2, 3]
  assert "weight" in text and "rename it, drop it" in text


def test_heads_that_do_not_fit_are_refused(path):
  model = nnx.Dict(q=nnx.Linear(2, 6, use_bias=False, **RNGS))
  rules = {"q": ("q", nnx.rope_halves(4))}
  text = refusal(model, path, {"q.weight": np.ones((6, 2), "f")}, rules)
  assert "pass another number than 4 to rope_halves: pairs do not fit" in text


def test_a_reorder_for_neighbours_is_undone():
  size, heads = 6, 2
  rows = np.arange(heads * size * 3).reshape(heads * size, 3)
  # The way there: llama.cpp turns features 2j and 2j + 1, which are j and j + size / 2 here.
  there = np.empty_like(rows)
  for head, j, half in itertools.product(range(heads), range(size // 2), range(2)):
    there[head * size + 2 * j + half] = rows[head * size + j + half * size // 2]
  assert (nnx.rope_halves(heads)(there) == rows).all()
  assert (nnx.rope_halves(heads)(there[:, 0]) == rows[:, 0]).all()
