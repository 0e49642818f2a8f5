"""The public namespace: `from refax import nnx`. Every public name, and nothing else."""

from refax import errors as _errors
from refax import names as _names
from refax.config import (
  use_eager_sharding,
  use_hijax,
  use_named_scopes,
  using_eager_sharding,
  using_hijax,
)
from refax.core.annotation import (
  PARTITION_NAME,
  get_logical_axis_rules,
  logical_axis_rules,
  with_metadata,
  with_partitioning,
)
from refax.core.containers import Dict, List
from refax.core.filters import (
  All,
  Any,
  Everything,
  Filter,
  Not,
  Nothing,
  OfType,
  PathContains,
  PathIn,
  WithTag,
)
from refax.core.graphdef import GraphDef
from refax.core.module import Module
from refax.core.pytree import Data, Pytree, Static, data, dataclass, is_data, static
from refax.core.text import render_to_text
from refax.core.variable import BatchStat, Cache, Intermediate, Param, Perturbation, Variable
from refax.display.page import display
from refax.display.table import tabulate
from refax.errors import NonFiniteError, RetraceWarning, StructureWarning
from refax.generate import samplers
from refax.generate.loop import Generated, generate, stream
from refax.generate.memory import cache_length, init_cache, truncate_cache
from refax.graph import apply as _apply  # noqa: F401 - GraphDef.apply
from refax.graph.inspect import (
  find_duplicates,
  iter_children,
  iter_graph,
  iter_modules,
  map,
  recursive_map,
  set_metadata,
)
from refax.graph.placement import device_put
from refax.graph.split import clone, graphdef, merge, pop, split, state, update, variables
from refax.graph.state import (
  FlatState,
  State,
  filter_state,
  from_flat_state,
  map_state,
  merge_state,
  replace_by_pure_dict,
  split_state,
  to_flat_state,
  to_pure_dict,
)
from refax.graph.storage import as_abstract, as_pure, pure, to_hijax, to_lojax
from refax.graph.view import view, view_info, with_attributes
from refax.inspect import debug
from refax.inspect.capture import capture
from refax.inspect.collectives import collectives
from refax.inspect.intervene import intervene
from refax.inspect.nonfinite import NonFinite, find_nonfinite
from refax.inspect.profile import profile
from refax.inspect.report import Profile
from refax.inspect.retrace import explain_retrace
from refax.io.checkpoint import Checkpointer
from refax.io.export import ExportedFunction, export, load_exported
from refax.io.flax_checkpoint import load_flax_checkpoint
from refax.io.gguf import load_gguf
from refax.io.safetensors import load_safetensors, save_safetensors
from refax.io.torch_layout import rope_halves, torch_layout
from refax.nn import initializers
from refax.nn.activations import (
  celu,
  elu,
  gelu,
  glu,
  hard_sigmoid,
  hard_silu,
  hard_swish,
  hard_tanh,
  identity,
  leaky_relu,
  log1mexp,
  log_sigmoid,
  log_softmax,
  logmeanexp,
  logsumexp,
  mish,
  one_hot,
  relu,
  relu6,
  selu,
  sigmoid,
  silu,
  soft_sign,
  softmax,
  softplus,
  sparse_plus,
  sparse_sigmoid,
  squareplus,
  standardize,
  swish,
  tanh,
)
from refax.nn.attention.dot_product import (
  dot_product_attention,
  dot_product_attention_weights,
)
from refax.nn.attention.mask import combine_masks, make_attention_mask, make_causal_mask
from refax.nn.attention.multi_head import MultiHeadAttention
from refax.nn.attention.rope import RoPE, dot_product_attention_with_rope
from refax.nn.block.residual import Residual
from refax.nn.block.sequential import Sequential
from refax.nn.block.stack import Stack
from refax.nn.block.transformer import (
  FeedForward,
  TransformerBlock,
  TransformerDecoder,
  TransformerEncoder,
)
from refax.nn.conv.conv import Conv
from refax.nn.conv.conv_transpose import ConvTranspose
from refax.nn.conv.pooling import avg_pool, max_pool, min_pool, pool
from refax.nn.dropout import Dropout
from refax.nn.linear.einsum import Einsum
from refax.nn.linear.embed import Embed
from refax.nn.linear.linear import Linear, LinearGeneral
from refax.nn.lora.adapter import add_lora, merge_lora
from refax.nn.lora.lora import LoRA, LoRALinear, LoRAParam
from refax.nn.norm.batch_norm import BatchNorm
from refax.nn.norm.group_norm import GroupNorm, InstanceNorm
from refax.nn.norm.layer_norm import LayerNorm, RMSNorm
from refax.nn.norm.weight_norm import SpectralNorm, WeightNorm
from refax.nn.precision import Precision
from refax.nn.prelu import PReLU
from refax.nn.quantization.quantize import quantize
from refax.nn.quantization.quantized import QuantizedParam, QuantizedWeight
from refax.nn.recurrent.cell import GRUCell, RNNCellBase, SimpleCell
from refax.nn.recurrent.lstm import LSTMCell, OptimizedLSTMCell
from refax.nn.recurrent.rnn import RNN, Bidirectional
from refax.rngs import RngCount, RngKey, Rngs, RngState, RngStream, reseed
from refax.sharding import plans
from refax.sharding.pipeline import pipeline
from refax.sharding.place import create_sharded, shard
from refax.sharding.plan import Plan
from refax.sharding.ring import ring_attention
from refax.sharding.spec import (
  get_abstract_model,
  get_named_sharding,
  get_partition_spec,
  get_var_pspec,
)
from refax.train import metrics
from refax.train.ema import EMA, EMAState
from refax.train.finite import all_finite
from refax.train.hyperparams import Hyperparams
from refax.train.logger import JsonLogger, Logger, TensorBoardLogger
from refax.train.loss_scale import LossScale
from refax.train.metric import Metric
from refax.train.multi_metric import MultiMetric
from refax.train.optimizer import Optimizer, OptState
from refax.transforms.abstract import eval_shape, make_jaxpr
from refax.transforms.accumulate import accumulate_grads
from refax.transforms.autodiff import DiffState, grad, jvp, value_and_grad, vjp
from refax.transforms.axes import Carry, StateAxes, prefix
from refax.transforms.axis_names import add_axis, remove_axis, transform_metadata
from refax.transforms.checks import checkify
from refax.transforms.control import cond, switch
from refax.transforms.custom import custom_vjp
from refax.transforms.effect import (
  Effects,
  Transaction,
  assert_no_writes,
  effects,
  no_update,
  transaction,
)
from refax.transforms.jit import jit
from refax.transforms.loops import fori_loop, scan, while_loop
from refax.transforms.mapping import pmap, vmap
from refax.transforms.random import fork_rngs, split_rngs
from refax.transforms.remat import checkpoint, remat
from refax.transforms.sharding import shard_map

