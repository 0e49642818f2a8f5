"""What each public name of Flax NNX 0.12 is called in Refax: data, and a function to look one up.

Paths are written as behind `nnx.`: `Linear`, `statelib.State`, `nn.linear.default_embed_init`.
`refax.migrate` rewrites code by this table; an `nnx.Foo` that does not exist answers from it.
"""

from typing import Literal, NamedTuple

COMPAT = "or `from refax.compat import nnx`, which has it as Flax does"


class Answer(NamedTuple):
  """What to write for a name of Flax NNX.

  Attributes:
    kind: `same` where Refax has the name; `renamed` where another one means the same; `instead`
      where `text` is a sentence.
    text: the name or expression to write behind `nnx.`; or a sentence that says what to write.
  """

  kind: Literal["same", "renamed", "instead"]
  text: str


SAME = frozenset(
  """
  All Any BatchNorm BatchStat Bidirectional Cache Carry Conv ConvTranspose Data Dict DiffState
  Dropout EMA Einsum Embed Everything FlatState GRUCell GraphDef GroupNorm InstanceNorm
  Intermediate LSTMCell LayerNorm Linear LinearGeneral List LoRA LoRALinear LoRAParam Metric Module
  MultiHeadAttention MultiMetric Not Nothing OfType OptState OptimizedLSTMCell Optimizer PReLU
  Param PathContains Perturbation Pytree RMSNorm RNN RNNCellBase RngCount RngKey RngState RngStream
  Rngs Sequential SimpleCell SpectralNorm State StateAxes Static Variable WeightNorm WithTag
  as_abstract as_pure avg_pool capture celu checkify clone combine_masks cond custom_vjp data
  dataclass display dot_product_attention elu eval_shape filter_state find_duplicates fori_loop
  fork_rngs from_flat_state gelu glu grad graphdef hard_sigmoid hard_silu hard_swish hard_tanh
  identity initializers is_data iter_children iter_graph iter_modules jit jvp leaky_relu
  log_sigmoid log_softmax logsumexp make_attention_mask make_causal_mask make_jaxpr map map_state
  max_pool merge merge_state metrics min_pool one_hot pmap pool pop prefix pure recursive_map relu
  relu6 remat replace_by_pure_dict reseed scan selu set_metadata shard_map sigmoid silu soft_sign
  softmax softplus split split_rngs split_state standardize state static swish switch tabulate tanh
  to_flat_state to_pure_dict update value_and_grad variables view view_info vjp vmap while_loop
  with_attributes PARTITION_NAME get_abstract_model get_named_sharding get_partition_spec
  logical_axis_rules transform_metadata use_eager_sharding using_eager_sharding with_metadata
  with_partitioning
  """.split()  # noqa: SIM905 - words in lines are read faster
)

# Public in Refax's `nnx`, and in Flax in a submodule or in another release only.
BEYOND = frozenset(
  {
    "add_axis",
    "get_logical_axis_rules",
    "get_var_pspec",
    "remove_axis",
    "Filter",
    "PathIn",
    "RoPE",
    "dot_product_attention_weights",
    "dot_product_attention_with_rope",
  }
)

# Modules of Flax whose names are all names of `nnx` in Refax: `nnx.statelib.State` is `nnx.State`.
SUBMODULES = frozenset(
  """
  compat extract filterlib graph graphlib helpers module nn nn.activations nn.attention nn.dtypes
  nn.linear nn.lora nn.normalization nn.recurrent nn.stochastic object optimizer pytreelib rnglib
  spmd statelib summary training training.ema training.optimizer transforms transforms.autodiff
  transforms.compilation transforms.general transforms.iteration transforms.transforms variablelib
  variables visualization
  """.split()  # noqa: SIM905 - words in lines are read faster
)

# Two modules keep their name, and their place differs.
MOVED = {"nn.initializers": "initializers", "training.metrics": "metrics"}

# Names of single modules that mean something else there than as `nnx.` names.
UNLIKE = frozenset(
  """
  extract.extract graph.Static graphlib.Static nn.attention.Any nn.recurrent.Any nn.recurrent.Carry
  variablelib.Any variables.Any
  """.split()  # noqa: SIM905 - words in lines are read faster
)

