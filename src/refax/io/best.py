"""Which checkpoints are the best, by a metric that may be missing or not a number."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

ABOUT = os.path.join("about", "metadata")
"""Where orbax puts the JSON that we save beside the arrays of a step."""


class Ranking(NamedTuple):
  """An order of checkpoints by a metric.

  Attributes:
    folder: the folder of the checkpoints.
    metric: the name of the metric.
    mode: "min" or "max": which values are good.
  """

  folder: str
  metric: str
  mode: str

  def value(self, step: int, metrics: Any = None) -> float:
    """The metric of a checkpoint; NaN if it has none.

    orbax keeps metrics only for whom it was told that they rank: our own JSON always has them.
    """
    if metrics is None or self.metric not in metrics:
      metrics = _metrics_of(os.path.join(self.folder, str(step), ABOUT))
    value = metrics.get(self.metric, math.nan)
    return float(value) if isinstance(value, int | float) else math.nan

  def best(self, steps: Sequence[int], values: Sequence[float], n: int) -> list[int]:
    """At most `n` of the steps, the best last; of equal ones the later. NaN is never good."""
    good = [(v if self.mode == "max" else -v, s) for s, v in zip(steps, values, strict=True)]
    return [step for value, step in sorted(x for x in good if not math.isnan(x[0]))][-n:]


def _metrics_of(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      metrics = json.load(file)["metrics"]
  except (OSError, ValueError, KeyError, TypeError):  # a damaged checkpoint is nobody's best
    return {}
  return metrics if isinstance(metrics, dict) else {}


class Preserve(NamedTuple):
  """A preservation policy for orbax: the latest, and the best of all.

  Attributes:
    keep: how many of the latest; None for all.
    keep_best: how many of the best besides.
    ranking: the order of the checkpoints; None where none are the best.
  """

  keep: int | None
  keep_best: int
  ranking: Ranking | None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """One bool for each checkpoint. The last one stays where nothing else would."""
    del context
    steps = [info.step for info in checkpoints]
    wanted = set(steps if self.keep is None else steps[len(steps) - min(self.keep, len(steps)) :])
    if self.ranking is not None and self.keep_best and len(wanted) < len(steps):
      values = [self.ranking.value(info.step, info.metrics) for info in checkpoints]
      wanted.update(self.ranking.best(steps, values, self.keep_best))
    return [step in (wanted or steps[-1:]) for step in steps]
