"""The examples in docstrings are true."""

import doctest
from types import ModuleType

import pytest

from dpmoe_operator.simulate import amounts, curves, rules


@pytest.mark.parametrize("module", [amounts, curves, rules])
def test_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
