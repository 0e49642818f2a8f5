"""nnx.dataclass, and attributes that a class declares as data or static."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from refax import nnx


@nnx.dataclass
class Point(nnx.Pytree):
  x: Any
  table: Any = nnx.data(default_factory=lambda: {"a": 1.0})
  sizes: Any = nnx.static(default=(1, 2))
  name: str = "p"


class Declared(nnx.Module):
  table: nnx.Data[dict]
  sizes: nnx.Static[list]
  late: "nnx.Data[list]"

  def __init__(self):
    self.table = {"a": 1.0}
    self.sizes = [1, 2]
    self.late = [3.0]


def test_fields_are_data_or_static_as_they_say():
  point = Point(jnp.zeros(()))
  assert jax.tree.leaves(point) == [1.0, 0.0] and point.sizes == (1, 2)
  assert type(point.table) is dict
  assert nnx.jit(lambda p: p.x + p.table["a"])(point) == 1.0
  assert "Point(" in repr(point) and dataclasses.is_dataclass(point)


def test_options_of_dataclasses_pass_and_a_value_has_no_options():
  @nnx.dataclass(kw_only=True, eq=False)
  class Keyword(nnx.Module):
    w: nnx.Param

  assert float(Keyword(w=nnx.Param(1.0)).w) == 1.0
  with pytest.raises(TypeError):
    Keyword(nnx.Param(1.0))
  with pytest.raises(TypeError, match="take a value, or options"):
    nnx.data(1, default=2)


def test_annotations_declare_in_text_too_and_for_later_assignments():
  model = Declared()
  assert jax.tree.leaves(model) == [3.0, 1.0]
  assert model.sizes == [1, 2] and type(model.table) is dict and type(model.late) is list
  model.table = {"b": 2.0}
  assert jax.tree.leaves(model) == [3.0, 2.0]
  twin = nnx.merge(*nnx.split(model))
  assert twin.sizes == [1, 2] and twin.sizes is not model.sizes

  class Below(Declared):
    pass

  assert jax.tree.leaves(Below()) == [3.0, 1.0]


def test_pytree_false_is_taken():
  class Object(nnx.Pytree, pytree=False):
    def __init__(self):
      self.a = nnx.Param(1.0)

  assert float(nnx.jit(lambda o: o.a[...])(Object())) == 1.0
