"""How benchmarks measure and report; what they measure needs other libraries and time."""

import time

import pytest

from benchmarks import home, report
from benchmarks.measure import BASE, Case, ratios, refuse_flags, rounds_of


def test_all_ways_take_turns_and_are_timed():
  order = []

  def way(name, seconds):
    def call():
      order.append(name)
      time.sleep(seconds)

    return call

  times = rounds_of({BASE: way("hand", 0.03), "ours": way("ours", 0.06)}, rounds=2)
  assert list(times) == [BASE, "ours"] and all(len(t) == 2 for t in times.values())
  assert min(times[BASE]) >= 0.03 and min(times["ours"]) >= 0.06
  last = [a for a, b in zip(order, [None, *order], strict=False) if a != b]
  assert last[-4:] == ["hand", "ours", "hand", "ours"]


def test_ratios_are_taken_round_by_round():
  numbers = {BASE: [1.0, 10.0, 2.0], "ours": [2.0, 20.0, 6.0]}
  assert ratios(numbers, "ours") == pytest.approx((2.0, 2.0, 3.0))


def test_the_table_shows_what_the_base_takes_and_multiples_of_it():
  results = {
    "call": {BASE: [1e-5, 1e-5, 1e-5], "ours": [2e-5, 2e-5, 2e-5]},
    "memory": {BASE: [2.0**30], "theirs": [2.0**31]},
  }
  none = lambda: {}
  cases = {"call": Case(none, "calls"), "memory": Case(none, "memory", unit="bytes")}
  assert report.tables(results, cases) == (
    "### calls\n\n"
    "|  | JAX by hand | ours |\n"
    "|---|---|---|\n"
    "| call | 10 µs | 2.00 (2.00–2.00) |\n"
    "\n"
    "### memory\n\n"
    "|  | JAX by hand | theirs |\n"
    "|---|---|---|\n"
    "| memory | 1024 MiB | 2.00 (2.00–2.00) |"
  )


def test_rows_of_refax_that_have_lost_are_named():
  old = {
    "call": {BASE: [1.0] * 3, "Refax nnx.jit": [1.0] * 3, "Refax, jax.jit": [5.0] * 3},
    "gone": {BASE: [1.0] * 3, "Refax": [1.0] * 3},
  }
  new = {
    "call": {
      BASE: [2.0] * 3,  # a slower machine
      "Refax nnx.jit": [2.4] * 3,
      "Refax, jax.jit": [11.0] * 3,
      "Flax nnx.jit": [90.0] * 3,
    },
    "new": {BASE: [1.0] * 3, "Refax": [9.0] * 3},
  }
  assert report.lost(old, new) == ["call, Refax nnx.jit: 1.00 has become 1.20"]
  assert report.lost(old, old) == []
  assert len(report.lost(old, new, most=1.05)) == 2


def test_the_chart_is_a_picture(tmp_path):
  results = {"call": {BASE: [1.0, 1.0, 1.0], "ours": [2.0, 2.0, 2.0]}}
  report.chart(results, "a machine", tmp_path / "chart.png")
  assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_chart_of_the_first_page_says_what_the_table_says(tmp_path):
  numbers = home.multiples(home.PAGE.read_text())
  assert list(numbers) == list(home.ROWS)
  for row, ways in numbers.items():
    line = next(x for x in home.PAGE.read_text().splitlines() if x.startswith(f"| {row} |"))
    assert ways and all(f"| {multiple:.2f} (" in line for multiple in ways.values())
  home.draw(numbers, tmp_path / "chart.png")
  assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_flags_that_switch_optimizations_off_are_refused(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  refuse_flags()
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  with pytest.raises(SystemExit, match="unset"):
    refuse_flags()
