"""Counts the faults that the operators met in each test."""

from collections import Counter
from collections.abc import Generator

import pytest
from tests.conftest import KILLS, OTHER_FAULTS
from tests.crash.wire import met


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Leave with the test's report how often operators were killed, and what else they met."""
    before = Counter(met)
    try:
        yield
    finally:
        new = Counter(met) - before
        kills = sum(count for fault, count in new.items() if fault.kills)
        item.user_properties += [(KILLS, kills), (OTHER_FAULTS, new.total() - kills)]
