import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest
from flax import nnx as flax_nnx

from refax import names, nnx
from refax.migrate import arguments
from refax.migrate.kinds import ATTRIBUTES, VARIABLE, VARIABLES

PUBLIC = [n for n in dir(flax_nnx) if not n.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_of_flax_nnx_has_an_answer(name):
  answer = names.find(name)
  assert answer is not None
  assert answer.text and not answer.text.endswith(".")
  if answer.kind == "instead":
    assert answer.text.startswith(("write ", "leave it out"))
  else:
    place = nnx
    for part in answer.text.removesuffix("()").split("."):
      place = getattr(place, part)


def test_the_table_has_nothing_that_flax_has_not():
  assert not names.SAME - set(PUBLIC)
  assert not set(names.INSTEAD) - set(PUBLIC)
  assert not names.SAME & set(names.INSTEAD)
  assert names.find("Nonsense") is names.find("statelib.Nonsense") is None


def test_names_in_submodules_mean_the_same_objects():
  for info in pkgutil.walk_packages(flax_nnx.__path__, "flax.nnx."):
    path = info.name.removeprefix("flax.nnx.")
    for name, value in vars(importlib.import_module(info.name)).items():
      answer = names.find(f"{path}.{name}")
      if name.startswith("_") or isinstance(value, types.ModuleType) or answer is None:
        continue
      if answer.kind == "renamed" and answer.text.isidentifier() and path != "compat":
        assert getattr(flax_nnx, answer.text, value) is value, f"{path}.{name}"


@pytest.mark.parametrize(
  ("path", "want"),
  [
    ("statelib.State", "State"),
    ("nn.linear.Linear", "Linear"),
    ("nn.initializers.zeros", "initializers.zeros"),
    ("training.metrics.Average", "metrics.Average"),
    ("metrics.Average", "metrics.Average"),
    ("compat.jit", "jit"),
    ("filterlib.PathIn", "PathIn"),
  ],
)
def test_submodule_paths(path, want):
  assert names.find(path).text == want


def test_the_expressions_are_what_flax_has_by_default():
  import jax

  for name in ("kernel", "bias", "embed"):
    old = getattr(importlib.import_module("flax.nnx.nn.linear"), f"default_{name}_init")
    new = eval(names.RENAMED[f"nn.linear.default_{name}_init"], {"initializers": nnx.initializers})
    key = jax.random.key(0)
    assert (old(key, (3, 4)) == new(key, (3, 4))).all()


def test_the_table_imports_nothing():
  code = (
    "import sys; before = set(sys.modules); import refax.names; print(set(sys.modules) - before)"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert not any(f"'{name}" in out.stdout for name in ("jax", "libcst", "flax", "refax.core"))


def parameters(thing):
  found = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters
  return {n: p for n, p in found.items() if p.kind is not p.POSITIONAL_ONLY}


@pytest.mark.parametrize("name", sorted(names.SAME))
def test_arguments_that_refax_lacks_are_in_the_tables(name):
  old, new = getattr(flax_nnx, name), getattr(nnx, name)
  if not callable(old) or (not inspect.isroutine(old) and not inspect.isclass(old)):
    return
  if name in VARIABLES or not callable(new):
    return
  theirs, ours = parameters(old), parameters(new)
  if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
    return
  keywords = {n for n, p in theirs.items() if p.kind is p.KEYWORD_ONLY and n[0] != "_"}
  known = {key for owner, key in [*arguments.LISTED, *arguments.RENAMED] if owner == name}
  known |= arguments.DROPPED if name in arguments.WITH_MODES else set()
  assert not keywords - set(ours) - known


def test_the_attributes_of_layers_are_theirs():
  rngs = nnx.Rngs(0, params=1, dropout=2, carry=3)
  made = {
    "Linear": nnx.Linear(2, 2, rngs=rngs),
    "LinearGeneral": nnx.LinearGeneral(2, 2, rngs=rngs),
    "Einsum": nnx.Einsum("ab,bc->ac", (2, 2), (2,), rngs=rngs),
    "Conv": nnx.Conv(2, 2, (1,), rngs=rngs),
    "ConvTranspose": nnx.ConvTranspose(2, 2, (1,), rngs=rngs),
    "Embed": nnx.Embed(2, 2, rngs=rngs),
    "BatchNorm": nnx.BatchNorm(2, rngs=rngs),
    "LayerNorm": nnx.LayerNorm(2, rngs=rngs),
    "RMSNorm": nnx.RMSNorm(2, rngs=rngs),
    "GroupNorm": nnx.GroupNorm(2, 1, rngs=rngs),
    "InstanceNorm": nnx.InstanceNorm(2, rngs=rngs),
    "LoRA": nnx.LoRA(2, 1, 2, rngs=rngs),
    "LoRALinear": nnx.LoRALinear(2, 2, lora_rank=1, rngs=rngs),
    "PReLU": nnx.PReLU(),
    "MultiHeadAttention": nnx.MultiHeadAttention(1, 2, rngs=rngs),
    "RngStream": rngs.params,
    "Rngs": rngs,
    "metrics.Average": nnx.metrics.Average(),
  }
  for name, kinds in ATTRIBUTES.items():
    for attribute, kind in kinds.items() if name in made else ():
      value = getattr(made[name], attribute)
      assert isinstance(value, getattr(nnx, kind)), (name, attribute)
  assert set(ATTRIBUTES) - set(made) == {"Optimizer"}
  assert VARIABLE in VARIABLES
