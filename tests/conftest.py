"""Options of the whole test suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--api",
        choices=("embedded", "envtest", "both"),
        default="both",
        help="which API servers the cluster tests run against (default: both)",
    )
