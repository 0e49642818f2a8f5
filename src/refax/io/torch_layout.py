"""torch_layout: from the names and layouts of torch's layers to those of the layers of a model.

The names of the layers are the user's business: rules map them. Once it is known which layer of the
model a tensor belongs to, `torch_layers.py` knows what it is there: a `weight` that goes to an
`nnx.Linear` is transposed, one that goes to an `nnx.Conv` has its channels moved to the end.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from refax.core.node import Node
from refax.core.variable import Variable
from refax.errors import InvalidArgumentError
from refax.io.rename import LayoutError, One, Transform, expanded
from refax.io.torch_layers import Layout, in_layer
from refax.nn.attention.multi_head import MultiHeadAttention
from refax.nn.block.stack import Stack

_NAME = "torch_layout"
Names: TypeAlias = str | list[str]
Rules: TypeAlias = Mapping[str, Names | tuple[Names, Transform] | None]


def torch_layout(model: Any, rules: Rules) -> Callable[[str], list[One]]:
  r"""The `rename` of `nnx.load_safetensors` and `nnx.load_gguf` for weights that torch trained.

  You say which layer is which. What is in a layer follows by its type:

  | In torch | Here |
  |---|---|
  | `weight`, `bias` of Linear | `kernel` transposed, `bias`; of `nnx.LinearGeneral` with its axes |
  | those of Conv and ConvTranspose | `kernel` with channels last, `bias` |
  | those of Embedding, LayerNorm, RMSNorm, GroupNorm, PReLU | `embedding`, `scale`, `bias` |
  | `running_mean`, `running_var` of BatchNorm | `mean`, `var`; `num_batches_tracked` is dropped |
  | `in_proj_weight`, `out_proj` of MultiheadAttention | `query`, `key`, `value`, `out` |
  | `weight_g`, `weight_v` of weight_norm | `scales`, and `kernel` of the layer inside |

  Other names stay as they are, below the layer that they belong to. A layer of a `nnx.Stack` has
  its number: `blocks.3.up`; its tensors go to their parts of the stacked Variables.

  Args:
    model: the model that is loaded; an abstract one of `nnx.eval_shape` will do.
    rules: regular expressions for names of layers in the file to names of layers in the model. An
      expression stands for a whole name, and for what is inside: `"pooler"` for `pooler.weight`
      too. Rules are applied in order, one to the result of the other. A rule gives a name; or a
      list of names, if a tensor holds several one under the other (queries, keys, values), and is
      then the last one; or `(name or names, function)`, whose function gets each tensor first, in
      torch's layout; or None for what is not wanted.

  Returns:
    A function from names in the file to names in the model and functions of arrays.

  Raises:
    InvalidArgumentError: a rule makes no sense.

  GPT-2 keeps the weights of its linear layers as `[in, out]`, which `np.transpose` mends:

  >>> from refax import nnx; import numpy as np, os, tempfile
  >>> from safetensors.numpy import save_file
  >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
  >>> save_file({
  ...   "transformer.h.0.attn.c_attn.weight": np.ones((6, 18), "f"),
  ...   "transformer.h.0.attn.c_attn.bias": np.ones(18, "f"),
  ...   "transformer.h.0.attn.c_proj.weight": np.ones((6, 6), "f"),
  ...   "transformer.h.0.attn.c_proj.bias": np.ones(6, "f"),
  ...   "transformer.ln_f.weight": np.ones(6, "f"), "transformer.ln_f.bias": np.ones(6, "f")}, path)
  >>> attention = lambda rngs: nnx.MultiHeadAttention(2, 6, rngs=rngs)
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Dict(blocks=nnx.Stack(attention, 1, rngs=rngs), norm=nnx.LayerNorm(6, rngs=rngs))
  >>> qkv = [r"blocks.\1.query", r"blocks.\1.key", r"blocks.\1.value"]
  >>> nnx.load_safetensors(model, path, rename=nnx.torch_layout(model, {
  ...   r"transformer\.(.*)": r"\1",
  ...   r"h\.(\d+)\.attn\.c_attn": (qkv, np.transpose),
  ...   r"h\.(\d+)\.attn\.c_proj": (r"blocks.\1.out", np.transpose),
  ...   "ln_f": "norm"}))
  LoadReport(10 loaded)
  """
  if not isinstance(rules, Mapping):
    raise _refusal(rules, "a dict from names of layers in the file to those in the model")
  compiled = [_rule(pattern, renamed) for pattern, renamed in rules.items()]
  return lambda name: _renamed(model, name, compiled)


def rope_halves(num_heads: int) -> Transform:
  """A function that reorders queries' or keys' rows for `nnx.RoPE`, as Hugging Face has them.

  `nnx.RoPE` turns feature `j` of a head together with `j + size / 2`. llama.cpp, and Meta's own
  files, turn neighbours: `2 * j` and `2 * j + 1`. So the conversion to GGUF has reordered the rows
  of the projections of a model of the architecture `llama`, and this is the way back.

  Args:
    num_heads: of queries; for keys, how many heads keys have.

  Returns:
    A function of an array `[num_heads * size, ...]`, the weight or the bias.

  Raises:
    InvalidArgumentError: `num_heads` is not a positive int.

  >>> from refax import nnx; import numpy as np
  >>> nnx.rope_halves(1)(np.array([0, 3, 1, 4, 2, 5])).tolist()
  [0, 1, 2, 3, 4, 5]
  >>> model = nnx.Dict(attention=nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0)))
  >>> rules = {"blk.0.attn_q": ("attention.query", nnx.rope_halves(2))}
  >>> nnx.torch_layout(model, rules)("blk.0.attn_q.weight")[0][0]
  'attention.query.kernel'
  """
  if not isinstance(num_heads, int) or num_heads < 1:
    raise InvalidArgumentError.value("rope_halves", "num_heads", num_heads, "a positive int")

  def halves(x: Any) -> Any:
    if not x.ndim or x.shape[0] % (2 * num_heads):
      raise LayoutError(f"pass another number than {num_heads} to rope_halves: pairs do not fit")
    pairs = x.reshape(num_heads, -1, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)

  return halves


# Rules: which layer.
class _Rule(NamedTuple):
  pattern: re.Pattern[str]
  names: tuple[str, ...] | None
  """Where to; several if the tensor is cut; None if it is not wanted."""
  transforms: tuple[Transform, ...]


def _rule(pattern: Any, renamed: Any) -> _Rule:
  try:
    compiled = re.compile(pattern)
  except (re.error, TypeError) as error:
    raise _refusal(pattern, f"a regular expression ({error})") from None
  if renamed is None:
    return _Rule(compiled, None, ())
  has_function = isinstance(renamed, tuple) and len(renamed) == 2 and callable(renamed[1])
  names, transforms = (renamed[0], (renamed[1],)) if has_function else (renamed, ())
  names = [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
    want = f"for {pattern!r} a name, a list of names, (name or names, function) or None"
    raise _refusal(renamed, want)
  return _Rule(compiled, tuple(names), transforms)


def _refusal(value: Any, want: str) -> InvalidArgumentError:
  return InvalidArgumentError.value(_NAME, "rule", value, want)


def _renamed(model: Any, name: str, rules: list[_Rule]) -> list[One]:
  names, transforms = [name], ()
  for rule in rules:
    found = _applied(rule, names[0])
    if found is None:
      continue
    if not found:
      return []
    names, transforms = found, transforms + rule.transforms
    if len(names) > 1:
      break
  names = [inner for name in names for inner in _inside_attention(model, name)]
  places = [_place(model, name) for name in names]
  places = [place for place in places if place.name is not None]
  if len(places) > 1:
    places = _cut(places)
  return [_one(place, transforms) for place in places]


def _applied(rule: _Rule, name: str) -> list[str] | None:
  """The name with its layer renamed, [] if it is not wanted; None if the rule is for others."""
  steps = name.split(".")
  for n in range(len(steps), 0, -1):  # a tensor itself, then its layer, then what that is in
    match = rule.pattern.fullmatch(".".join(steps[:n]))
    if match is not None:
      new = [expanded(match, replacement, _NAME) for replacement in rule.names or ()]
      return [".".join(filter(None, (start, *steps[n:]))) for start in new]
  return None


def _one(place: "_Place", transforms: tuple[Transform, ...]) -> One:
  assert place.name is not None
  if place.layout is not None and not place.layout.is_same:
    transforms = (*transforms, place.layout)
  return (place.name, _Chain(transforms)) if transforms else place.name


class _Chain(NamedTuple):
  """Functions of an array, one after the other."""

  transforms: tuple[Transform, ...]

  def __call__(self, x: Any) -> Any:
    for transform in self.transforms:
      x = transform(x)
    return x


# The model: what is where.
class _Found(NamedTuple):
  """What a name leads to: `at` counts the layers of Stacks on the way, which have no name."""

  value: Any
  path: tuple[str, ...]
  at: tuple[int, ...]


def _find(model: Any, steps: list[str]) -> _Found | None:
  found = _Found(model, (), ())
  for step in steps:
    value, path, index = found
    if isinstance(value, Stack) and step in map(str, range(len(value))):
      found = _Found(value.layers, (*path, "layers"), (*index, int(step)))
      continue
    children = _children(value)
    if step not in children:
      return None
    found = _Found(children[step], (*path, step), index)
  return found


def _children(value: Any) -> dict[str, Any]:
  if isinstance(value, Variable):
    return {}
  if isinstance(value, Node):
    return {str(key): child for key, child, _ in value._entries()}
  if isinstance(value, Mapping):
    return {str(key): value[key] for key in value}
  if isinstance(value, list | tuple):
    return {str(i): child for i, child in enumerate(value)}
  return {}


_QKV = ("query", "key", "value")


def _inside_attention(model: Any, name: str) -> list[str]:
  """The names of torch's MultiheadAttention that are not those of a layer inside."""
  steps = name.split(".")
  for n, step in enumerate(steps):
    if step not in ("in_proj_weight", "in_proj_bias", "out_proj") and "_proj_weight" not in step:
      continue
    found = _find(model, steps[:n])
    if found is None or not isinstance(found.value, MultiHeadAttention):
      continue
    start = ".".join([*steps[:n], ""])
    if step.startswith("in_proj_"):
      return [f"{start}{part}.{step.removeprefix('in_proj_')}" for part in _QKV]
    if step == "out_proj":
      return [".".join([f"{start}out", *steps[n + 1 :]])]
    parts = [part for part in _QKV if step == f"{part[0]}_proj_weight"]
    return [f"{start}{part}.weight" for part in parts] or [name]
  return [name]