RENAMED = {
  "Initializer": "initializers.Initializer",
  "VariableState": "Variable",
  "nn.linear.default_kernel_init": "initializers.lecun_normal()",
  "nn.linear.default_bias_init": "initializers.zeros_init()",
  "nn.linear.default_embed_init": (
    'initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)'
  ),
  "nn.recurrent.default_kernel_init": "initializers.lecun_normal()",
  "nn.recurrent.default_bias_init": "initializers.zeros_init()",
}

_CONTEXT = (
  "leave it out: `nnx.jit` and the other transforms bring back changes of structure by themselves; "
  "`nnx.split` and `nnx.merge` cut objects by hand"
)
_MODE = "leave it out: Refax has one mode, so drop the switch"
_MESH = "a plan, `nnx.shard(model, mesh, nnx.Plan({...}))`, or `nnx.StateAxes` for `nnx.jit`"
_NAMES = "leave it out: collections have no names here, so use the Variable's type"
_TYPEVAR = "a `typing.TypeVar` of your own"
_OWN = "leave it out: it is Flax's own machinery"
_BRIDGE = "`from refax.compat import nnx`, whose `nnx.bridge` holds Linen modules"

# What to write where no name means the same: behind "write ", or a sentence that begins "leave".
INSTEAD = {
  "abstract_with_sharding": "`nnx.as_abstract`",
  "A": _TYPEVAR,
  "GraphState": "`tuple[nnx.GraphDef, nnx.State]`",
  "M": _TYPEVAR,
  "MergeContext": _CONTEXT,
  "ModelAndOptimizer": (
    "`optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)` and `optimizer.update(model, grads)`"
  ),
  "NodeStates": "`nnx.split(node)`, which returns a GraphDef and States",
  "Object": "`nnx.Pytree`, with `pytree=False` behind it in the class line",
  "OptArray": "`nnx.OptState`",
  "OptVariable": "`nnx.OptState`",
  "PureState": "`tuple[nnx.GraphDef, nnx.State]`",
  "SplitContext": _CONTEXT,
  "StateSharding": _MESH,
  "TrainState": "a Module that holds the model, `nnx.Optimizer` and what else is trained",
  "UpdateContext": _CONTEXT,
  "VariableMetadata": "`nnx.Param(value, name=...)`: keywords of a Variable are its metadata",
  "bridge": _BRIDGE,
  "cached_partial": "`nnx.jit(f)` and pass the arguments at each call; a call costs little here",
  "call": "`graphdef.apply(state)(...)`, or call `nnx.merge(graphdef, state)`",
  "check_pytree": "leave it out: attributes are checked as they are set",
  "compat": "the function of `nnx` itself, `nnx.jit` for `nnx.compat.jit`",
  "current_update_context": _CONTEXT,
  "deprecations": _OWN,
  "extract": _OWN,
  "filterlib": "the filters of `nnx`: `nnx.Filter`, `nnx.OfType`, `nnx.PathContains`",
  "flatten": "`nnx.split(node)`",
  "from_tree": _CONTEXT,
  "graph": "names of `nnx` itself: `nnx.split`, `nnx.merge`, `nnx.GraphDef`",
  "graphlib": "names of `nnx` itself: `nnx.split`, `nnx.merge`, `nnx.GraphDef`",
  "has_data": "`any(map(nnx.is_data, jax.tree.leaves(value)))`",
  "helpers": "names of `nnx` itself: `nnx.Dict`, `nnx.List`, `nnx.Sequential`",
  "iter_module_children": "`nnx.iter_children(module)`",
  "jit_partial": "`nnx.jit(f)` and pass the arguments at each call; a call costs little here",
  "merge_context": _CONTEXT,
  "module": "names of `nnx` itself: `nnx.Module`, `nnx.iter_modules`",
  "nn": "names of `nnx` itself: `nnx.Linear`, `nnx.relu`, `nnx.initializers`",
  "object": "names of `nnx` itself: `nnx.Pytree`, `nnx.data`, `nnx.static`",
  "optimizer": "names of `nnx` itself: `nnx.Optimizer`, `nnx.OptState`",
  "proxy_caller": _OWN,
  "pytreelib": "names of `nnx` itself: `nnx.Pytree`, `nnx.data`, `nnx.static`",
  "register_data_type": "`nnx.data(value)` where it is assigned, or a subclass of `nnx.Pytree`",
  "register_variable_name": _NAMES,
  "reprlib": _OWN,
  "restore_int_paths": "leave it out: `nnx.replace_by_pure_dict` takes keys that are digits too",
  "restore_rngs": "`nnx.split_rngs` as a decorator or in `with`, which restores by itself",
  "rnglib": "names of `nnx` itself: `nnx.Rngs`, `nnx.split_rngs`",
  "set_graph_mode": _MODE,
  "set_graph_updates": _MODE,
  "split_context": _CONTEXT,
  "statelib": "names of `nnx` itself: `nnx.State`, `nnx.to_flat_state`",
  "summary": "`print(model)`",
  "to_tree": _CONTEXT,
  "tracers": _OWN,
  "training": "names of `nnx` itself: `nnx.Optimizer`, `nnx.metrics`",
  "transforms": "names of `nnx` itself: `nnx.jit`, `nnx.grad`, `nnx.scan`",
  "traversals": "`nnx.to_flat_state(state)` and `nnx.from_flat_state(flat)`",
  "unflatten": "`nnx.merge(graphdef, state)`",
  "unpack": "`nnx.split(node)`",
  "update_context": _CONTEXT,
  "var_defaults": "`nnx.using_hijax()` to read the mode, `nnx.use_hijax(True)` to set it",
  "variable_name_from_type": _NAMES,
  "variable_type_from_name": _NAMES,
  "variablelib": "names of `nnx` itself: `nnx.Variable`, `nnx.Param`",
  "vars_as": "`nnx.to_hijax(model)` or `nnx.to_lojax(model)`",
  "visualization": "`nnx.display(model)`",
  "with_rngs": "`nnx.split_rngs(model, splits=n, only=...)` or `nnx.fork_rngs(model)`",
  "with_vars": "`nnx.to_hijax(model)` or `nnx.to_lojax(model)`",
  "wrappers": _BRIDGE,
}