__all__ = [  # noqa: RUF022 - ruff takes RNN for a constant, and would put it first
  "All",
  "Any",
  "BatchNorm",
  "BatchStat",
  "Bidirectional",
  "Cache",
  "Carry",
  "Checkpointer",
  "Conv",
  "ConvTranspose",
  "Data",
  "Dict",
  "DiffState",
  "Dropout",
  "EMA",
  "EMAState",
  "Effects",
  "Einsum",
  "Embed",
  "Everything",
  "ExportedFunction",
  "FeedForward",
  "Filter",
  "FlatState",
  "GRUCell",
  "Generated",
  "GraphDef",
  "GroupNorm",
  "Hyperparams",
  "InstanceNorm",
  "Intermediate",
  "JsonLogger",
  "LSTMCell",
  "LayerNorm",
  "Linear",
  "LinearGeneral",
  "List",
  "LoRA",
  "LoRALinear",
  "LoRAParam",
  "Logger",
  "LossScale",
  "Metric",
  "Module",
  "MultiHeadAttention",
  "MultiMetric",
  "NonFinite",
  "NonFiniteError",
  "Not",
  "Nothing",
  "OfType",
  "OptState",
  "OptimizedLSTMCell",
  "Optimizer",
  "PARTITION_NAME",
  "PReLU",
  "Param",
  "PathContains",
  "PathIn",
  "Perturbation",
  "Plan",
  "Precision",
  "Profile",
  "Pytree",
  "QuantizedParam",
  "QuantizedWeight",
  "RMSNorm",
  "RNN",
  "RNNCellBase",
  "Residual",
  "RetraceWarning",
  "RngCount",
  "RngKey",
  "RngState",
  "RngStream",
  "Rngs",
  "RoPE",
  "Sequential",
  "SimpleCell",
  "SpectralNorm",
  "Stack",
  "State",
  "StateAxes",
  "Static",
  "StructureWarning",
  "TensorBoardLogger",
  "Transaction",
  "TransformerBlock",
  "TransformerDecoder",
  "TransformerEncoder",
  "Variable",
  "WeightNorm",
  "WithTag",
  "accumulate_grads",
  "add_axis",
  "add_lora",
  "all_finite",
  "as_abstract",
  "as_pure",
  "assert_no_writes",
  "avg_pool",
  "cache_length",
  "capture",
  "celu",
  "checkify",
  "checkpoint",
  "clone",
  "collectives",
  "combine_masks",
  "cond",
  "create_sharded",
  "custom_vjp",
  "data",
  "dataclass",
  "debug",
  "device_put",
  "display",
  "dot_product_attention",
  "dot_product_attention_weights",
  "dot_product_attention_with_rope",
  "effects",
  "elu",
  "eval_shape",
  "explain_retrace",
  "export",
  "filter_state",
  "find_duplicates",
  "find_nonfinite",
  "fori_loop",
  "fork_rngs",
  "from_flat_state",
  "gelu",
  "generate",
  "get_abstract_model",
  "get_logical_axis_rules",
  "get_named_sharding",
  "get_partition_spec",
  "get_var_pspec",
  "glu",
  "grad",
  "graphdef",
  "hard_sigmoid",
  "hard_silu",
  "hard_swish",
  "hard_tanh",
  "identity",
  "init_cache",
  "initializers",
  "intervene",
  "is_data",
  "iter_children",
  "iter_graph",
  "iter_modules",
  "jit",
  "jvp",
  "leaky_relu",
  "load_exported",
  "load_flax_checkpoint",
  "load_gguf",
  "load_safetensors",
  "log1mexp",
  "log_sigmoid",
  "log_softmax",
  "logical_axis_rules",
  "logmeanexp",
  "logsumexp",
  "make_attention_mask",
  "make_causal_mask",
  "make_jaxpr",
  "map",
  "map_state",
  "max_pool",
  "merge",
  "merge_lora",
  "merge_state",
  "metrics",
  "min_pool",
  "mish",
  "no_update",
  "one_hot",
  "pipeline",
  "plans",
  "pmap",
  "pool",
  "pop",
  "prefix",
  "profile",
  "pure",
  "quantize",
  "recursive_map",
  "relu",
  "relu6",
  "remat",
  "remove_axis",
  "render_to_text",
  "replace_by_pure_dict",
  "reseed",
  "ring_attention",
  "rope_halves",
  "samplers",
  "save_safetensors",
  "scan",
  "selu",
  "set_metadata",
  "shard",
  "shard_map",
  "sigmoid",
  "silu",
  "soft_sign",
  "softmax",
  "softplus",
  "sparse_plus",
  "sparse_sigmoid",
  "split",
  "split_rngs",
  "split_state",
  "squareplus",
  "standardize",
  "state",
  "static",
  "stream",
  "swish",
  "switch",
  "tabulate",
  "tanh",
  "to_flat_state",
  "to_hijax",
  "to_lojax",
  "to_pure_dict",
  "torch_layout",
  "transaction",
  "transform_metadata",
  "truncate_cache",
  "update",
  "use_eager_sharding",
  "use_hijax",
  "use_named_scopes",
  "using_eager_sharding",
  "using_hijax",
  "value_and_grad",
  "variables",
  "view",
  "view_info",
  "vjp",
  "vmap",
  "while_loop",
  "with_attributes",
  "with_metadata",
  "with_partitioning",
]


def __getattr__(name: str):
  """A name of Flax NNX that Refax has not says what to write."""
  answer = _names.find(name)
  raise _errors.ForeignNameError.public(name, answer.text if answer else "")
