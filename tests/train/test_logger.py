"""What loggers write is read back, also after a run was killed."""

import builtins
import json
import math
import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, MissingPackageError

SCALARS = {
  "python": 1,
  "float": 0.25,
  "flag": True,
  "jax": jnp.float32(0.5),
  "half": jnp.bfloat16(1.5),
  "numpy": np.float64(2.5),
  "one": jnp.ones((1, 1)),
  "nested": {"a": {"b": jnp.int32(7)}, 3: 4.0},
}
WANT = {"python": 1, "float": 0.25, "flag": True, "jax": 0.5, "half": 1.5, "numpy": 2.5,
        "one": 1.0, "nested/a/b": 7, "nested/3": 4.0}  # fmt: skip


@pytest.fixture(params=[nnx.JsonLogger, nnx.TensorBoardLogger])
def logger(request, tmp_path):
  with request.param(tmp_path / "log") as logger:
    yield logger


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
  return [line["step"] for line in lines(path)]


def events(folder):
  """The events in a folder, by tensorboardX's own protocol buffers."""
  from tensorboardX.proto import event_pb2

  found = []
  for file in sorted(folder.iterdir()):
    data = file.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def scalars(folder):
  return {
    (v.tag, e.step): v.simple_value
    for e in events(folder)
    for v in e.summary.value
    if v.HasField("simple_value")
  }


def test_a_line_of_json_for_each_step_is_there_at_once(tmp_path):
  path = tmp_path / "new" / "folder" / "log.jsonl"
  with nnx.JsonLogger(path) as logger:
    logger.log(0, SCALARS)
    assert len(lines(path)) == 1  # before it is closed
    logger.log(jnp.int32(1), {})
  first, second = lines(path)
  assert first.pop("time") <= second.pop("time")
  assert first == {"step": 0, **WANT} and second == {"step": 1}


def test_what_json_does_not_have_is_a_string_and_comes_back_as_a_float(tmp_path):
  path = tmp_path / "log.jsonl"
  bad = {"a": jnp.nan, "b": np.inf, "c": -math.inf, "d": jnp.array([1.0, jnp.nan])}
  with nnx.JsonLogger(path) as logger:
    logger.log(0, bad)
  (line,) = lines(path)
  assert [line[k] for k in "abcd"] == ["NaN", "Infinity", "-Infinity", [1.0, "NaN"]]
  (back,) = nnx.JsonLogger.read(path)
  assert math.isnan(back["a"]) and (back["b"], back["c"]) == (math.inf, -math.inf)
  assert back["d"][0] == 1.0 and math.isnan(back["d"][1])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_killed_run_has_cut_is_removed(tmp_path, cut):
  path = tmp_path / "log.jsonl"
  with nnx.JsonLogger(path) as logger:
    for step in range(3):
      logger.log(step, {"loss": 0.5})
  path.write_bytes(path.read_bytes()[:-cut])
  assert [line["step"] for line in nnx.JsonLogger.read(path)] == [0, 1]
  with nnx.JsonLogger(path) as logger:
    logger.log(2, {"loss": 0.25})
  assert steps(path) == [0, 1, 2]


def test_a_file_that_holds_nothing_but_a_cut_line(tmp_path):
  path = tmp_path / "log.jsonl"
  for content in (b"", b"{", b'{"step": 12, "ti'):
    path.write_bytes(content)
    with nnx.JsonLogger(path) as logger:
      logger.log(0, {})
    assert steps(path) == [0]


def test_a_file_of_something_else_is_left_alone(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"a": 1}')
  with pytest.raises(InvalidArgumentError, match=r"path(.|\n)*fix: pass the path of a new file"):
    nnx.JsonLogger(path)
  assert path.read_text() == '{"a": 1}'