# Not in Flax NNX 0.12 any more, or in a submodule only; `refax.compat` need not have them.
OLDER = {
  "GraphNode": "`nnx.Pytree`",
  "Pytrees": "`nnx.Pytree`",
  "as_immutable_vars": "`nnx.to_lojax(model)`",
  "as_mutable_vars": "`nnx.to_hijax(model)`",
  "backup_keys": "`nnx.split_rngs` as a decorator or in `with`, which restores by itself",
  "filters_to_predicates": "`nnx.filter_state(state, *filters)`",
  "register_variable_name_type_pair": _NAMES,
  "to_predicate": "`nnx.filter_state(state, filter)`, or the filter where a filter is asked for",
  "traversals.flatten_mapping": "`nnx.to_flat_state(state)`",
  "traversals.unflatten_mapping": "`nnx.from_flat_state(flat)`",
  "with_sharding_constraint": "`jax.lax.with_sharding_constraint`",
}


def find(path: str) -> Answer | None:
  """What to write for `nnx.<path>` of Flax NNX, or None where Flax has no such name.

  >>> from refax import names
  >>> names.find("Linear"), names.find("statelib.State").text
  (Answer(kind='same', text='Linear'), 'State')
  >>> names.find("TrainState").kind
  'instead'
  """
  if path in SAME | BEYOND:
    return Answer("same", path)
  if path in RENAMED:
    return Answer("renamed", RENAMED[path])
  if path in OLDER:
    return Answer("instead", _sentence(OLDER[path]))
  if path in INSTEAD:
    text = _sentence(INSTEAD[path])
    return Answer("instead", text if "refax.compat" in text else f"{text}; {COMPAT}")
  return _inside(path)


def _sentence(text: str) -> str:
  return text if text.startswith("leave") else f"write {text}"


def _inside(path: str) -> Answer | None:
  """`find` for the name of a module, or in one."""
  if path in UNLIKE:
    return None
  if path in MOVED:
    return Answer("renamed", MOVED[path])
  if path in SUBMODULES:
    return Answer("instead", f"write names of `nnx` itself for those of `nnx.{path}`")
  parent, _, name = path.rpartition(".")
  if parent in MOVED:
    return Answer("renamed", f"{MOVED[parent]}.{name}")
  if parent in SUBMODULES:
    answer = Answer("renamed", name) if name in SAME | BEYOND else find(name)
    return answer and (Answer("renamed", name) if answer.kind == "same" else answer)
  if parent in {"initializers", "metrics"}:
    return Answer("same", path)
  top = path.partition(".")[0]
  if top != path and top in {"bridge", "deprecations", "proxy_caller", "reprlib", "tracers"}:
    return find(top)
  return None
