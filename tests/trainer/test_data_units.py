"""Rows grouped into privacy units, over one block and over several."""

import random
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_rows

from dpmoe_trainer.contract import BlockPlan
from dpmoe_trainer.data.units import load_units
from dpmoe_trainer.errors import BadData, BadPlan


def block(path: Path, **unit: Any) -> BlockPlan:
    return BlockPlan.model_validate(
        {
            "namespace": "owner",
            "name": path.stem,
            "account": path.stem,
            "units": 10,
            "unit": unit,
            "data": {
                "path": str(path),
                "format": "jsonl",
                "text_column": "text",
                "label_column": "label",
            },
        }
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    users = ["ann", "bob", "ann", "cem"]
    rows = [{"text": f"{n}", "label": n % 2, "user": user} for n, user in enumerate(users)]
    return write_rows(tmp_path / "table", rows)


def test_every_row_is_its_own_unit(table: Path) -> None:
    rows, units = load_units((block(table, kind="example"),), labels=2)
    assert rows.content.columns[0].texts(range(4)) == ["0", "1", "2", "3"]
    assert list(units) == [(0,), (1,), (2,), (3,)]


def test_a_users_rows_are_one_unit(table: Path) -> None:
    _, units = load_units((block(table, kind="user", column="user"),), labels=2)
    assert list(units) == [(0, 2), (1,), (3,)]


def test_a_user_of_two_blocks_is_a_unit_in_each(table: Path) -> None:
    """Each block promises for its own table; merged, one block's change could move 2C."""
    by_user = block(table, kind="user", column="user")
    rows, units = load_units((by_user, block(table, kind="example"), by_user), labels=2)
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, 0, 1] * 3
    assert list(units) == [(0, 2), (1,), (3,), (4,), (5,), (6,), (7,), (8, 10), (9,), (11,)]


def test_units_are_the_rows_of_one_user_in_one_block(tmp_path: Path) -> None:
    """Over several files, and whatever the order: no row is left out, or in two units."""
    generator = random.Random(0)
    blocks, owners = [], []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("a", "b"):
            users = [f"user{generator.randrange(40)}" for _ in range(1500)]
            rows = [{"text": "x", "label": 0, "user": user} for user in users]
            write_rows(folder / f"{part}.jsonl", rows)
            owners += [(name, user) for user in users]
        blocks.append(block(folder, kind="user", column="user"))
    _, units = load_units(tuple(blocks), labels=2)
    assert sorted(row for unit in units for row in unit) == list(range(6000))
    assert all(len({owners[row] for row in unit}) == 1 for unit in units)
    assert len(units) == len(set(owners))
    assert [unit[0] for unit in units[:3]] == sorted(unit[0] for unit in units[:3])
    with pytest.raises(IndexError):
        units[len(units)]


def test_blocks_of_text_and_of_token_ids_are_one_job(tmp_path: Path, table: Path) -> None:
    path = write_rows(tmp_path / "ids", [{"ids": [n], "label": 1, "user": "ann"} for n in (7, 8)])
    tokens = block(path, kind="user", column="user")
    data = tokens.data.model_copy(update={"text_column": None, "tokens_column": "ids"})
    tokens = tokens.model_copy(update={"data": data})
    rows, units = load_units((block(table), tokens), labels=2, vocabulary=9)
    assert list(units) == [(0,), (1,), (2,), (3,), (4, 5)]
    assert [column.is_text for column in rows.content.columns] == [True, False]
    with pytest.raises(BadData, match=r"blocks\[1\]\.data\.tokensColumn: .* in \[0, 8\)"):
        load_units((block(table), tokens), labels=2, vocabulary=8)


def test_users_need_a_column(table: Path) -> None:
    with pytest.raises(BadPlan, match=r"blocks\[1\]\.unit\.column: missing; name the column"):
        load_units((block(table), block(table, kind="user")), labels=2)
