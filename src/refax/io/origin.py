"""What wrote a file: the versions, and when."""

import datetime
import importlib.metadata


def written_by(*packages: str) -> str:
  """`refax 0.1.0, jax 0.12.0, 2026-11-23T10:00:00+00:00`: the versions of packages, and now."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return ", ".join([*map(_version, ("refax", "jax", *packages)), now])


def _version(package: str) -> str:
  try:
    return f"{package} {importlib.metadata.version(package)}"
  except importlib.metadata.PackageNotFoundError:  # a folder on the path, not installed
    return package
