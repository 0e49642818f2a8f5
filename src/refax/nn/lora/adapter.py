"""add_lora and merge_lora: put a LoRA beside the layers of a live model, and take it into them."""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from refax.core.filters import Filter, to_predicate
from refax.core.flatten import variable_places, walk_nodes
from refax.core.node import Node
from refax.core.variable import Variable, identity
from refax.core.write import write
from refax.errors import InvalidArgumentError
from refax.graph.split import set_entry
from refax.nn import check, explicit
from refax.nn.linear.linear import Linear, LinearGeneral
from refax.nn.lora.lora import LoRA, LoRALinear, sizes
from refax.nn.norm.weight_norm import wrapper_above
from refax.rngs import Rngs
from refax.transforms.mapping import vmap
from refax.typing import Dtype, Path, wide_dtype

T = TypeVar("T")


def add_lora(
  model: T,
  rank: int,
  *,
  alpha: float | None = None,
  only: Filter = ...,
  param_dtype: Dtype = jnp.float32,
  rngs: Rngs,
) -> T:
  """Put a LoRA beside layers of a live model, in place.

  The layers are `nnx.Linear` and `nnx.LinearGeneral`, also those inside attention and those that a
  `nnx.Stack` or `nnx.vmap` has stacked. In the place of each there is a `nnx.LoRA` with the layer
  as its `base_module`. A layer that is shared stays so, with one LoRA; a layer that has a LoRA
  keeps that one. At first, the model computes what it computed before.

  Args:
    model: a Module, or any pytree of Modules.
    rank: the `lora_rank` of each.
    alpha: as in `nnx.LoRA`.
    only: which layers; a filter of paths and layers, such as `nnx.PathContains("attention")`.
    param_dtype: the dtype of the new parameters. They compute in the dtype of their layer.
    rngs: the stream `params` initialises the parameters.

  Returns:
    `model` itself; where that is one of the layers or a plain pytree with one, the LoRA or a new
    pytree.

  Raises:
    InvalidArgumentError: `only` matches no layer, a layer maps other axes than the last, or it is
      inside a `nnx.WeightNorm` or `nnx.SpectralNorm`. Nothing has changed.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.TransformerEncoder(2, 8, num_heads=2, rngs=nnx.Rngs(0))
  >>> before = model(jnp.ones((1, 3, 8)))
  >>> adapted = lambda path, layer: path[-1] in ("query", "value")
  >>> model = nnx.add_lora(model, 4, only=adapted, rngs=nnx.Rngs(1))
  >>> model.blocks.layers.attention.query.lora_a.shape  # of both blocks
  (2, 8, 4)
  >>> bool((model(jnp.ones((1, 3, 8))) == before).all())
  True
  """
  check.size("nnx.add_lora", "rank", rank)
  check.streams("nnx.add_lora", rngs)
  predicate, bare = to_predicate(only), list(_bare_layers(model))
  found = [layer for path, layer in bare if predicate(path, layer)]
  if not found:
    kind = "nnx.Linear or nnx.LinearGeneral without a LoRA"
    raise _nothing("nnx.add_lora", only, bare, kind)
  _check_adaptable(model, found)
  new = {id(x): _beside(x, rank, alpha=alpha, param_dtype=param_dtype, rngs=rngs) for x in found}
  return _replaced(model, new)


