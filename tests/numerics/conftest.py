"""Writes the largest differences that the numerics tests saw to `out/numerics/`, for the docs."""

import json
import os
import sys
from pathlib import Path


def pytest_sessionfinish(session):
  # tests/numerics/twin.py is only imported where an oracle is installed.
  twin = sys.modules.get("tests.numerics.twin")
  if twin is None or not twin.LARGEST:
    return
  folder = Path(session.config.rootpath) / "out" / "numerics"
  folder.mkdir(parents=True, exist_ok=True)
  worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
  rows = [[*key, value] for key, value in sorted(twin.LARGEST.items())]
  (folder / f"{worker}.json").write_text(json.dumps(rows, indent=1))
