"""What a call has made is freed with its last name, and does not wait for the garbage collector.

The collector runs when many objects were made, however large they are: a cycle that reaches an
array holds its memory until then.
"""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import optax
import pytest

from refax import nnx

X = jnp.ones((8, 4))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    x = self.dropout(self.norm(x))
    self.sow(nnx.Intermediate, "out", x)
    return x


class Decoder(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(10, 8, rngs=rngs)
    self.decoder = nnx.TransformerDecoder(1, 8, 2, rope=nnx.RoPE(), rngs=rngs)

  def __call__(self, tokens, *, decode=False):
    return self.embed.attend(self.decoder(self.embed(tokens), decode=decode))


def loss_fn(model):
  return (model(X) ** 2).mean()


def changes():
  """Name to a function of a model: what it makes is dropped."""
  shift = lambda state: jax.tree.map(lambda x: x + 1, state)
  jitted = {
    "nnx.jit": nnx.jit(lambda m: m(X)),
    "nnx.jit, a new Module": nnx.jit(lambda m: nnx.clone(m)),
    "nnx.jit, gradients": nnx.jit(nnx.value_and_grad(loss_fn)),
    "nnx.jit, a State": nnx.jit(lambda m: nnx.state(m, nnx.Param)),
    "nnx.jit, lojax": nnx.jit(lambda m: shift(nnx.state(nnx.to_lojax(m), nnx.Param))),
    "jax.jit": jax.jit(lambda m: m.layers[0](X)),
  }
  return jitted | {
    "nnx.grad": nnx.grad(loss_fn),
    "nnx.vmap": lambda m: nnx.vmap(lambda m, x: m.layers[0](x), in_axes=(None, 0))(m, X),
    "nnx.remat": lambda m: nnx.remat(lambda m: m.layers[0](X))(m),
    "nnx.fori_loop": lambda m: nnx.fori_loop(0, 2, lambda _, x: m.layers[0](x), X),
    "split and merge": lambda m: nnx.merge(*nnx.split(m)),
    "clone": nnx.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to_lojax": lambda m: nnx.to_lojax(m),
    "to_hijax": lambda m: nnx.to_hijax(nnx.to_lojax(m)),
    "update": lambda m: nnx.update(m, nnx.state(m)),
    "pop": lambda m: (m(X), nnx.pop(m, nnx.Intermediate)),
    "optimizer": lambda m: nnx.Optimizer(m, optax.adam(1e-3), wrt=nnx.Param).update(
      m, nnx.grad(loss_fn)(m)
    ),
    "EMA": lambda m: nnx.EMA(m, decay=0.9).apply_to(m),
    "generate": lambda m: nnx.generate(Decoder(nnx.Rngs(0)), [1, 2], 2),
  }


@pytest.mark.parametrize("name", changes())
def test_the_collector_finds_no_array_and_no_variable(name):
  model, change = Net(nnx.Rngs(0)), changes()[name]
  for _ in range(3):  # the first ones compile
    change(model)
  gc.collect()
  before = gc.get_debug(), gc.isenabled()
  gc.disable()
  gc.set_debug(gc.DEBUG_SAVEALL)
  try:
    change(model)
    gc.collect()
    kept = [type(x).__name__ for x in gc.garbage if is_state(x)]
  finally:
    gc.set_debug(before[0])
    gc.garbage.clear()
    if before[1]:
      gc.enable()
  assert not kept


def is_state(x):
  return isinstance(x, jax.Array | jax.Ref | nnx.Variable | nnx.Pytree | nnx.State)


def test_a_model_that_was_saved_is_gone_with_its_name(tmp_path):
  pytest.importorskip("orbax.checkpoint")
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(0, {"model": Net(nnx.Rngs(0))})
    checkpoints.wait()
    gc.collect()
    gc.disable()
    try:
      model = Net(nnx.Rngs(0))
      checkpoints.save(1, {"model": model})
      checkpoints.wait()
      checkpoints.restore({"model": model})
      gone = weakref.ref(model)
      del model
      assert gone() is None
    finally:
      gc.enable()


@pytest.mark.parametrize("make", [nnx.clone, nnx.to_lojax, lambda m: nnx.merge(*nnx.split(m))])
def test_a_model_that_was_rebuilt_is_gone_with_its_name(make):
  gc.disable()
  try:
    model = make(Net(nnx.Rngs(0)))
    gone = [weakref.ref(model), weakref.ref(model.layers[0].kernel)]
    del model
    assert [ref() for ref in gone] == [None, None]
  finally:
    gc.enable()
