"""All cases, in the order of their tables."""

from functools import partial

from benchmarks import (
  around,
  dispatch,
  eager,
  files,
  generation,
  inside,
  mlp,
  patterns,
  process,
  pytrees,
  tracing,
  transformer,
)
from benchmarks.measure import Case


def _patterns() -> dict[str, Case]:
  return {
    f"{name}, {n}": Case(partial(make, n), "patterns", rounds=7)
    for name, make in (patterns.PATTERNS | around.AROUND).items()
    for n in (10, 100)
  }


CASES: dict[str, Case] = {
  "dispatch, 10 Variables": Case(partial(dispatch.dispatch, 10), "calls"),
  "dispatch, 100 Variables": Case(partial(dispatch.dispatch, 100), "calls"),
  "dispatch, 400 Variables": Case(partial(dispatch.dispatch, 400), "calls"),
  "train step, depth 4": Case(partial(mlp.train, 4), "calls"),
  "train step, depth 32": Case(partial(mlp.train, 32), "calls"),
  "transformer, 4 blocks": Case(partial(transformer.train, 4), "calls"),
  "evaluation, depth 4": Case(partial(mlp.evaluate, 4), "calls"),
  "evaluation, depth 32": Case(partial(mlp.evaluate, 32), "calls"),
  "serving, 7600 Variables": Case(partial(patterns.serving, 7600), "calls", rounds=5),
  **_patterns(),
  "decode, a step": Case(generation.step, "generation", rounds=7),
  "decode, 32 tokens": Case(generation.loop, "generation", rounds=7),
  "construction, 64 Linears": Case(partial(mlp.construct, 64), "eager"),
  "clone": Case(eager.clone, "eager", rounds=7),
  "deepcopy": Case(eager.deepcopy, "eager", rounds=7),
  "update": Case(eager.update, "eager", rounds=7),
  "Optimizer": Case(eager.optimizer, "eager", rounds=7),
  "MultiMetric.update": Case(eager.metrics_update, "eager", rounds=7),
  "MultiMetric.compute": Case(eager.metrics_compute, "eager", rounds=7),
  "MultiMetric.reset": Case(eager.metrics_reset, "eager", rounds=7),
  "Embed": Case(eager.embed, "eager", rounds=7),
  "remat": Case(eager.remat, "eager", rounds=7),
  "vmap": Case(eager.vmap, "eager", rounds=7),
  "scan": Case(eager.scan, "eager", rounds=7),
  "fori_loop": Case(eager.fori_loop, "eager", rounds=7),
  "while_loop": Case(eager.while_loop, "eager", rounds=7),
  "cond": Case(eager.cond, "eager", rounds=7),
  "RNN of an LSTM": Case(eager.recurrent, "eager", rounds=7),
  **{
    f"lower, depth {depth}": Case(partial(tracing.lower, depth), "trace and compile", rounds=5)
    for depth in (8, 32)
  },
  "first call, depth 8": Case(partial(tracing.first_call, 8), "trace and compile", rounds=3),
  "checked step, depth 32": Case(partial(inside.checked_step, 32), "inside"),
  "names of layers, depth 8": Case(partial(inside.names, 8), "inside", rounds=7),
  "pytree in, 10 Variables": Case(partial(pytrees.read, 10), "pytrees"),
  "pytree in, 100 Variables": Case(partial(pytrees.read, 100), "pytrees"),
  "pytree in and out, 100 Variables": Case(partial(pytrees.update, 100), "pytrees"),
  "200 MiB and Adam": Case(process.memory, "memory", rounds=1, unit="bytes", alone=True),
  "an Optimizer is made": Case(
    files.optimizer_memory, "memory", rounds=1, unit="bytes", alone=True
  ),
  **{
    f"{what}, 200 MiB": Case(
      partial(files.memory, what), "memory", rounds=1, unit="bytes", alone=True
    )
    for what in ("save", "load", "restore")
  },
  **{
    f"{what}, {name}": Case(partial(files.seconds, what, size), "files", rounds=5)
    for what in ("save", "load", "restore")
    for name, size in (("200 MiB", files.LARGE), ("400 small arrays", files.SMALL))
  },
  "import": Case(process.imports, "import", rounds=7, alone=True),
}
