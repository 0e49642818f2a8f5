"""A transformer on eight devices under each plan, beside JAX by hand: `python -m benchmarks.scale`.

By hand is a function of arrays with the same shardings: parameters in a dict, a loop over layers by
`jax.lax.scan`, `jax.jit` with donated arguments. Both take turns in one process. Bytes are counted
in the compiled programs of both, and compared with the formula of the plan. Host devices share the
cores: the ratios say what Refax adds, the times are not those of accelerators.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.ad_checkpoint import checkpoint_name  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from benchmarks.scale_model import table  # noqa: E402
from refax import nnx  # noqa: E402

OUT = Path("out/benchmarks")
LAYERS, SIZE, HEADS, LENGTH, BATCH = 4, 128, 8, 64, 16
PLANS = {
  "replicated": (nnx.plans.replicated, P("data")),
  "fsdp": (nnx.plans.fsdp("data", min_size=2**12), P("data")),
  "tensor parallel": (nnx.plans.tensor_parallel("model"), P("data")),
  "both": (nnx.plans.fsdp("data", min_size=2**12) & nnx.plans.tensor_parallel("model"), P("data")),
}
MESH = {"replicated": (8, 1), "fsdp": (8, 1), "tensor parallel": (1, 8), "both": (2, 4)}


def build() -> Any:
  return nnx.TransformerDecoder(LAYERS, SIZE, HEADS, use_bias=False, rngs=nnx.Rngs(0))


def ours(mesh: Any, plan: Any) -> tuple[Callable, tuple]:
  """The train step of Refax, and its state."""
  tx = optax.adam(1e-3)
  make = lambda: (model := build(), nnx.Optimizer(model, tx, wrt=nnx.Param))

  @nnx.jit
  def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: ((model(x) - x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  return step, nnx.create_sharded(make, mesh, plan)


def by_hand(mesh: Any, plan: Any) -> tuple[Callable, tuple]:
  """The same step as a function of arrays, laid out by the same specs."""
  model = build()
  specs = plan.specs(model, mesh)
  flat = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(model))}
  put = lambda tree: {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
  params, tx = put(flat), optax.adam(1e-3)
  state = tx.init(params)
  # Over the axis of the batch, a layer's parameters are gathered where they are used.
  used = {k: P(*(a if a == "model" else None for a in specs[k])) for k in flat}
  is_divided = {k for k in flat if "data" in specs[k]}

  def use(key: str, x: jax.Array) -> jax.Array:
    if key not in is_divided:
      return x
    spec = P(*tuple(used[key])[-x.ndim :])
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return checkpoint_name(x, "gathered")

  def norm(p: dict, name: str, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}.scale"] + p[f"{name}.bias"]

  def block(x: jax.Array, layer: dict) -> tuple[jax.Array, None]:
    p = {k: use(f"blocks.layers.{k}", v) for k, v in layer.items()}
    h = norm(p, "attention_norm", x)
    q, k, v = (
      jnp.einsum("bld,dhs->blhs", h, p[f"attention.{n}.kernel"]) for n in ("query", "key", "value")
    )
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("blhs,hsd->bld", h, p["attention.out.kernel"])
    h = jax.nn.gelu(norm(p, "feed_forward_norm", x) @ p["feed_forward.up.kernel"])
    return x + h @ p["feed_forward.down.kernel"], None

  body = block
  if is_divided:
    policy = jax.checkpoint_policies.save_anything_except_these_names("gathered")
    body = jax.checkpoint(block, policy=policy, prevent_cse=False)

  def loss_fn(params: dict, x: jax.Array) -> jax.Array:
    prefix = "blocks.layers."
    layers = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
    y = jax.lax.scan(body, x, layers)[0]
    last = {k: use(k, v) for k, v in params.items() if not k.startswith(prefix)}
    return ((norm(last, "norm", y) - x) ** 2).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: tuple, x: jax.Array) -> tuple:
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    new: Any = optax.apply_updates(params, updates)
    lay = lambda k, v: jax.lax.with_sharding_constraint(v, NamedSharding(mesh, specs[k]))
    return ({k: lay(k, v) for k, v in new.items()}, opt_state), loss

  held = [(params, state)]

  def run(x: jax.Array) -> jax.Array:
    held[0], loss = step(held[0], x)
    return loss

  run.lower = lambda x: step.lower(held[0], x)  # pyright: ignore[reportFunctionMemberAccess]
  return run, ()


def formula(name: str, divided: int, whole: int) -> float:
  """Bytes that a device sends in a step, if the devices of an axis form a ring.

  Args:
    name: the plan.
    divided: bytes of the parameters that FSDP divides.
    whole: bytes of the others.
  """
  ring = lambda n, nbytes: 2 * (n - 1) / n * nbytes
  data, model = MESH[name]
  # Sums behind attention and the feed-forward part; in the backward pass one before the latter,
  # and three before the former: of queries, keys, values, which XLA adds up first on GPU and TPU.
  activations = 4 * BATCH * LENGTH * SIZE // data
  sums = ring(model, activations) * 6 * LAYERS if model > 1 else 0
  part = model if name == "both" else 1
  sent = ring(data, (divided + whole) / part) if data > 1 else 0  # gradients
  if name in ("fsdp", "both"):
    sent += 2 * (data - 1) / data * divided / part  # gathered twice
  return sent + sums


def measure(name: str, rounds: int) -> dict[str, Any]:
  """Compile times, step times and bytes of a plan, for Refax and by hand."""
  plan, spec = PLANS[name]
  mesh = jax.make_mesh(MESH[name], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  found: dict[str, Any] = {"mesh": dict(mesh.shape)}
  with jax.set_mesh(mesh):
    x = jax.device_put(jax.random.normal(jax.random.key(0), (BATCH, LENGTH, SIZE)), spec)
    ways = {"by hand": by_hand(mesh, plan), "Refax": ours(mesh, plan)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for way, (step, state) in ways.items():
      jax.clear_caches()
      start = time.perf_counter()
      losses[way] = float(step(*state, x))
      found[f"first call, {way}"] = time.perf_counter() - start
      found[f"bytes, {way}"] = nnx.collectives(step, *state, x).sent
    assert abs(losses["Refax"] - losses["by hand"]) < 1e-4, losses
    for _ in range(rounds):
      for way, (step, state) in ways.items():
        start = time.perf_counter()
        jax.block_until_ready([step(*state, x) for _ in range(3)])
        times[way].append((time.perf_counter() - start) / 3)
  specs = plan.specs(build(), mesh)
  sizes = {".".join(map(str, p)): v.nbytes for p, v in nnx.to_flat_state(nnx.state(build()))}
  divided = sum(n for k, n in sizes.items() if "data" in specs[k])
  found["bytes, formula"] = formula(name, divided, sum(sizes.values()) - divided)
  found |= {f"step, {way}": statistics.median(t) for way, t in times.items()}
  found["ratio"] = statistics.median(
    a / b for a, b in zip(times["Refax"], times["by hand"], strict=True)
  )
  return found


def host_times(count: int, rounds: int) -> dict[str, Any]:
  """Host seconds of a call with so many Variables that are on eight devices."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  whole = NamedSharding(mesh, P())
  values = [jax.device_put(np.ones(8, np.float32), whole) for _ in range(count)]
  model = nnx.Dict(x=nnx.List([nnx.Param(v) for v in values]))
  add = nnx.jit(lambda model: [v.set_value(v[...] + 1) for v in model.x] and None)
  hand = jax.jit(lambda values: [v + 1 for v in values], donate_argnums=0)
  times: dict[str, list[float]] = {"by hand": [], "Refax": []}
  with jax.set_mesh(mesh):
    add(model)
    values = hand(values)
    for _ in range(rounds):
      start = time.perf_counter()
      values = hand(values)
      times["by hand"].append(time.perf_counter() - start)
      jax.block_until_ready(values)
      start = time.perf_counter()
      add(model)
      times["Refax"].append(time.perf_counter() - start)
      jax.block_until_ready(model.x[-1][...])
  return {way: statistics.median(t) for way, t in times.items()} | {
    "ratio": statistics.median(a / b for a, b in zip(times["Refax"], times["by hand"], strict=True))
  }


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--model-only", action="store_true", help="print the arithmetic only")
  options = parser.parse_args()
  lines = []
  if not options.model_only:
    lines += [
      "| plan | mesh | first call | step, by hand | Refax | sent, by hand | Refax | formula |",
      "|---|---|---|---|---|---|---|---|",
    ]
    results = {}
    for name in PLANS:
      r = results[name] = measure(name, options.rounds)
      first = r["first call, Refax"] / r["first call, by hand"]
      sent = (f"{r[f'bytes, {way}']:,.0f}" for way in ("by hand", "Refax", "formula"))
      mesh = " x ".join(map(str, MESH[name]))
      cells = name, mesh, f"{first:.2f}", f"{r['step, by hand'] * 1e3:.1f} ms", f"{r['ratio']:.2f}"
      lines.append(f"| {' | '.join((*cells, *sent))} |")
      print(lines[-1], flush=True)
    lines += ["", "| Variables on 8 devices | a call, by hand | Refax |", "|---|---|---|"]
    for count in (1_000, 10_000):
      r = results[str(count)] = host_times(count, options.rounds)
      lines.append(f"| {count:,} | {r['by hand'] * 1e3:.1f} ms | {r['ratio']:.2f} |")
      print(lines[-1], flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "scale.json").write_text(json.dumps(results, indent=1))
  lines += ["", table()]
  print("\n".join(lines))


if __name__ == "__main__":
  main()