def test_steps_that_are_done_again_replace_the_old_ones(tmp_path):
  path = tmp_path / "log.jsonl"
  with nnx.JsonLogger(path) as logger:
    [logger.log(step, {"run": 1}) for step in range(5)]
  with nnx.JsonLogger(path, first_step=3) as logger:
    logger.log(3, {"run": 2})
  assert [(x["step"], x["run"]) for x in lines(path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]
  assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
  nnx.JsonLogger(path, first_step=9).close()
  assert steps(path) == [0, 1, 2, 3]


def test_tensorboard_files_hold_the_scalars(tmp_path):
  with nnx.TensorBoardLogger(tmp_path / "run") as logger:
    logger.log(3, SCALARS)
    logger.log(4, {"float": jnp.nan})
  found = scalars(tmp_path / "run")
  assert math.isnan(found.pop(("float", 4)))
  assert found == {(name, 3): float(value) for name, value in WANT.items()}


def test_tensorboard_draws_arrays_as_histograms_of_what_is_finite(tmp_path):
  with nnx.TensorBoardLogger(tmp_path) as logger:
    logger.log(0, {"x": jnp.array([1.0, 2.0, jnp.nan, jnp.inf]), "none": jnp.array([jnp.nan] * 2)})
    logger.log(1, {"half": jnp.ones((3, 4), jnp.bfloat16), "empty": jnp.zeros(0)})
  found = {v.tag: v.histo for e in events(tmp_path) for v in e.summary.value}
  assert set(found) == {"x", "half"}
  assert (found["x"].num, found["x"].min, found["x"].max) == (2, 1, 2)
  assert found["half"].num == 12


def test_tensorboard_hides_steps_that_are_done_again(tmp_path):
  with nnx.TensorBoardLogger(tmp_path) as logger:
    logger.log(5, {"loss": 1.0})
  with nnx.TensorBoardLogger(tmp_path, first_step=3) as logger:
    logger.log(3, {"loss": 2.0})
  assert any(e.session_log.status == 1 and e.step == 3 for e in events(tmp_path))  # START


def test_metrics_and_norms_are_logged_as_they_are(logger):
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), all=nnx.metrics.Welford("loss"),
                            norms=nnx.metrics.Norms(model, of="parameters"))  # fmt: skip
  metrics.update(loss=jnp.array([1.0, 3.0]), model=model)
  logger.log(0, {**metrics.compute(), "count": nnx.Variable(3)})
  logger.close()
  if isinstance(logger, nnx.JsonLogger):
    (line,) = nnx.JsonLogger.read(logger.path)
    assert (line["loss"], line["all/mean"], line["all/standard_deviation"]) == (2.0, 2.0, 1.0)
    assert line["norms/parameters"] > 0 and line["count"] == 3


def test_what_is_no_number_is_refused_and_nothing_is_written(logger, tmp_path):
  logger.log(0, {"a": 1})
  for bad in ({"a": "text"}, {"a": None}, {"a": 1j}, {"a": object()}, {"a": jax.random.key(0)}):
    with pytest.raises(InvalidArgumentError, match=r"scalars(.|\n)*fix: pass real numbers"):
      logger.log(1, {"good": 1.0, **bad})
  with pytest.raises(InvalidArgumentError, match="differ"):
    logger.log(1, {"a/b": 1, "a": {"b": 2}})
  for step in (1.5, "1", jnp.zeros(2, int), True, None):
    with pytest.raises(InvalidArgumentError, match="step"):
      logger.log(step, {"a": 1})
  for given in (3, None, [("a", 1)]):
    with pytest.raises(InvalidArgumentError, match="a dict of numbers"):
      logger.log(1, given)
  logger.close()
  if isinstance(logger, nnx.JsonLogger):
    assert len(nnx.JsonLogger.read(logger.path)) == 1
    with pytest.raises(InvalidArgumentError, match="step and time"):
      nnx.JsonLogger(tmp_path / "other").log(0, {"time": 1})
  else:
    assert set(scalars(tmp_path / "log")) == {("a", 0)}


def test_inside_of_a_compiled_function_nothing_can_be_logged(logger):
  with pytest.raises(InvalidArgumentError, match="outside of the compiled function"):
    jax.jit(lambda x: logger.log(0, {"a": x}))(1.0)


def test_a_closed_logger_refuses_and_closes_again(logger):
  logger.close()
  logger.close()
  with pytest.raises(InvalidArgumentError, match="closed"):
    logger.log(0, {"a": 1})


@pytest.mark.parametrize("kind", [nnx.JsonLogger, nnx.TensorBoardLogger])
def test_the_first_step_is_an_int(kind, tmp_path):
  with pytest.raises(InvalidArgumentError, match="first_step"):
    kind(tmp_path / "log", first_step="3")


def test_an_exception_in_the_block_closes_the_file(tmp_path):
  path = tmp_path / "log.jsonl"
  with pytest.raises(ValueError, match="mine"), nnx.JsonLogger(path) as logger:
    logger.log(0, {})
    raise ValueError("mine")
  with pytest.raises(InvalidArgumentError, match="closed"):
    logger.log(1, {})


def test_lines_of_several_threads_are_whole(tmp_path):
  path = tmp_path / "log.jsonl"
  with nnx.JsonLogger(path) as logger:
    work = lambda n: [logger.log(n * 50 + i, {"x": list(range(100))[i] * 1.0}) for i in range(50)]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
  assert sorted(steps(path)) == list(range(200))


def test_tensorboardx_is_named_where_it_is_missing(tmp_path, monkeypatch):
  load = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "tensorboardX":
      raise ImportError(name)
    return load(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(MissingPackageError, match=r"refax\[tensorboard\]"):
    nnx.TensorBoardLogger(tmp_path)


def test_a_logger_of_ones_own():
  class Silent(nnx.Logger):
    pass

  with Silent() as logger, pytest.raises(NotImplementedError, match="Silent has no method log"):
    logger.log(0, {})