def merge_lora(model: T, *, only: Filter = ...) -> T:
  """Add each LoRA of a live model to the weights of its layer, which takes its place.

  The model then computes the same, up to rounding, without the time that LoRA takes: the way back
  from `nnx.add_lora`. A `nnx.LoRALinear` becomes a `nnx.Linear`. A LoRA beside anything else than
  a `nnx.Linear` or `nnx.LinearGeneral` stays as it is.

  Args:
    model: a Module, or any pytree of Modules.
    only: which LoRAs; a filter of paths and of `nnx.LoRA` and `nnx.LoRALinear`.

  Returns:
    `model` itself; where that is a LoRA or a plain pytree with one, the layer or a new pytree.

  Raises:
    InvalidArgumentError: `only` matches no LoRA beside a layer; or the weights of a layer are
      quantized, or used by another layer too. Nothing has changed.
    TraceContextError: a model from outside a transform is merged inside it.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Sequential(nnx.LoRALinear(3, 5, lora_rank=2, rngs=nnx.Rngs(0)))
  >>> model.layers[0].lora.lora_b[...] = jnp.ones((2, 5))
  >>> before, model = model(jnp.ones(3)), nnx.merge_lora(model)
  >>> type(model.layers[0]).__name__, bool(jnp.allclose(model(jnp.ones(3)), before, atol=1e-5))
  ('Linear', True)
  """
  predicate, loras = to_predicate(only), list(_loras(model))
  chosen = [(path, x) for path, x in loras if predicate(path, x)]
  if not chosen:
    raise _nothing("nnx.merge_lora", only, loras, "nnx.LoRA beside a layer")
  owners: dict[int, set[int]] = {}
  for _, owner, variable in variable_places(model):
    owners.setdefault(identity(variable), set()).add(id(owner))
  sums: dict[int, tuple[Variable, jax.Array]] = {}
  new: dict[int, Any] = {}
  for path, lora in chosen:
    layer, factors = (lora, lora.lora) if isinstance(lora, LoRALinear) else (_base(lora), lora)
    kernel = _writable(path, layer, owners)
    _, value = sums.get(id(kernel), (kernel, kernel[...]))
    sums[id(kernel)] = (kernel, _sum(value, factors))
    new[id(lora)] = _as_linear(layer) if layer is lora else layer
  write(*sums.values())
  # A LoRA beside a LoRA: its layer may itself be replaced.
  return _replaced(model, {key: new.get(id(layer), layer) for key, layer in new.items()})


def _bare_layers(model: Any) -> Iterator[tuple[Path, Linear | LinearGeneral]]:
  """(path, layer) of the layers that have no LoRA."""
  nodes = dict(walk_nodes(model))
  taken = {id(x.base_module) for x in nodes.values() if isinstance(x, LoRA)}
  for path, x in nodes.items():
    if isinstance(x, LoRALinear) or id(x) in taken:
      continue
    if isinstance(x, Linear | LinearGeneral):
      yield path, x


def _check_adaptable(model: Any, found: list[Linear | LinearGeneral]) -> None:
  """Raise InvalidArgumentError if no LoRA can be beside one of these layers."""
  nodes, chosen = dict(walk_nodes(model)), set(map(id, found))
  for path, layer in nodes.items():
    if id(layer) not in chosen:
      continue
    wrapper = wrapper_above(nodes, path)
    if wrapper is not None:
      kind = type(wrapper).__name__
      fix = f"only=... to leave it out, or put a nnx.LoRA beside the {kind}"
      raise _error("add_lora", path, f"the weights of a layer are computed by {kind}", kind, fix)
    if isinstance(layer, LinearGeneral):
      trailing = tuple(range(-len(layer.axis), 0))
      if layer.axis != trailing or layer.batch_axis:
        got = f"axis={layer.axis}, batch_axis={dict(layer.batch_axis)}"
        fix = f"only=... to leave it out, or build it with axis={trailing} and no batch_axis"
        raise _error("add_lora", path, "a LoRA maps the last axes of its input", got, fix)


def _beside(layer: Any, rank: int, *, rngs: Rngs, **options: Any) -> LoRA:
  """A LoRA for a layer; for stacked ones, a stack of them."""
  dtype = layer.kernel.dtype if layer.dtype is None else layer.dtype
  sizes_ = (layer.in_features, rank, layer.out_features)
  build = lambda rngs: LoRA(*sizes_, dtype=dtype, rngs=rngs, **options)
  mapped = len(sizes(layer.in_features)) + len(sizes(layer.out_features))
  lead = tuple(layer.kernel.shape[: layer.kernel.ndim - mapped])
  for _ in lead:
    build = vmap(build)
  lora = build(rngs.fork(split=lead) if lead else rngs)
  lora.base_module = layer
  return lora


