"""What the metadata `out_sharding` of Variables says, as PartitionSpecs and shardings."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax.core.annotation import check, spec_of
from refax.core.variable import Variable, is_variable
from refax.graph.split import split
from refax.transforms.abstract import eval_shape


def get_var_pspec(variable: Variable) -> PartitionSpec | None:
  """The PartitionSpec of a Variable; that of no axis where it has none, None if it is no array.

  Raises:
    ShardingError: the rules of now and those of the Variable contradict each other.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> tuple(nnx.get_var_pspec(nnx.Param(jnp.zeros(2), out_sharding=("data",))))
  ('data',)
  """
  spec = spec_of(variable._def.metadata, variable._def.origin)
  if spec is not None:
    return spec
  return PartitionSpec() if hasattr(variable.get_raw_value(), "shape") else None


def get_partition_spec(tree: Any) -> Any:
  """A copy of a pytree with a PartitionSpec in each Variable, and in place of each array.

  Args:
    tree: a State, Variables, any pytree of these; abstract ones too.

  Raises:
    ShardingError: the rules of now and those of a Variable contradict each other.

  >>> from refax import nnx
  >>> metadata = {"out_sharding": (None, "model")}
  >>> model = nnx.Linear(2, 4, kernel_metadata=metadata, rngs=nnx.Rngs(0))
  >>> tuple(nnx.get_partition_spec(nnx.state(model)).kernel[...])
  (None, 'model')
  """

  def spec(x: Any) -> Any:
    if isinstance(x, Variable):
      return x._handle(get_var_pspec(x), x._def)
    return PartitionSpec() if hasattr(x, "shape") else None

  return jax.tree.map(spec, tree, is_leaf=is_variable)


def get_named_sharding(tree: Any, mesh: Any) -> Any:
  """`nnx.get_partition_spec`, with a NamedSharding on the mesh for each PartitionSpec.

  Raises:
    ShardingError: a Variable cannot be divided over this mesh as it says.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> state = nnx.state(nnx.Dict(x=nnx.Param(jnp.zeros(2), out_sharding=("data",))))
  >>> tuple(nnx.get_named_sharding(state, mesh).x[...].spec)
  ('data',)
  """

  def sharding(x: Any) -> Any:
    if not isinstance(x, Variable):
      return NamedSharding(mesh, PartitionSpec()) if hasattr(x, "shape") else None
    spec = get_var_pspec(x)
    if spec is None:
      return x._handle(None, x._def)
    check(spec, mesh, getattr(x.get_raw_value(), "shape", (0,) * len(spec)), x._def.origin)
    return x._handle(NamedSharding(mesh, spec), x._def)

  return jax.tree.map(sharding, tree, is_leaf=is_variable)


def get_abstract_model(init_fn: Callable[[], Any], mesh: Any, *, graph: Any = None) -> Any:
  """The GraphDef of a model, and its abstract State with shardings; nothing is computed.

  Args:
    init_fn: builds the model.
    mesh: the mesh that the `out_sharding` of its Variables is for.
    graph: taken for Flax's sake.

  Raises:
    ShardingError: a Variable cannot be divided over this mesh as it says.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("model",))
  >>> metadata = {"out_sharding": (None, "model")}
  >>> make = lambda: nnx.Linear(2, 4, kernel_metadata=metadata, rngs=nnx.Rngs(0))
  >>> graphdef, state = nnx.get_abstract_model(make, mesh)
  >>> state.kernel[...].sharding.spec
  P(None, 'model')
  """
  with jax.set_mesh(mesh):
    graphdef, state = split(eval_shape(init_fn))
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      get_named_sharding(state, mesh),
      is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )
  return graphdef, state
