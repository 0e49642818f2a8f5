"""The ensemble: each member is the member trained alone, and all disagree where no data is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.ensemble import data, train
from examples.ensemble.__main__ import parse_options, run
from examples.ensemble.model import Member
from refax import nnx

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason=f"the example needs {package}: make test installs it")

MEMBERS, STEPS, BATCH = 4, 40, 16
SIZES = {"hidden": 16, "lr": 5e-3}


def state_of(member):
  """Every value of a member by its path: weights, the optimizer's moments, random streams."""
  as_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return {path: np.asarray(as_data(v[...])) for path, v in nnx.to_flat_state(nnx.state(member))}


def finish(member, points, members):
  return list(train.fit(member, points, steps=STEPS, batch_size=BATCH, members=members))


def test_each_member_is_the_member_made_and_trained_alone():
  points, keys = data.make(60, seed=1), train.member_keys(MEMBERS, seed=1)
  ensemble = train.create(keys, **SIZES)
  losses = np.stack(finish(ensemble, points, MEMBERS))
  together = state_of(ensemble)
  for i in range(MEMBERS):
    alone = Member(**SIZES, rngs=nnx.Rngs(keys[i]))
    np.testing.assert_allclose(losses[:, i], finish(alone, points, None), rtol=2e-3, atol=2e-4)
    values = state_of(alone)
    assert values.keys() == together.keys()
    for path, value in values.items():
      np.testing.assert_allclose(together[path][i], value, rtol=2e-3, atol=2e-4, err_msg=str(path))


def test_members_differ_in_weights_and_in_what_they_draw():
  points, keys = data.make(60, seed=1), train.member_keys(MEMBERS, seed=1)
  ensemble = train.create(keys, **SIZES)
  first = finish(ensemble, points, MEMBERS)[0]
  assert len(set(first.tolist())) == MEMBERS
  kernels = np.asarray(ensemble.model.second.kernel[...])
  assert kernels.shape == (MEMBERS, 16, 16) and np.ptp(kernels, axis=0).min() > 0


def test_a_step_in_plain_jit_and_vmap_changes_the_members_in_place():
  points, keys = data.make(60, seed=1), train.member_keys(MEMBERS, seed=1)
  ensembles = train.create(keys, **SIZES), train.create(keys, **SIZES)
  step = lambda member, x, y: member.train_step(x, y, BATCH)
  plain = jax.jit(jax.vmap(step, in_axes=(0, None, None)))
  for _ in range(3):
    want = train.trainer(BATCH, MEMBERS)(ensembles[0], *points)
    np.testing.assert_allclose(plain(ensembles[1], *points), want, rtol=1e-5)
  assert ensembles[1].optimizer.step[...].tolist() == [3] * MEMBERS


def test_it_learns_the_curve_and_members_disagree_in_the_gap(tmp_path):
  found = run(parse_options(["--quick", "--out", str(tmp_path)]))
  losses, x, known = found["losses"], found["x"], found["known"]
  assert (losses[-50:].mean(0) < losses[:5].mean(0) - 0.5).all()  # every member
  disagreement = found["disagreement"]
  assert disagreement[data.is_in_gap(x, 0.4)].mean() > 3 * disagreement[known].mean()
  assert 0.5 * data.NOISE < found["noise"] < 2 * data.NOISE
  assert (tmp_path / "uncertainty.png").read_bytes().startswith(b"\x89PNG")
