"""Metrics: sums over many batches, updated in place, in training steps and evaluations.

A metric is a Pytree whose state is in Variables of type `MetricState`; `update` takes what it needs
from keyword arguments and ignores the rest, so that several metrics take the same call.

Sums are kept as a float32 and what rounding took from it, and counts in 64 bits: a float32 alone
stops at 2^24 when ones are added, an int32 wraps at 2^31.

To count arrays that are sharded over several devices, build the metric `with jax.set_mesh(mesh)`:
its state is then on all of them.
"""

from refax.train.average import Accuracy, Average
from refax.train.confusion import ConfusionMatrix, ConfusionStatistics
from refax.train.metric import Metric, MetricState
from refax.train.multi_metric import MultiMetric
from refax.train.norms import Norms
from refax.train.welford import Statistics, Welford

__all__ = [
  "Accuracy",
  "Average",
  "ConfusionMatrix",
  "ConfusionStatistics",
  "Metric",
  "MetricState",
  "MultiMetric",
  "Norms",
  "Statistics",
  "Welford",
]
