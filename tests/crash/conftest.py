"""Says at the end of a test run how many faults the operators met."""

import pytest
from tests.crash.wire import met


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    crashes = sum(count for fault, count in met.items() if fault.kills)
    if met:
        others = sum(met.values()) - crashes
        terminalreporter.write_line(
            f"operators were killed at {crashes} points, and met {others} other faults"
        )
