"""The accounting numbers in docstrings are true."""

import doctest
from types import ModuleType

import pytest

from dpmoe_operator.privacy import calibration, capacity, mechanisms, orders, units


@pytest.mark.parametrize("module", [calibration, capacity, mechanisms, orders, units])
def test_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
