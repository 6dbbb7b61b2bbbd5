"""Counts the faults that the operators met in each test."""

from collections.abc import Callable, Iterator

import pytest
from tests.conftest import KILLS, OTHER_FAULTS
from tests.crash.wire import met


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Leaves with the test's report how often operators were killed, and what else they met."""
    before = dict(met)
    yield
    new = {fault: count - before.get(fault, 0) for fault, count in met.items()}
    record_property(KILLS, sum(count for fault, count in new.items() if fault.kills))
    record_property(OTHER_FAULTS, sum(count for fault, count in new.items() if not fault.kills))