# Places: both together.
class _Place(NamedTuple):
  """Where a tensor goes: a name in the model, None for nowhere, and what is done to it."""

  name: str | None
  layout: Any = None


def _place(model: Any, name: str) -> _Place:
  """Where a tensor goes whose layer has been renamed."""
  for new, old in _NEW_WEIGHT_NORM.items():
    name = name.removesuffix(new) + (old if name.endswith(new) else "")
  *steps, leaf = name.split(".")
  found = _find(model, steps)
  if found is None:
    return _Place(name)
  parts = in_layer(found.value, leaf, len(found.at))
  if parts is None:
    return _Place(_joined(found, leaf))
  new, layout = parts
  return _Place(None if new is None else _joined(found, new), layout)


_NEW_WEIGHT_NORM = {
  "parametrizations.weight.original0": "weight_g",
  "parametrizations.weight.original1": "weight_v",
}


def _joined(found: _Found, leaf: str) -> str:
  return ".".join((*found.path, leaf)) + "".join(f"[{i}]" for i in found.at)


class _Cut(NamedTuple):
  """Takes some rows out of a tensor that has those of several layers."""

  rows: slice
  total: int
  layout: Layout
  is_same = False

  def __call__(self, x: Any) -> Any:
    if x.shape and x.shape[0] == self.total:
      return self.layout(x[self.rows])
    want = f"the layers of this list take {self.total} rows together"
    if len(x.shape) == 2 and x.shape[1] == self.total:
      raise LayoutError(f"{want}: rename to (names, np.transpose) if the file has [in, out]")
    raise LayoutError(f"build the model with this size: {want}")


class _Refused(NamedTuple):
  """Stands for the layout of something that is no layer."""

  name: str
  is_same = False

  def __call__(self, x: Any) -> Any:
    raise LayoutError(f"list layers of nnx: nothing is known of the rows of {self.name}")


def _cut(places: list[_Place]) -> list[_Place]:
  """The places of a tensor that holds what several layers take, one under the other."""
  unknown = [place.name for place in places if place.layout is None]
  if unknown:
    return [_Place(place.name, _Refused(str(unknown[0]))) for place in places]
  total, begin, cut = sum(place.layout.shape[0] for place in places), 0, []
  for name, layout in places:
    end = begin + layout.shape[0]
    cut.append(_Place(name, _Cut(slice(begin, end), total, layout)))
    begin = end
  return cut
