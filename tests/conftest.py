"""Options of the whole test suite, and what it says at its end."""

import os

import pytest

# Tests run side by side, on tiny models: threads of torch would wait for each other, turn by turn,
# and a minute becomes ten. Said here, before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

KILLS, OTHER_FAULTS = "operators killed", "other faults"
"""Properties of a test's report, which also reach the terminal from another process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--api",
        choices=("embedded", "envtest", "both"),
        default="both",
        help="which API servers the cluster tests run against (default: both)",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many faults the operators met."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    properties = [pair for report in reports for pair in report.user_properties]
    kills, others = (
        sum(int(str(value)) for name, value in properties if name == wanted)
        for wanted in (KILLS, OTHER_FAULTS)
    )
    if kills or others:
        terminalreporter.write_line(
            f"operators were killed at {kills} points, and met {others} other faults"
        )
