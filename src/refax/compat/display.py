"""nnx.tabulate with Flax's arguments. `nnx.display` is that of the clean namespace."""

from typing import Any

from refax.display import table

_FLAX_ONLY = ("graph", "row_filter", "variable_filter", "column_kwargs")


def tabulate(
  obj: Any,
  *input_args: Any,
  depth: int | None = None,
  method: str = "__call__",
  table_kwargs: dict[str, Any] | None = None,
  console_kwargs: dict[str, Any] | None = None,
  compute_flops: bool = False,
  compute_vjp_flops: bool = False,
  **input_kwargs: Any,
) -> str:
  """A table of the Modules of a model: their inputs and outputs, and their Variables by type.

  Args:
    obj: the model.
    *input_args: what it is called with: arrays or `jax.ShapeDtypeStruct`s.
    depth: how many levels of Modules; all by default.
    method: the name of the method that is called.
    table_kwargs: options of `rich.table.Table`.
    console_kwargs: options of `rich.console.Console`; `width` is the one that is looked at.
    compute_flops: whether to count operations of the forward pass.
    compute_vjp_flops: whether to count those of both passes together.
    **input_kwargs: more arguments of the call. Flax's other options are taken, and not looked at.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> "kernel" in nnx.tabulate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))
  True
  """
  given = {k: x for k, x in input_kwargs.items() if k not in _FLAX_ONLY}
  return table.tabulate(
    obj,
    *input_args,
    depth=depth,
    method=method,
    compute_flops=compute_flops,
    compute_vjp_flops=compute_vjp_flops,
    width=(console_kwargs or {}).get("width"),
    table_kwargs=table_kwargs,
    **given,
  )
