"""lift: what a function does to its arguments reaches the caller's objects, or nothing does."""

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from refax.errors import TraceContextError
from refax.transforms.lift import Entered, Inputs, Outputs


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


def lifted(f, *args, **kwargs):
  """The least transform: values in, `f`, values out, under jax.jit."""
  inputs = Inputs.of(args, kwargs)
  is_variable = [isinstance(x, nnx.Variable) for x in inputs.leaves]
  values = [x.get_value() if v else x for x, v in zip(inputs.leaves, is_variable, strict=True)]

  @jax.jit
  def run(values):
    frame = inputs.enter({i: Entered(v, hijax=False) for i, v in enumerate(values)})
    inner, kw = frame.args
    return frame.collect(f(*inner, **kw))

  return inputs.commit(run(values))


# every transform must pass on what `lift` hands it
TRANSFORMS = {
  "lift": lifted,
  "jit": lambda f, *args, **kw: nnx.jit(f)(*args, **kw),
  "remat": lambda f, *args, **kw: nnx.remat(f)(*args, **kw),
  "checkify": lambda f, *args, **kw: nnx.checkify(f)(*args, **kw)[1],
  "vjp": lambda f, *args: nnx.vjp(lambda *a: (0.0, f(*a)), *args, has_aux=True, wrt=False)[2],
  "cond": lambda f, *args: nnx.cond(True, f, f, *args),
  "vmap": lambda f, *args: nnx.vmap(f, in_axes=None, out_axes=None, axis_size=2)(*args),
}
EACH = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@EACH
@STORAGE
def test_writes_reach_every_place_that_shares_a_variable(transform, hijax):
  v = nnx.Variable(1.0, is_hijax=hijax)
  a, b = Node(v=v), Node(deep=[{"v": v}])

  def f(a, b):
    a.v[...] += 1
    b.deep[0]["v"][...] *= 10
    return a.v is b.deep[0]["v"]

  assert bool(transform(f, a, b))
  assert float(v) == 20.0 and a.v is v and b.deep[0]["v"] is v and v.is_hijax == hijax


@EACH
def test_attributes_added_set_and_deleted_reach_the_caller(transform):
  m = Node(v=nnx.Variable(1.0), gone=nnx.Variable(2.0), k=1, layers=[nnx.Variable(3.0)])
  v = m.v

  def f(m):
    m.new = Node(x=nnx.Cache(m.v * 2))
    m.k = "two"
    m.layers.append(m.v)
    m.itself = m
    del m.gone

  transform(f, m)
  if transform is not TRANSFORMS["vmap"]:
    assert float(m.new.x) == 2.0
  assert type(m.new) is Node and m.new.x.is_hijax
  assert m.k == "two" and m.layers[1] is v and m.itself is m and not hasattr(m, "gone")


@EACH
def test_what_is_returned_is_the_callers_object_or_a_new_one(transform):
  m = Node(v=nnx.Variable(1.0), inner=Node(k=3))
  same, inner, v, new, number = transform(
    lambda m: (m, m.inner, m.v, Node(v=m.v, w=nnx.Variable(5.0)), m.inner.k), m
  )
  assert same is m and inner is m.inner and v is m.v
  assert new.v is m.v and float(new.w) == 5.0 and new.w.is_hijax and int(number) == 3


@EACH
def test_objects_may_swap_their_parts(transform):
  a, b = Node(v=nnx.Variable(1.0)), Node(v=nnx.Variable(2.0))
  va, vb = a.v, b.v

  def f(a, b):
    a.v, b.v = b.v, a.v
    a.v[...] = 7.0

  transform(f, a, b)
  assert a.v is vb and b.v is va and (float(va), float(vb)) == (1.0, 7.0)


@EACH
def test_metadata_reaches_the_caller(transform):
  v = nnx.Variable(1.0, tag="old")
  transform(lambda m: m.v.set_metadata(tag="new", more=(1, 2)), Node(v=v))
  assert v.tag == "new" and v.more == (1, 2) and float(v) == 1.0


@EACH
def test_a_structural_change_invalidates_what_was_compiled_for_the_old_structure(transform):
  m = Node(v=nnx.Variable(1.0), k=1)
  step = jax.jit(lambda m: m.v * m.k)
  assert float(step(m)) == 1.0
  transform(lambda m: setattr(m, "k", 5), m)
  assert float(step(m)) == 5.0


@EACH
def test_nothing_is_seen_after_an_error(transform):
  m = Node(v=nnx.Variable(1.0), w=nnx.Variable(1.0, is_hijax=False))

  def f(m):
    m.v[...] = 2.0
    m.w[...] = 2.0
    m.new = nnx.Variable(3.0)
    raise RuntimeError("boom")

  if transform is TRANSFORMS["vjp"]:
    transform = lambda f, m: nnx.jit(lambda m: TRANSFORMS["vjp"](f, m))(m)  # all or nothing
  with pytest.raises(RuntimeError, match="boom"):
    transform(f, m)
  assert float(m.v) == float(m.w) == 1.0 and not hasattr(m, "new")


def test_an_object_of_another_trace_cannot_change_and_nothing_is_written():
  m = Node(v=nnx.Variable(1.0), lo=nnx.Variable(1.0, is_hijax=False))

  def add(m):
    m.v[...] = 2.0
    m.extra = nnx.Variable(0.0)

  def write(m):
    m.v[...] = 2.0
    m.lo[...] = 2.0

  for f, match in ((add, "cannot change its structure"), (write, "lojax Variable from outside")):
    with pytest.raises(TraceContextError, match=match):
      jax.jit(lambda f=f: nnx.remat(f)(m))()
    assert float(m.v) == 1.0 and float(m.lo) == 1.0 and not hasattr(m, "extra")


def test_outputs_are_a_pytree_with_a_static_spec():
  m = Node(v=nnx.Variable(1.0))
  inputs = Inputs.of((m,), {"x": 2.0})
  frame = inputs.enter({i: Entered(float(x), hijax=False) for i, x in enumerate(inputs.leaves)})
  (inner,), kwargs = frame.args
  inner.v.set_raw_value(jnp.array(3.0))
  outputs = frame.collect((inner, kwargs["x"], nnx.Variable(5.0)))
  assert outputs.spec.written == (0,) and outputs.spec.hijax == (False, True)
  doubled = jax.tree.map(lambda x: 2 * x, outputs)
  assert isinstance(doubled, Outputs) and doubled.spec == outputs.spec
  same, x, new = inputs.commit(doubled)
  assert same is m and float(m.v) == 6.0 and float(x) == 4.0 and float(new) == 10.0