def _loras(model: Any) -> Iterator[tuple[Path, LoRA | LoRALinear]]:
  """(path, LoRA) of those that are beside a layer, the inner ones first."""
  for path, node in walk_nodes(model):
    if isinstance(node, LoRALinear):  # of a subclass, nobody knows what else it does
      is_one = type(node) is LoRALinear
    else:
      is_one = isinstance(node, LoRA) and isinstance(_base(node), Linear | LinearGeneral)
    if is_one:
      yield path, node  # pyright: ignore[reportReturnType] - is_one says so


def _base(lora: LoRA) -> Any:
  """What a LoRA is beside; below the others, if there are several."""
  base = lora.base_module
  return _base(base) if isinstance(base, LoRA) else base


def _writable(path: Path, layer: Any, owners: dict[int, set[int]]) -> Variable:
  """The kernel of a layer; raises InvalidArgumentError if nothing can be added to it."""
  kernel = layer.kernel
  if not isinstance(kernel, Variable):
    fix = "the model before nnx.quantize, or keep the LoRA beside: its sum has too many values"
    raise _error("merge_lora", path, "quantized weights cannot be added to", repr(kernel), fix)
  if len(owners[identity(kernel)]) > 1:
    got = "a kernel that two layers share"
    fix = "only=... to leave it out, or give each layer a kernel of its own"
    raise _error("merge_lora", path, "the LoRA is of one layer, its kernel of several", got, fix)
  return kernel


def _sum(kernel: jax.Array, lora: LoRA) -> jax.Array:
  """A kernel with the product of a LoRA, rounded once."""
  lead = tuple(range(kernel.ndim - len(sizes(lora.in_features)) - len(sizes(lora.out_features))))

  def add(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = wide_dtype(kernel.dtype)
    dims = (((a.ndim - 1,), (len(lead),)), (lead, lead))
    precision = lax.Precision.HIGHEST
    product = lax.dot_general(a.astype(wide), b.astype(wide), dims, precision=precision)
    return (kernel.astype(wide) + lora.scale * product).astype(kernel.dtype)

  factors = (lora.lora_a[...], lora.lora_b[...])
  return explicit.call(add, kernel, *factors, out=lambda: explicit.names(kernel))


def _as_linear(layer: LoRALinear) -> Linear:
  """A LoRALinear, whose LoRA is in its kernel, as the Linear that it then is."""
  linear = Linear.__new__(Linear)
  for name, value, _ in layer._entries():
    if name != "lora":
      setattr(linear, name, value)
  return linear


def _replaced(model: Any, new: dict[int, Any]) -> Any:
  """A model with others in the place of some of its Modules, changed where it holds them.

  Args:
    model: the model.
    new: what takes the place of the Module with this `id`.
  """
  swap = lambda x: new.get(id(x), x)
  is_leaf = lambda x: isinstance(x, Node | Variable)
  for _, node in list(walk_nodes(model)):
    if isinstance(node, LoRA) and id(node) in new:
      continue  # it goes, with what it held
    for name, child, is_data in list(node._entries()):
      if is_data and any(id(leaf) in new for leaf in jax.tree.leaves(child, is_leaf=is_leaf)):
        set_entry(node, name, jax.tree.map(swap, child, is_leaf=is_leaf))
  return jax.tree.map(swap, model, is_leaf=is_leaf)


def _nothing(
  function: str, only: Filter, there: list[tuple[Path, Any]], kind: str
) -> InvalidArgumentError:
  """The error of a filter that matches nothing, or of a model that has nothing to match."""
  shown = [f"{'.'.join(map(str, p)) or 'the model'} ({type(x).__name__})" for p, x in there]
  if not shown:
    want = f"a model that has a {kind}"
    return InvalidArgumentError.value(function, "model", "one without", want)
  more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
  want = f"a filter that matches one of {', '.join(shown[:8])}{more}"
  return InvalidArgumentError.value(function, "only", only, want)


def _error(function: str, path: Path, problem: str, got: str, fix: str) -> InvalidArgumentError:
  at = ".".join(map(str, path)) or "the model"
  return InvalidArgumentError(f"nnx.{function}: {problem}", at=at, got=got, fix=f"pass {fix}")
