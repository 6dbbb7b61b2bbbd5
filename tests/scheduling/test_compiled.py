"""Compiled loops work where nothing can be cached."""

from typing import Any

import numba
import numpy as np
import pytest

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.round import Ints


def test_without_a_folder_to_cache_in_it_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the operator's container, whose root is read-only and whose user has no home."""
    njit, refused = numba.njit, []

    def refusing(*functions: Any, **options: Any) -> Any:
        if options.get("cache"):
            refused.append(options)
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*functions, **options)

    monkeypatch.setattr(numba, "njit", refusing)

    @compiled
    def total(amounts: Ints) -> int:
        found = 0
        for amount in amounts:
            found += amount
        return found

    assert refused == []  # Not before it is needed.
    assert total(np.array([1, 2, 3])) == 6
    assert total(np.array([4])) == 4
    assert len(refused) == 1
    assert total.__name__ == "total"
