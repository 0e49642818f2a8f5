"""What tests have to say beyond pass or fail, at the end of the run."""


def pytest_terminal_summary(terminalreporter):
  """Print how many programs the laws were checked on, and what was in them."""
  lines = [
    value
    for report in terminalreporter.stats.get("passed", [])
    for name, value in getattr(report, "user_properties", [])
    if name == "programs"
  ]
  if lines:
    terminalreporter.section("stateful programs that were compared with their functional twins")
    terminalreporter.line(f"{sum(int(line.split()[0]) for line in lines)} programs in all")
    for line in sorted(lines):
      terminalreporter.line(line)
