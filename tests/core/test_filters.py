"""Filters: what each short form means, how they combine, and that they are values."""

import jax.numpy as jnp
import pytest

from refax import nnx
from refax.core.filters import to_predicate, to_predicates
from refax.errors import FilterError


class Custom(nnx.Param):
  """A user's type."""


LEAVES = {
  ("a", "w"): nnx.Param(1.0),
  ("a", "s"): nnx.BatchStat(1.0, tag="t"),
  ("b", 0, "w"): Custom(1.0, tag="t"),
  ("b", 1, "x"): jnp.ones(2),
  ("head",): nnx.Cache(1.0, tag="u"),
}
ALL = set(LEAVES)
CASES = {
  "ellipsis": (..., ALL),
  "true": (True, ALL),
  "none": (None, set()),
  "false": (False, set()),
  "type": (nnx.Param, {("a", "w"), ("b", 0, "w")}),
  "subtype": (Custom, {("b", 0, "w")}),
  "base": (nnx.Variable, ALL - {("b", 1, "x")}),
  "tag": ("t", {("a", "s"), ("b", 0, "w")}),
  "no such tag": ("zz", set()),
  "tuple": ((nnx.BatchStat, Custom), {("a", "s"), ("b", 0, "w")}),
  "list": ([nnx.BatchStat, "u"], {("a", "s"), ("head",)}),
  "empty tuple": ((), set()),
  "nested": ((None, (nnx.Cache, [Custom])), {("b", 0, "w"), ("head",)}),
  "predicate": (lambda path, x: path[0] == "b", {("b", 0, "w"), ("b", 1, "x")}),
  "OfType": (nnx.OfType(nnx.Cache), {("head",)}),
  "PathContains": (nnx.PathContains("w"), {("a", "w"), ("b", 0, "w")}),
  "PathContains int": (nnx.PathContains(1), {("b", 1, "x")}),
  "PathContains part": (nnx.PathContains("ea", exact=False), {("head",)}),
  "PathContains exact": (nnx.PathContains("ea"), set()),
  "PathIn": (nnx.PathIn(("a", "w"), ["b", 1, "x"]), {("a", "w"), ("b", 1, "x")}),
  "WithTag": (nnx.WithTag("u"), {("head",)}),
  "Any": (nnx.Any("u", Custom), {("head",), ("b", 0, "w")}),
  "All": (nnx.All("t", nnx.Param), {("b", 0, "w")}),
  "All of none": (nnx.All(), ALL),
  "Any of none": (nnx.Any(), set()),
  "Not": (nnx.Not(nnx.Param), {("a", "s"), ("b", 1, "x"), ("head",)}),
  "Not tuple": (nnx.Not((nnx.Param, "u")), {("a", "s"), ("b", 1, "x")}),
  "Not everything": (nnx.Not(...), set()),
  "Everything": (nnx.Everything(), ALL),
  "Nothing": (nnx.Nothing(), set()),
  "combined": (nnx.All(nnx.PathContains("b"), nnx.Not(nnx.Variable)), {("b", 1, "x")}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_filter_selects(name):
  filter, want = CASES[name]
  predicate = to_predicate(filter)
  assert {path for path, leaf in LEAVES.items() if predicate(path, leaf)} == want


@pytest.mark.parametrize("name", CASES)
def test_the_filters_of_flax_nnx_select_the_same(name):
  flax = pytest.importorskip("flax.nnx", reason="flax is the oracle here")
  filter, want = CASES[name]
  theirs = translate(filter, flax)
  leaves = {
    ("a", "w"): flax.Param(1.0), ("a", "s"): flax.BatchStat(1.0, tag="t"),
    ("b", 0, "w"): flax_custom(flax)(1.0, tag="t"), ("b", 1, "x"): jnp.ones(2),
    ("head",): flax.Cache(1.0, tag="u"),
  }  # fmt: skip
  predicate = flax.filterlib.to_predicate(theirs)
  assert {path for path, leaf in leaves.items() if predicate(path, leaf)} == want


def flax_custom(flax, cache={}):  # noqa: B006
  return cache.setdefault("Custom", type("Custom", (flax.Param,), {}))


def translate(filter, flax):
  """The same filter made of Flax's classes."""
  again = lambda f: translate(f, flax)
  if filter is Custom:
    return flax_custom(flax)
  if isinstance(filter, type):
    return getattr(flax, filter.__name__)
  if isinstance(filter, list | tuple):
    return type(filter)(map(again, filter))
  if isinstance(filter, nnx.Any | nnx.All):
    return getattr(flax, type(filter).__name__)(*map(again, filter.predicates))
  if isinstance(filter, nnx.Not):
    return flax.Not(again(filter.predicate))
  if isinstance(filter, nnx.OfType):
    return flax.OfType(again(filter.type))
  if isinstance(filter, nnx.PathContains):
    return flax.PathContains(filter.key, exact=filter.exact)
  if isinstance(filter, nnx.PathIn):
    return flax.filterlib.PathIn(*map(tuple, filter.paths))
  if isinstance(filter, nnx.WithTag):
    return flax.WithTag(filter.tag)
  if isinstance(filter, nnx.Everything | nnx.Nothing):
    return getattr(flax, type(filter).__name__)()
  return filter


@pytest.mark.parametrize("bad", [3, 1.5, b"x", {"a": 1}], ids=repr)
def test_what_is_no_filter_is_refused(bad):
  with pytest.raises(FilterError) as error:
    nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), bad)
  assert error.value.args[0] == (
    "this is not a filter\n"
    f"  got: {type(bad).__name__} ({bad!r})\n"
    "  fix: use a Variable type, a tag as a string, `...`, a predicate(path, value), "
    "a tuple of filters, or nnx.OfType/PathContains/PathIn/WithTag/Any/All/Not"
  )
  with pytest.raises(FilterError, match="this is not a filter"):
    nnx.Any(nnx.Param, bad)


@pytest.mark.parametrize("everything", [..., True])
def test_everything_comes_last(everything):
  with pytest.raises(FilterError, match=r"got: `\.\.\.` as filter 2 of 3\n  fix: move it to the"):
    to_predicates([nnx.Param, everything, nnx.BatchStat])
  assert len(to_predicates([nnx.Param, everything])) == 2


def test_filters_are_values():
  makers = [
    lambda: nnx.OfType(nnx.Param), lambda: nnx.OfType(nnx.Cache),
    lambda: nnx.PathContains("a"), lambda: nnx.PathContains("a", exact=False),
    lambda: nnx.PathIn(("a",)), lambda: nnx.PathIn(("b",)), lambda: nnx.WithTag("t"),
    lambda: nnx.Any(nnx.Param, "t"), lambda: nnx.All(nnx.Param, "t"), lambda: nnx.Not("t"),
    lambda: nnx.Not(nnx.Param), nnx.Everything, nnx.Nothing,
  ]  # fmt: skip
  for i, a in enumerate(makers):
    for j, b in enumerate(makers):
      assert (a() == b()) is (i == j)
      if i == j:
        assert hash(a()) == hash(b())
  assert repr(nnx.Any(nnx.Param, "t")).startswith("Any(OfType(<class")
  assert repr(nnx.PathContains("a")) == "PathContains('a', True)"
