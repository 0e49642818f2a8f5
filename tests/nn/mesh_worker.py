"""Runs cases of `mesh_cases.py` on eight devices and on one, and prints a JSON of what differs."""

import functools
import itertools
import json
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from refax import nnx
from refax.errors import InvalidArgumentError
from tests.nn.mesh_cases import CASES, Case, arrays

LAYOUTS: dict[str, tuple[dict[str, str], tuple[int, str] | None]] = {
  "batch": ({"b": "data"}, None),
  "features": ({"b": "data", "f": "model"}, (-1, "model")),
  "rows": ({"f": "model"}, (-2, "model")),
  "sharded parameters": ({"b": "data"}, (-1, "data")),
  "sequence": ({"b": "data", "s": "model"}, None),
}
SHARDS = ({"b": "model"}, None)
"""The mesh axis of each letter of the inputs, and (axis, mesh axis) of the Params."""

COMPARED = ("features",)
"""Layouts that every case is computed in; in the others, what takes long is traced only."""

QUICK = ("Linear", "Embed", "Conv", "max_pool", "BatchNorm", "Dropout", "a step of GRUCell")
"""Cases that are computed in all layouts, and called in all ways."""

WAYS = {
  "nnx.jit": (nnx.jit, lambda call: call),
  "nnx.remat": (nnx.jit, nnx.remat),
}


def spec(axes: str, places: dict[str, str]) -> P:
  entries = [places.get(letter) for letter in axes]
  return P(*(None if name in entries[:i] else name for i, name in enumerate(entries)))


def place(model: Any, mesh: Mesh, where: tuple[int, str] | None) -> None:
  """Split the Params that have such an axis, of a size that can be split."""
  for _, v in nnx.iter_graph(model):
    if where is None or not isinstance(v, nnx.Param) or v.ndim < -where[0]:
      continue
    axis, name = where
    entries = [name if i == v.ndim + axis else None for i in range(v.ndim)]
    if v.shape[axis] % mesh.shape[name] == 0:
      nnx.device_put(v, NamedSharding(mesh, P(*entries)))


def step_of(case: Case, wrap=lambda call: call):
  """The loss, the outputs and the gradients of a call; or its outputs."""
  call = wrap(lambda model, *xs: case.call(model, *xs))

  def loss(model, *xs):
    out = call(model, *xs)
    return sum((y**2).mean() for y in jax.tree.leaves(out)), out

  return nnx.value_and_grad(loss, has_aux=True) if case.differentiable else call


def by_shards(case: Case, count: int):
  """The call of each shard by itself, each with the state of before."""

  def call(model, *xs):
    axes = [axes.index("b") for axes in case.inputs]
    parts = [jnp.split(x, count, axis) for x, axis in zip(xs, axes, strict=True)]
    before = jax.tree.map(jnp.copy, nnx.to_lojax(nnx.state(model, nnx.Not(nnx.Param))))
    outs = []
    for shard in zip(*parts, strict=True):
      nnx.update(model, before)
      outs.append(case.call(model, *shard))
    axis = out_axis(case)
    return jax.tree.map(lambda *ys: jnp.concatenate(ys, axis), *outs)

  return case._replace(call=call)


def out_axis(case: Case) -> int:
  return case.inputs[0].index("b")


def in_shards(case: Case, mesh: Mesh) -> Case:
  """The call in `nnx.shard_map`, over the smaller axis: the shards are compiled one by one too."""
  specs = tuple(spec(axes, {"b": "model"}) for axes in case.inputs)
  out = P(*[None] * out_axis(case), "model")
  call = nnx.shard_map(case.call, mesh=mesh, in_specs=(P(), *specs), out_specs=out)
  return case._replace(call=lambda model, *xs: call(model, *xs))


def host(x: Any) -> np.ndarray:
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def leaves(tree: Any) -> list[Any]:
  return jax.tree.leaves(nnx.to_lojax(tree))


def compare(got: list[np.ndarray], want: list[np.ndarray]) -> None:
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def made(case: Case) -> Any:
  return case.build(nnx.Rngs(0))


def run(case: Case, jit: Any = jax.jit, wrap: Any = lambda call: call) -> Any:
  """What the case computes without a mesh, and its state."""
  model = made(case)
  results = jit(step_of(case, wrap))(model, *arrays(case))
  return list(map(host, leaves((results, nnx.state(model)))))


def run_in_mesh(case: Case, mesh: Mesh, layout: str, jit: Any, wrap: Any, want: Any) -> None:
  """The same in a mesh; only traced if there is nothing to compare it with."""
  names, where = LAYOUTS.get(layout, SHARDS)
  with jax.set_mesh(mesh):
    model = made(case)
    place(model, mesh, where)
    shardings = [NamedSharding(mesh, spec(axes, names)) for axes in case.inputs]
    xs = [jax.device_put(x, s) for x, s in zip(arrays(case), shardings, strict=True)]
    before = [x.sharding for x in leaves(model)]
    if want is None:
      jit(step_of(case, wrap)).trace(model, *xs)
      return
    got = jit(step_of(case, wrap))(model, *xs)
    compare(list(map(host, leaves((got, nnx.state(model))))), want)
    for x, old in zip(leaves(model), before, strict=True):
      assert x.sharding.is_equivalent_to(old, x.ndim), ("a Variable has moved", old, x.sharding)
    if AxisType.Explicit in mesh.axis_types:
      check_types(case, model, got, names.get("b"))


