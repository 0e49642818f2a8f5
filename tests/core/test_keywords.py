"""Mistyped and foreign keywords of constructors: refused at once, with the name that was meant."""

import dataclasses
import functools
import inspect

import optax
import pytest

from refax import nnx
from refax.core.keywords import SYNONYMS
from refax.errors import KeywordError

R = nnx.Rngs(0)
CASES = [
  (lambda: nnx.Linear(2, 3, use_bais=False, rngs=R), "Linear", "use_bais", "use_bias=?"),
  (lambda: nnx.Linear(2, 3, bias=False, rngs=R), "Linear", "bias", "use_bias=?"),
  (lambda: nnx.Linear(in_channels=2, rngs=R), "Linear", "in_channels", "in_features=?"),
  (lambda: nnx.Linear(2, units=3, rngs=R), "Linear", "units", "out_features=?"),
  (lambda: nnx.Linear(2, features=3, rngs=R), "Linear", "features", "out_features=?"),
  (lambda: nnx.Linear(2, 3, key=0), "Linear", "key", "rngs=: nnx.Rngs(0)?"),
  (lambda: nnx.Conv(2, 3, (3,), stride=2, rngs=R), "Conv", "stride", "strides=?"),
  (lambda: nnx.Conv(2, 3, (3,), dilation=2, rngs=R), "Conv", "dilation", "kernel_dilation=?"),
  (lambda: nnx.Conv(2, 4, (3,), groups=2, rngs=R), "Conv", "groups", "feature_group_count=?"),
  (lambda: nnx.LayerNorm(2, eps=1e-3, rngs=R), "LayerNorm", "eps", "epsilon=?"),
  (lambda: nnx.LayerNorm(2, elementwise_affine=False, rngs=R), "LayerNorm", "elementwise_affine",
   "use_scale=; and use_bias=?"),
  (lambda: nnx.Dropout(p=0.5), "Dropout", "p", "rate=?"),
  (lambda: nnx.Embed(4, embedding_dim=3, rngs=R), "Embed", "embedding_dim", "features=?"),
  (lambda: nnx.Optimizer(nnx.Linear(2, 3, rngs=R), lr=1e-3, wrt=nnx.Param), "Optimizer", "lr",
   "tx=: optax.adam(1e-3)?"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "kind", "name", "meant"), CASES, ids=[c[2] for c in CASES])
def test_a_foreign_keyword_is_refused_with_the_one_that_was_meant(build, kind, name, meant):
  with pytest.raises(TypeError) as info:
    build()
  assert type(info.value) is KeywordError
  text = info.value.args[0]
  assert text.startswith(f"{kind} has no argument {name}\n  got: {name}=")
  assert f"\n  fix: did you mean {meant} {kind} takes " in text


def test_nothing_is_built_before_the_refusal():
  rngs = nnx.Rngs(0)
  with pytest.raises(KeywordError):
    nnx.Linear(2, 3, use_bais=False, rngs=rngs)
  assert int(rngs.default.count) == 0


def test_classes_of_users_are_checked_by_their_own_constructor():
  class Net(nnx.Module):
    def __init__(self, width, /, depth=2, *, use_norm=True):
      self.width, self.depth, self.use_norm = width, depth, use_norm

  class Deeper(Net):
    pass

  class Other(Net):
    def __init__(self, size):
      super().__init__(size, depth=1)

  assert Net(3, depth=4, use_norm=False).depth == 4 and Deeper(3, depth=5).depth == 5
  assert Other(size=3).width == 3
  for cls in (Net, Deeper):
    with pytest.raises(KeywordError, match=r"did you mean use_norm=\? \w+ takes depth, use_norm\n"):
      cls(3, use_nrom=False)
    with pytest.raises(KeywordError, match="has no argument width"):
      cls(width=3)
  with pytest.raises(KeywordError, match=r"fix: Other takes size\n  see: "):
    Other(xyz=3)


def test_dataclasses_partials_and_late_constructors_are_seen():
  @dataclasses.dataclass
  class Config(nnx.Module):
    size: int
    rate: float = 0.5

  assert Config(size=1).rate == 0.5
  with pytest.raises(KeywordError, match=r"did you mean size=\? Config takes size, rate\n  see: "):
    Config(sise=1)
  with pytest.raises(KeywordError):
    functools.partial(Config, p=1)(sise=2)

  def init(self, other):
    self.other = other

  Config.__init__ = init
  assert Config(other=2).other == 2


def test_what_takes_any_keyword_or_cannot_be_looked_into_is_left_to_python():
  class Any(nnx.Module):
    def __init__(self, **kwargs):
      self.kwargs = tuple(kwargs)

  def decorated(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
      return f(*args, **kwargs)

    return wrapper

  class Wrapped(nnx.Module):
    @decorated
    def __init__(self, size):
      self.size = size

  class Made(nnx.Module):
    def __new__(cls, size, **options):
      return super().__new__(cls)

    def __init__(self, size, **options):
      self.size = size

  assert Any(use_bais=1).kwargs == ("use_bais",) and Wrapped(size=2).size == 2

  class New(nnx.Module):
    def __new__(cls, **options):
      self = super().__new__(cls, **options)
      self.options = tuple(options)
      return self

  assert Made(2, anything=1).size == 2 and New(a=1).options == ("a",)
  with pytest.raises(TypeError) as info:
    Wrapped(use_bais=1)
  assert type(info.value) is TypeError


def test_a_class_without_a_constructor_takes_no_keyword():
  class Empty(nnx.Module):
    pass

  with pytest.raises(KeywordError, match="fix: Empty takes no arguments"):
    Empty(use_bais=1)


def test_every_synonym_leads_to_an_argument_that_some_class_has():
  taken = set()
  for name in nnx.__all__:
    value = getattr(nnx, name)
    if inspect.isclass(value) and issubclass(value, nnx.Pytree):
      taken |= set(inspect.signature(value).parameters)
  assert [x for meant in SYNONYMS.values() for x in meant if x not in taken] == []


def test_what_is_right_is_built():
  model = nnx.Linear(in_features=2, out_features=3, use_bias=False, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model=model, tx=optax.sgd(0.1), wrt=nnx.Param)
  assert model.bias is None and int(optimizer.step) == 0
