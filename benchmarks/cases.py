"""All cases, in the order of the table."""

from functools import partial

from benchmarks import dispatch, mlp, process, pytrees, transformer
from benchmarks.measure import Case

CASES: dict[str, Case] = {
  "dispatch, 10 Variables": Case(partial(dispatch.dispatch, 10)),
  "dispatch, 100 Variables": Case(partial(dispatch.dispatch, 100)),
  "dispatch, 400 Variables": Case(partial(dispatch.dispatch, 400)),
  "train step, depth 4": Case(partial(mlp.train, 4)),
  "train step, depth 32": Case(partial(mlp.train, 32)),
  "transformer, 4 blocks": Case(partial(transformer.train, 4)),
  "evaluation, depth 4": Case(partial(mlp.evaluate, 4)),
  "evaluation, depth 32": Case(partial(mlp.evaluate, 32)),
  "construction, 64 Linears": Case(partial(mlp.construct, 64)),
  "trace and compile, depth 8": Case(partial(mlp.compile_step, 8), rounds=3),
  "pytree in, 10 Variables": Case(partial(pytrees.read, 10)),
  "pytree in, 100 Variables": Case(partial(pytrees.read, 100)),
  "pytree in and out, 100 Variables": Case(partial(pytrees.update, 100)),
  "memory, 200 MiB and Adam": Case(process.memory, rounds=1, unit="bytes", alone=True),
  "import": Case(process.imports, rounds=9, alone=True),
}
