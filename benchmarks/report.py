"""The table and the chart of what was measured."""

import statistics
from pathlib import Path

from benchmarks.measure import BASE, Case, ratios

Results = dict[str, dict[str, list[float]]]


def tables(results: Results, cases: dict[str, Case]) -> str:
  """The tables, each under its heading."""
  groups: dict[str, Results] = {}
  for name, numbers in results.items():
    groups.setdefault(cases[name].table, {})[name] = numbers
  units = {name: cases[name].unit for name in results}
  parts = (f"### {heading}\n\n{_table(group, units)}" for heading, group in groups.items())
  return "\n\n".join(parts)


def lost(old: Results, new: Results, most: float = 1.15) -> list[str]:
  """The rows of Refax whose multiples of hand-written JAX have grown by more than a factor."""
  found = []
  for name in old.keys() & new.keys():
    for way in old[name].keys() & new[name].keys():
      if way.startswith("Refax"):
        before, now = (ratios(results[name], way)[1] for results in (old, new))
        if now > most * before:
          found.append(f"{name}, {way}: {before:.2f} has become {now:.2f}")
  return sorted(found)


def _table(results: Results, units: dict[str, str]) -> str:
  """Rows of cases, columns of ways: absolute numbers of `BASE`, multiples of it for the others."""
  ways = ways_of(results)
  lines = ["| " + " | ".join(["", *ways]) + " |", "|---" * (len(ways) + 1) + "|"]
  for name, numbers in results.items():
    cells = [_cell(numbers, way, units[name]) for way in ways]
    lines.append("| " + " | ".join([name, *cells]) + " |")
  return "\n".join(lines)


def ways_of(results: Results) -> list[str]:
  """All ways, `BASE` first."""
  ways = dict.fromkeys(way for numbers in results.values() for way in numbers)
  return sorted(ways, key=lambda way: way != BASE)


def _cell(numbers: dict[str, list[float]], way: str, unit: str) -> str:
  if way not in numbers:
    return ""
  if way == BASE:
    return _absolute(statistics.median(numbers[way]), unit)
  low, median, high = ratios(numbers, way)
  return f"{median:.2f} ({low:.2f}–{high:.2f})"


def _absolute(number: float, unit: str) -> str:
  if unit == "bytes":
    return f"{number / 2**20:.0f} MiB"
  return next(
    f"{number * scale:.{0 if number * scale >= 10 else 1}f} {name}"
    for scale, name in ((1e6, "µs"), (1e3, "ms"), (1, "s"))
    if number * scale < 1000 or scale == 1
  )


COLORS = {
  "Refax nnx.jit": "tab:blue",
  "Refax, jax.jit": "tab:cyan",
  "raw Refs, jax.jit": "tab:gray",
  "Flax nnx.jit": "tab:red",
  "Flax cached_partial": "tab:orange",
  "Flax jit_partial": "goldenrod",
  "Equinox filter_jit": "tab:green",
  "Refax": "tab:blue",
  "Flax": "tab:red",
  "Equinox": "tab:green",
  "Refax lojax": "tab:blue",
  "Flax State": "tab:red",
  "Equinox Module": "tab:green",
}


def chart(results: Results, title: str, path: Path) -> None:
  """Bars of the multiples, a group for each case, on a logarithmic axis."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  bars = sum(len(numbers) for numbers in results.values())
  figure, axes = plt.subplots(figsize=(9, 1.2 + 0.16 * bars), layout="constrained")
  place, ticks, shown = 0, [], {}
  for numbers in results.values():
    ways = [way for way in ways_of(results) if way != BASE and way in numbers]
    ticks.append(place + (len(ways) - 1) / 2)
    for way in ways:
      median = ratios(numbers, way)[1]
      color = COLORS.get(way, "black")
      bar = axes.barh(place, median - 1, 0.9, left=1, color=color)
      axes.bar_label(bar, [f" {median:.2f} "], fontsize=6)
      shown.setdefault(color, (bar, way))
      place += 1
    place += 1  # between groups
  axes.set_yticks(ticks, list(results), fontsize=8)
  axes.invert_yaxis()
  axes.set_xscale("log")
  axes.axvline(1, color="black", linewidth=0.8)
  axes.set_xlabel(f"multiples of {BASE}; shorter is better", fontsize=8)
  axes.xaxis.set_major_formatter("{x:g}×")
  handles, labels = zip(*shown.values(), strict=True)
  figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
  axes.set_title(title, fontsize=8)
  axes.margins(x=0.12, y=0.01)
  axes.spines[["top", "right"]].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
