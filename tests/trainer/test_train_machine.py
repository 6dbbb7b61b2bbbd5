"""A container's limits, as the kernel writes them."""

import os
from pathlib import Path

import pytest

from dpmoe_trainer.machine import memory, processors


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        (None, 8),
    ],
)
def test_processors(
    quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert processors(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("80000", 1), ("250000", 3)])
def test_processors_by_the_first_version(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert processors(tmp_path) == expected


def test_memory(tmp_path: Path) -> None:
    physical = memory(tmp_path)
    assert physical > 2**20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory(tmp_path) == 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path) == physical


def test_memory_by_the_first_version(tmp_path: Path) -> None:
    physical = memory(tmp_path)
    limit = tmp_path / "memory" / "memory.limit_in_bytes"
    limit.parent.mkdir()
    limit.write_text("1048576\n")
    assert memory(tmp_path) == 2**20
    limit.write_text("9223372036854771712\n")
    assert memory(tmp_path) == physical, "as the kernel writes that there is none"
