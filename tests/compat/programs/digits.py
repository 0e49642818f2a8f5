"""A convolutional net that learns to read digits, as one writes it with Flax NNX."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits


class CNN(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.3, rngs=rngs)
    self.linear = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)
    self.steps = nnx.Variable(jnp.array(0))

  def __call__(self, images):
    self.steps.value += 1
    x = nnx.relu(self.norm1(self.conv1(images)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    x = nnx.max_pool(x, (2, 2), strides=(2, 2))
    x = self.dropout(x.reshape(x.shape[0], -1))
    return self.linear(x)


def loss_fn(model, images, labels):
  logits = model(images)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


@nnx.jit
def train_step(model, optimizer, metrics, images, labels):
  (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, images, labels)
  metrics.update(loss=loss, logits=logits, labels=labels)
  optimizer.update(model, grads)
  return loss


def main():
  digits = load_digits()
  images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
  labels = jnp.asarray(digits.target)
  model = CNN(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
  metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
  model.train()
  order, losses = np.random.default_rng(0), []
  for _ in range(40):
    batch = order.integers(0, 1500, 64)
    losses.append(float(train_step(model, optimizer, metrics, images[batch], labels[batch])))
  model.eval()
  hits = (model(images[1500:]).argmax(-1) == labels[1500:]).mean()
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  sums = jax.tree.map(lambda x: float(abs(x).sum()), params)
  print(
    json.dumps(
      {
        "losses": losses,
        "accuracy": float(hits),
        "metrics": {k: float(v) for k, v in metrics.compute().items()},
        "parameters": jax.tree.leaves(sums),
        "steps": int(model.steps.value),
      }
    )
  )


if __name__ == "__main__":
  main()
