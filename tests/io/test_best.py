"""Which checkpoints are kept, and which is the best: a metric may be missing or not a number."""

import json
import math

import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, MissingCheckpointError
from refax.io.best import Preserve, Ranking

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")
NAN = math.nan


def run(folder, losses, first=0, **options):
  """Save a checkpoint with each loss; a loss of None is a save without metrics."""
  v = {"v": nnx.Variable(0.0)}
  with nnx.Checkpointer(folder, asynchronous=False, **options) as checkpoints:
    for step, loss in enumerate(losses, first):
      v["v"][...] = step
      checkpoints.save(step, v, metrics=None if loss is None else {"loss": loss})
    return checkpoints.steps


@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_that_diverges_keeps_its_best(sign, tmp_path):
  options = {"keep": 1, "keep_best": 1, "best": "loss", "mode": "min" if sign == 1 else "max"}
  losses = [3.0 * sign, 1.0 * sign, 2.0 * sign, NAN, NAN, NAN, NAN]
  assert run(tmp_path, losses, **options) == [1, 6]
  with nnx.Checkpointer(tmp_path, best="loss", mode=options["mode"]) as checkpoints:
    assert checkpoints.best_step == 1
    v = nnx.Variable(0.0)
    assert checkpoints.restore({"v": v}, step=checkpoints.best_step).step == 1 == float(v)


def test_nan_is_no_best_even_where_there_is_no_other(tmp_path):
  assert run(tmp_path, [NAN, NAN, NAN], keep=1, keep_best=5, best="loss") == [2]
  with nnx.Checkpointer(tmp_path, best="loss") as checkpoints:
    with pytest.raises(MissingCheckpointError) as error:
      _ = checkpoints.best_step
    assert error.value.args[0].split("\n")[0] == "no checkpoint has a number as 'loss'"
    assert "got: the steps 2, and the metric is missing or NaN in all" in str(error.value)


def test_the_last_one_stays_where_no_other_would(tmp_path):
  assert run(tmp_path, [NAN, NAN], keep=0, keep_best=1, best="loss") == [1]
  assert run(tmp_path, [1.0, NAN, 2.0], first=2, keep=0, keep_best=1, best="loss") == [2]


def test_checkpoints_without_metrics_are_not_kept_for_ever(tmp_path):
  assert run(tmp_path, [None] * 3, keep=None) == [0, 1, 2]
  assert run(tmp_path, [5.0, 6.0], first=3, keep=1, keep_best=1, best="loss") == [3, 4]


def test_metrics_count_that_were_saved_before_anything_was_ranked_by_them(tmp_path):
  assert run(tmp_path, [2.0, 1.0, 3.0], keep=None) == [0, 1, 2]
  with nnx.Checkpointer(tmp_path, best="loss") as checkpoints:
    assert checkpoints.best_step == 1
  assert run(tmp_path, [4.0], first=3, keep=1, keep_best=1, best="loss") == [1, 3]
  (tmp_path / "1" / "about" / "metadata").write_text("{")  # damaged: nobody's best
  with nnx.Checkpointer(tmp_path, best="loss") as checkpoints:
    assert checkpoints.best_step in (1, 3)


def test_ranked_by_another_metric_than_before(tmp_path):
  v = {"v": nnx.Variable(0)}
  with nnx.Checkpointer(tmp_path, best="a", asynchronous=False) as checkpoints:
    checkpoints.save(1, v, metrics={"a": 1})
    checkpoints.save(2, v, metrics={"a": 2, "b": 1})
  options = {"keep": 1, "keep_best": 1, "best": "b", "asynchronous": False}
  with nnx.Checkpointer(tmp_path, **options) as checkpoints:
    assert checkpoints.best_step == 2
    checkpoints.save(3, v, metrics={"b": 9})
    assert checkpoints.steps == [2, 3] and checkpoints.best_step == 2


def test_best_in_the_background(tmp_path):
  v = {"v": nnx.Variable(0)}
  with nnx.Checkpointer(tmp_path, keep=1, keep_best=2, best="loss", mode="max") as checkpoints:
    for step, loss in enumerate([1.0, 5.0, NAN, 5.0, math.inf, -math.inf]):
      checkpoints.save(step, v, metrics={"loss": loss})
    assert checkpoints.best_step == 4
    assert checkpoints.steps == [3, 4, 5]  # of equal ones the later


def test_the_order(tmp_path):
  ranking = Ranking(str(tmp_path), "loss", "min")
  steps, values = [1, 2, 3, 4], [2.0, NAN, 1.0, 2.0]
  assert ranking.best(steps, values, 3) == [1, 4, 3]
  assert ranking._replace(mode="max").best(steps, values, 2) == [1, 4]
  assert math.isnan(ranking.value(7)) and math.isnan(ranking.value(7, {"loss": "text"}))
  assert ranking.value(7, {"loss": 3}) == 3.0
  assert Preserve(2, 0, None).should_preserve([], context=None) == []
  about = tmp_path / "7" / "about"
  about.mkdir(parents=True)
  (about / "metadata").write_text(json.dumps({"metrics": {"loss": 0.5}}))
  assert ranking.value(7, {"accuracy": 1.0}) == 0.5


@pytest.mark.parametrize(
  "options", [{"keep": -1}, {"keep": True}, {"keep": 1.5}, {"keep_best": -1, "best": "x"}]
)
def test_numbers_of_checkpoints_are_checked(options, tmp_path):
  with pytest.raises(InvalidArgumentError, match="an int of at least 0"):
    nnx.Checkpointer(tmp_path, **options)


@pytest.mark.parametrize("metrics", [{"loss": "much"}, {1: 2.0}, [1.0], {"loss": None}])
def test_metrics_are_numbers_by_name(metrics, tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(InvalidArgumentError, match="a dict of numbers by their names"):
      checkpoints.save(1, {"v": nnx.Variable(0)}, metrics=metrics)
    assert checkpoints.steps == []
    with pytest.raises(InvalidArgumentError, match="best='loss'"):
      _ = checkpoints.best_step
