"""TrainState and ModelAndOptimizer: training as it was written for earlier releases of Flax NNX."""

import dataclasses
from types import GenericAlias
from typing import Any

import jax
import jax.numpy as jnp
import optax

from refax.core.filters import Filter, to_predicate
from refax.core.variable import Param, is_variable
from refax.graph.state import State, filter_state
from refax.train import optimizer
from refax.train.optimizer import OptState


class OptArray(OptState):
  """The name of Flax NNX for state of an optimizer that belongs to no parameter.

  >>> from refax.compat import nnx
  >>> issubclass(nnx.OptArray, nnx.OptState)
  True
  """


class OptVariable(OptState):
  """The name of Flax NNX for state of an optimizer that belongs to a parameter.

  >>> from refax.compat import nnx
  >>> issubclass(nnx.OptVariable, nnx.OptState)
  True
  """


class Optimizer(optimizer.Optimizer):
  """`nnx.Optimizer`, which leaves out gradients that `wrt` does not select, as Flax NNX does.

  >>> from refax.compat import nnx; import optax, jax.numpy as jnp
  >>> model = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
  >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
  >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 4))).sum())(model)  # of every Param
  >>> _ = optimizer.update(model, grads); bool((model.lora_b[...] != 0).all())
  True
  """

  def _gradients(self, params: State, grads: Any) -> tuple[State, bool]:
    if isinstance(grads, State):
      selects = to_predicate(self.wrt)
      grads = filter_state(grads, lambda path, g: not is_variable(g) or selects(path, g))
    return super()._gradients(params, grads)


class ModelAndOptimizer(Optimizer):
  """An Optimizer that keeps its model: `update(grads)`.

  >>> from refax.compat import nnx; import optax, jax.numpy as jnp
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> optimizer = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
  >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(optimizer.model)
  >>> _ = optimizer.update(grads); bool(model.bias[0] < 0)
  True
  """

  def __init__(self, model: Any, tx: optax.GradientTransformation, *, wrt: Filter = Param):
    super().__init__(model, tx, wrt=wrt)
    self.model = model

  def update(self, grads: Any, /, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
    """Update the model's parameters with the gradients."""
    return super().update(self.model, grads, **kwargs)


class PyTreeNode:
  """A frozen dataclass that is a pytree; subclasses are dataclasses by themselves."""

  __class_getitem__ = classmethod(GenericAlias)

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    static = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
    jax.tree_util.register_dataclass(
      cls, data_fields=[f.name for f in fields if f.name not in static], meta_fields=static
    )

  def replace(self, **changes: Any) -> Any:
    """The same with other values in some fields."""
    return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]


class TrainState(PyTreeNode):
  """What a functional training loop carries: parameters, the state of optax, a step.

  >>> from refax.compat import nnx; import optax
  >>> graphdef, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  >>> state = nnx.TrainState.create(graphdef, params=params, tx=optax.sgd(0.1))
  >>> int(state.apply_gradients(grads=params).step)
  1
  """

  graphdef: Any
  params: Any
  opt_state: Any
  step: Any
  tx: Any = dataclasses.field(metadata={"pytree_node": False})

  @classmethod
  def create(cls, graphdef: Any, *, params: Any, tx: Any, step: int = 0, **kwargs: Any) -> Any:
    """A state at the beginning."""
    fields: Any = {"graphdef": graphdef, "params": params, "opt_state": tx.init(params)}
    return cls(**fields, step=jnp.asarray(step), tx=tx, **kwargs)  # pyright: ignore[reportCallIssue]

  def apply(self, state: Any, *states: Any) -> Any:
    """A call of the model; a State may be given as the name of a field."""
    found = []
    for x in (state, *states):
      x = getattr(self, x) if isinstance(x, str) else x
      if not isinstance(x, State):
        raise TypeError(f"apply takes States or names of fields with States, got {type(x)}")
      found.append(x)
    return self.graphdef.apply(*found)

  def apply_gradients(self, grads: Any, **kwargs: Any) -> Any:
    """The state after a step of optax."""
    updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
    params = optax.apply_updates(self.params, updates)
    return self.replace(params=params, opt_state=opt_state, step=self.step + 1, **kwargs)
