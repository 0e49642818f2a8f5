"""Arguments that Flax NNX's functions take and Refax's do not: data."""

DROPPED = frozenset({"graph", "graph_updates"})

# What takes `graph=` or `graph_updates=` in Flax; Refax has one mode, so they are dropped.
WITH_MODES = frozenset(
  """
  EMA Optimizer as_abstract checkify clone cond custom_vjp eval_shape fork_rngs fori_loop grad
  graphdef iter_children iter_graph iter_modules jit jvp make_jaxpr map pmap prefix recursive_map
  remat reseed scan shard_map split split_rngs state switch value_and_grad variables view view_info
  vjp vmap while_loop with_attributes
  """.split()  # noqa: SIM905 - words in lines are read faster
)

# Flax makes a decorator of these when no function is given; Refax asks for the function.
UNCURRIED = frozenset({"custom_vjp", "jvp", "make_jaxpr", "vjp"})

# Renamed without a change of meaning.
RENAMED = {("from_flat_state", "flat_state"): "flat"}

# A Variable's storage: `hijax=True` and `ref=True` both ask for a cell that is updated in place.
STORAGE = frozenset({"hijax", "ref", "mutable"})

# Dropped where the value is Flax's default, listed otherwise.
DEFAULTS = {
  "reduce_axes": "()",
  "_split_transpose": "False",
  "recreate_variables": "True",
  "device": "None",
  "backend": "None",
  "axis_names": "set()",
}

_DEVICE = "put the arguments there with `jax.device_put`"
_COPIES = "`nnx.merge` always makes new Variables: leave it out"

# What to write for arguments that have no like.
LISTED = {
  ("FlatState", "sort"): "leave it out; sort the pairs before",
  ("checkify", "errors"): "pass it by keyword",
  ("fork_rngs", "split"): "`nnx.split_rngs(tree, splits=...)`",
  ("from_flat_state", "cls"): "leave it out; the result is an `nnx.State`",
  ("grad", "reduce_axes"): "`jax.lax.psum` of the gradients, inside the function",
  ("jit", "backend"): _DEVICE,
  ("jit", "device"): _DEVICE,
  ("make_jaxpr", "static_argnums"): "a lambda that closes over the static arguments",
  ("map", "recreate_variables"): "leave it out; `nnx.map` makes new Variables",
  ("merge", "copy"): _COPIES,
  ("merge", "recreate_variables"): _COPIES,
  ("merge_state", "cls"): "leave it out; the result is an `nnx.State`",
  ("scan", "_split_transpose"): "leave it out",
  ("shard_map", "axis_names"): "a mesh with these axes only",
  ("value_and_grad", "reduce_axes"): "`jax.lax.psum` of the gradients, inside the function",
  ("vjp", "reduce_axes"): "`jax.lax.psum` of the gradients, inside the function",
}

# Methods and attributes of Flax's objects that Refax's do not have, with names of their own.
METHODS = {
  "copy_from": "`variable[...] = other[...]`",
  "from_flat_path": "`nnx.from_flat_state(flat)`",
  "iter_children": "`nnx.iter_children(module)`",
  "iter_modules": "`nnx.iter_modules(module)`",
  "raw_value": "`variable.get_raw_value()`",
  "to_nested_state": "`nnx.from_flat_state(flat)`",
  "update_from_state": "`variable[...] = other[...]`",
  "var_type": "`type(variable)`",
}
