"""MultiMetric: several metrics as one."""

from typing import Any

from refax.core.variable import identity
from refax.core.write import write
from refax.errors import InvalidArgumentError
from refax.train.metric import Metric, Writes, planned
from refax.transforms.effect import transaction


class MultiMetric(Metric):
  """Several metrics that take the same call.

  Args:
    **metrics: the metrics, by name; each becomes an attribute.

  Raises:
    InvalidArgumentError: a value is not a Metric, or its name is that of a method.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
  >>> metrics.update(loss=0.5, logits=jnp.eye(2), labels=jnp.array([0, 1]))
  >>> {name: float(value) for name, value in metrics.compute().items()}
  {'loss': 0.5, 'accuracy': 1.0}
  """

  def __init__(self, **metrics: Metric):
    for name, metric in metrics.items():
      if hasattr(type(self), name) or name == "_metric_names":
        want = "another name, for this one is a method's"
        raise InvalidArgumentError.value(type(self).__name__, name, metric, want)
      if not isinstance(metric, Metric):
        raise InvalidArgumentError.value(type(self).__name__, name, metric, "an nnx.Metric")
    self._metric_names = tuple(metrics)
    for name, metric in metrics.items():
      setattr(self, name, metric)

  def reset(self) -> None:
    """Forget all that was counted, in place."""
    for name in self._metric_names:
      getattr(self, name).reset()

  def update(self, mask: Any = None, **updates: Any) -> None:
    """Count a batch in every metric, in place.

    Args:
      mask: an array for all metrics, or a dict with one for each of some metrics.
      **updates: passed on to every metric.

    Raises:
      MissingArgumentError, ShapeMismatchError: a metric refuses the batch; none has been written.
      InvalidArgumentError: `mask` is a dict with a name that is no metric's.
    """
    writes = self._planned(mask, **updates)
    if writes is not None:
      write(*writes, fresh=True)
      return
    with transaction(self):
      for metric, kwargs in self._calls(mask, updates):
        metric.update(**kwargs)

  def _planned(self, mask: Any = None, **updates: Any) -> Writes | None:
    writes: Writes = []
    for metric, kwargs in self._calls(mask, updates):
      part = planned(metric, kwargs)
      if part is None:
        return None
      writes += part
    distinct = len({identity(variable) for variable, _ in writes}) == len(writes)
    return writes if distinct else None  # two that share state count one after the other

  def _calls(self, mask: Any, updates: dict[str, Any]) -> list[tuple[Metric, dict[str, Any]]]:
    """The metrics, and the arguments of each one's `update`."""
    if isinstance(mask, dict) and (unknown := [k for k in mask if k not in self._metric_names]):
      want = f"masks for {', '.join(self._metric_names)}"
      raise InvalidArgumentError.value(type(self).__name__, "mask", {unknown[0]: ...}, want)
    calls = []
    for name in self._metric_names:
      own = mask.get(name) if isinstance(mask, dict) else mask
      calls.append((getattr(self, name), updates | ({} if own is None else {"mask": own})))
    return calls

  def compute(self) -> dict[str, Any]:
    """The values of the metrics, by name."""
    return {name: getattr(self, name).compute() for name in self._metric_names}
