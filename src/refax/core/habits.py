"""Habits from other libraries: `model.parameters()`, `Net.init(...)`; an error says what Refax has.

Each name is an attribute, of a base of Module, that raises an AttributeError when it is read. So
`hasattr` is False, what a user defines under the name is found first, and no `__getattr__` stands
between a property and the error that it raises.
"""

from typing import Any

from refax.errors import ForeignNameError

_CALL = "call the model: y = model(x)"
_EVAL = "model.eval(), then call the model: y = model(x)"
_PRINT = "print(model) shows its layers with shapes, and counts parameters and bytes"
_FILES = "nnx.save_safetensors, nnx.load_safetensors and nnx.Checkpointer write and read files"
_LOOP = "write the loop: loss, grads = nnx.value_and_grad(loss_fn)(model, x), then optimizer.update"
_SIZES = "a model is whole when it is built: pass its sizes and rngs=nnx.Rngs(0) to the constructor"
_VALUES = "nnx.state(model) has all values, nnx.state(model, nnx.Param) the parameters"
_WRITE = (
  "nnx.update(model, state) writes a State, "
  "nnx.replace_by_pure_dict(nnx.state(model), arrays) nested dicts of arrays"
)
_DTYPE = "build the layers with dtype= (what they compute in) and param_dtype= (what they store)"
_MOVE = "nnx.device_put(model, device) moves a model in place"
_WRT = "select what is trained by wrt=, the same filter in nnx.grad and in nnx.Optimizer"
_HOOK = "call it in __call__, or keep values there: self.sow(nnx.Intermediate, 'name', x)"
_PARAM = "assign it in __init__: self.name = nnx.Param(value)"
_STATE = "assign it in __init__: self.name = nnx.BatchStat(value), or another type of nnx.Variable"
_TRAINED = "nnx.state(model, nnx.Param) has the parameters by path"

HABITS = {
  # Linen and Haiku
  "init": _SIZES,
  "init_with_output": _SIZES,
  "lazy_init": _SIZES,
  "apply": f"{_CALL}; as a pure function: graphdef, state = nnx.split(model), then "
  "nnx.merge(graphdef, state)(x)",
  "bind": "a model holds its state: graphdef, state = nnx.split(model) takes them apart, "
  "nnx.merge(graphdef, state) puts them together",
  "unbind": "graphdef, state = nnx.split(model)",
  "tabulate": "nnx.tabulate(model, *inputs) is the table",
  "param": _PARAM,
  "variable": _STATE,
  "get_variable": "read the attribute: self.name[...]",
  "put_variable": "write the attribute: self.name[...] = value",
  "has_variable": "hasattr(self, 'name')",
  "make_rng": "keep the streams (self.rngs = rngs) and draw: self.rngs.dropout()",
  "is_initializing": "write what is done once in __init__",
  "is_mutable_collection": "every Variable can be written; self.flag = ... tells modes apart",
  # torch
  "forward": _CALL,
  "parameters": _TRAINED,
  "named_parameters": f"{_TRAINED}; nnx.to_flat_state(state) lists (path, Variable)",
  "buffers": "nnx.state(model, nnx.BatchStat)",
  "named_buffers": "nnx.to_flat_state(nnx.state(model, nnx.BatchStat)) lists (path, Variable)",
  "modules": "nnx.iter_modules(model) yields (path, Module)",
  "named_modules": "nnx.iter_modules(model) yields (path, Module)",
  "children": "nnx.iter_children(model) yields (key, child)",
  "named_children": "nnx.iter_children(model) yields (key, child)",
  "state_dict": f"nnx.to_pure_dict(nnx.state(model)) is a dict of arrays; {_FILES}",
  "load_state_dict": f"{_WRITE}; {_FILES}",
  "to": f"{_MOVE}; {_DTYPE}",
  "cuda": f"{_MOVE}: jax.devices('gpu')[0]",
  "cpu": f"{_MOVE}: jax.devices('cpu')[0]",
  "half": _DTYPE,
  "bfloat16": _DTYPE,
  "zero_grad": "leave it out: gradients are values, nnx.grad returns new ones at each call",
  "backward": "loss, grads = nnx.value_and_grad(loss_fn)(model, x)",
  "requires_grad_": _WRT,
  "register_buffer": _STATE,
  "register_parameter": _PARAM,
  "register_module": "assign it in __init__: self.name = module, or setattr(self, name, module)",
  "add_module": "assign it in __init__: self.name = module, or setattr(self, name, module)",
  "register_forward_hook": _HOOK,
  "register_forward_pre_hook": _HOOK,
  # Keras
  "trainable_weights": _TRAINED,
  "trainable_variables": _TRAINED,
  "non_trainable_weights": "nnx.state(model, nnx.Not(nnx.Param))",
  "non_trainable_variables": "nnx.state(model, nnx.Not(nnx.Param))",
  "get_weights": _VALUES,
  "set_weights": _WRITE,
  "add_weight": _PARAM,
  "count_params": _PRINT,
  "summary": _PRINT,
  "save_weights": _FILES,
  "load_weights": _FILES,
  "compile": f"nnx.jit compiles a function; {_LOOP}",
  "fit": _LOOP,
  "evaluate": _EVAL,
  "predict": _EVAL,
  "build": _SIZES,
}
"""What to write in Refax, by the name that is looked for."""


class Habit:
  """A name that a Module does not have; it says what to write instead.

  No data descriptor: what is in an instance's `__dict__` is found first. So is what a class below
  defines; what one further up defines (a mixin that comes after Module) is looked for here.
  """

  __slots__ = ("_fix", "_name", "_owner")

  def __init__(self, owner: type, name: str, fix: str):
    self._owner, self._name, self._fix = owner, name, fix

  def __get__(self, instance: Any, owner: type) -> Any:
    above = owner.__mro__[owner.__mro__.index(self._owner) + 1 :]
    if any(self._name in vars(cls) for cls in above):
      return getattr(super(self._owner, owner if instance is None else instance), self._name)
    raise ForeignNameError.habit(owner.__name__, self._name, self._fix)


class Habits:
  """The base of Module that has these names, and nothing else."""

  __slots__ = ()

  def __dir__(self) -> list[str]:
    names = super().__dir__()
    return [x for x in names if x not in HABITS or x in vars(self) or hasattr(type(self), x)]


for _name, _fix in HABITS.items():
  setattr(Habits, _name, Habit(Habits, _name, _fix))