def check_types(case: Case, model: Any, got: Any, batch: str | None) -> None:
  """In an explicit mesh: outputs have the batch split as it was, gradients are where Params are."""
  (_, out), grads = got if case.differentiable else ((None, got), None)
  if batch is not None and "b" in case.inputs[0]:
    for y in jax.tree.leaves(out):
      assert batch in jax.tree.leaves(tuple(jax.typeof(y).sharding.spec)), jax.typeof(y)
  if grads is not None:
    params = leaves(nnx.state(model, nnx.Param))
    for g, p in zip(leaves(grads), params, strict=True):
      assert jax.typeof(g).sharding == jax.typeof(p).sharding, (jax.typeof(g), jax.typeof(p))


def attempts(name: str, case: Case):
  """(what is tried, a function that raises if it fails), for each try."""
  want = run(case)
  mesh_of = lambda kind: jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  plain = lambda call: call
  for kind, layout in itertools.product((AxisType.Auto, AxisType.Explicit), LAYOUTS):
    if layout == "sequence" and not case.differentiable:
      continue  # a step of decoding is cut out of the sequence: JAX asks for it in one piece
    computed = layout in COMPARED or name in QUICK
    if kind is AxisType.Explicit or layout in COMPARED:
      wanted = want if computed and layout not in case.wrong else None
      args = (case, mesh_of(kind), layout, jax.jit, plain, wanted)
      yield f"{kind.name}, {layout}", lambda args=args: run_in_mesh(*args)
  for way, (jit, wrap) in WAYS.items() if name in QUICK else ():
    args = (case, mesh_of(AxisType.Explicit), "features", jit, wrap, want)
    yield f"Explicit, {way}", lambda args=args: run_in_mesh(*args)
  if case.in_shards:
    wanted = run(by_shards(case, 2)) if case.is_random else want
    for kind in (AxisType.Auto, AxisType.Explicit)[: 1 + (name in QUICK)]:
      mesh = mesh_of(kind)
      args = (in_shards(case, mesh), mesh, "two shards", jax.jit, plain, wanted)
      yield f"Manual in {kind.name}", lambda args=args: run_in_mesh(*args)


def batch_norm_in_shards(kind: AxisType) -> None:
  """With `axis_name` statistics are of the whole batch; without, each shard has its own."""
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  x = np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
  made = lambda **options: nnx.BatchNorm(8, momentum=0.5, rngs=nnx.Rngs(0), **options)

  def sharded(norm, state):
    specs = nnx.StateAxes({nnx.BatchStat: state, ...: P()})
    call = lambda norm, x: norm(x)
    run = nnx.shard_map(call, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    return jax.jit(run)(norm, jax.device_put(x, NamedSharding(mesh, P("data"))))

  whole, parts = made(), [made() for _ in range(4)]
  want, wants = whole(x), [norm(part) for norm, part in zip(parts, np.split(x, 4), strict=True)]
  stats = [np.concatenate([host(getattr(p, n)[...]) for p in parts]) for n in ("mean", "var")]
  with jax.set_mesh(mesh):
    norm = made(axis_name="data")
    compare([host(sharded(norm, P()))], [host(want)])
    compare(
      [host(norm.mean[...]), host(norm.var[...])], [host(whole.mean[...]), host(whole.var[...])]
    )
    norm = made()
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(32)), nnx.BatchStat(jnp.ones(32))
    nnx.device_put((norm.mean, norm.var), NamedSharding(mesh, P("data")))
    compare([host(sharded(norm, P("data")))], [np.concatenate(list(map(host, wants)))])
    compare([host(norm.mean[...]), host(norm.var[...])], stats)
    try:
      sharded(made(), P())
      raise AssertionError("no error")
    except InvalidArgumentError as error:
      assert "axis_name='data': the running statistics are the same" in str(error), error


def decoding_in_shards(kind: AxisType) -> None:
  """Each shard decodes its part of the batch, with its part of the memory."""
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  case = CASES["MultiHeadAttention, decoding"]
  want = run(case)
  index = lambda path, v: "cache_index" in path
  specs = nnx.StateAxes({index: P(), nnx.Cache: P("data"), ...: P()})
  call = lambda model, x: case.call(model, x)
  with jax.set_mesh(mesh):
    model = made(case)
    nnx.device_put((model.cached_key, model.cached_value), NamedSharding(mesh, P("data")))
    (x,) = arrays(case)
    step = nnx.shard_map(call, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    out = jax.jit(step)(model, jax.device_put(x, NamedSharding(mesh, P("data"))))
    compare(list(map(host, leaves((out, nnx.state(model))))), want)


PROGRAMS = {"BatchNorm in shards": batch_norm_in_shards, "decoding in shards": decoding_in_shards}


def tries(name: str):
  """The attempts of a case or of a program."""
  if name in CASES:
    return attempts(name, CASES[name])
  kinds = (AxisType.Auto, AxisType.Explicit)
  return ((kind.name, functools.partial(PROGRAMS[name], kind)) for kind in kinds)


def main(names: list[str]) -> None:
  assert jax.device_count() == 8
  failed = {}
  for name in names:
    start = time.perf_counter()
    for what, attempt in tries(name):
      try:
        attempt()
      except Exception:
        failed.setdefault(name, {})[what] = traceback.format_exc(limit=-4)
    seconds = f"{time.perf_counter() - start:.1f} s"
    print(name, seconds, *failed.get(name, {}), sep="; ", file=sys.stderr, flush=True)
  json.dump(failed, sys.stdout)


if __name__ == "__main__":
  main(sys.argv[1:] or [*CASES, *PROGRAMS])
