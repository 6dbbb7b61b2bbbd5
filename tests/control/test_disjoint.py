"""`disjointFrom`: what an owner may declare about rows, and what it never covers."""

from datetime import timedelta
from typing import Any

import pytest
from tests.builders import ABSENT, NOW, Object, block, commit, snapshot, with_accounts

from dpmoe_operator.control.accounts import standings, to_open
from dpmoe_operator.control.times import format_time
from dpmoe_operator.ledger.fold import LedgerState

TABLE = {"claimName": "data", "path": "reviews.jsonl"}


def part(
    name: str, column: str | None, *values: str, hours: int = 1, path: str = "", **spec: Any
) -> Object:
    """A block over a part of one table, or over all of it; `hours` old."""
    partition: Any = {"column": column, "values": list(values)} if column else ABSENT
    return block(
        name,
        uid=f"uid-{name}",
        dataset={"claim": TABLE | ({"path": path} if path else {}), "partition": partition},
        meta={"creationTimestamp": format_time(NOW - timedelta(hours=hours))},
        **spec,
    )


def by_year(hours: int = 2, **spec: Any) -> Object:
    return part("by-year", "year", "2024", hours=hours, **spec)


def by_fold(hours: int = 1, **spec: Any) -> Object:
    return part("by-fold", "fold", "train", hours=hours, **spec)


YEAR = "claim://vault/data/reviews.jsonl?year=2024"
FOLD = "claim://vault/data/reviews.jsonl?fold=train"


def reasons(*blocks: Object, ledger: LedgerState | None = None) -> dict[str, str | None]:
    judged = standings(snapshot(blocks, ledger=ledger))
    return {name: s.refusal[0] if s.refusal else None for (_, name), s in judged.items()}


def message(name: str, *blocks: Object, ledger: LedgerState | None = None) -> str:
    [refusal] = [
        s.refusal
        for (_, n), s in standings(snapshot(blocks, ledger=ledger)).items()
        if n == name and s.refusal
    ]
    return refusal[1]


def test_without_a_declaration_the_newcomer_is_refused() -> None:
    assert reasons(by_year(), by_fold()) == {"by-year": None, "by-fold": "SharesRows"}
    assert "say so in spec.disjointFrom" in message("by-fold", by_year(), by_fold())


def test_declared_blocks_stand_and_the_ledger_keeps_what_was_declared() -> None:
    blocks = [by_year(), by_fold(disjointFrom=["by-year"])]
    assert set(reasons(*blocks).values()) == {None}
    openings = {o.block.name: o.disjoint_from for o in to_open(snapshot(blocks))}
    assert openings == {"by-year": [], "by-fold": [YEAR]}


def test_older_block_may_declare_it_too() -> None:
    """It was written with the newer one in mind, and both were applied together."""
    blocks = [by_year(disjointFrom=["by-fold"]), by_fold()]
    for order in (blocks, blocks[::-1]):
        assert set(reasons(*order).values()) == {None}
    openings = {o.block.name: o.disjoint_from for o in to_open(snapshot(blocks))}
    assert openings == {"by-year": [FOLD], "by-fold": []}


def test_declaration_in_the_ledger_holds_without_its_block() -> None:
    declaring = by_year(disjointFrom=["by-fold"])
    ledger = LedgerState()
    commit(ledger, *[o for o in to_open(snapshot([declaring, by_fold()])) if o.disjoint_from])
    assert list(ledger.accounts) == [YEAR]
    assert reasons(by_fold(), ledger=ledger) == {"by-fold": None}


def test_block_that_is_gone_is_known_by_its_account() -> None:
    ledger = with_accounts(by_year())
    newcomer = by_fold(disjointFrom=["by-year"])
    assert reasons(newcomer, ledger=ledger) == {"by-fold": None}
    [opened] = to_open(snapshot([newcomer], ledger=ledger))
    assert opened.disjoint_from == [YEAR]


def test_live_block_goes_before_one_of_its_name_that_is_gone() -> None:
    ledger = with_accounts(by_year())
    other = block("by-year", dataset={"claim": TABLE | {"path": "elsewhere.jsonl"}})
    newcomer = by_fold(disjointFrom=["by-year"])
    assert reasons(other, newcomer, ledger=ledger)["by-fold"] == "SharesRows"


def test_declaration_covers_the_named_blocks_alone() -> None:
    """A third block with the same rows is still in the way."""
    third = part("third", "year", "2024", "2025", hours=3, disjointFrom=["by-author"])
    author = part("by-author", "author", "me", hours=4)
    newcomer = by_fold(disjointFrom=["by-author"])
    assert reasons(author, third, newcomer) == {
        "by-author": None,
        "third": None,
        "by-fold": "SharesRows",
    }
    assert "year=2024,2025" in message("by-fold", author, third, newcomer)


def test_folder_and_what_is_in_it_may_be_declared() -> None:
    folder = part("all", None, hours=3, path="all")
    below = part("one", None, hours=1, path="all/one", disjointFrom=["all"])
    assert set(reasons(folder, below).values()) == {None}


SURELY: dict[str, Object] = {
    "all of the table": part("new", None, disjointFrom=["by-year"]),
    "the same values and one more": part("new", "year", "2024", "2025", disjointFrom=["by-year"]),
}


@pytest.mark.parametrize("newcomer", SURELY.values(), ids=SURELY.keys())
@pytest.mark.parametrize("gone", [False, True])
def test_rows_that_are_surely_shared_cannot_be_declared(newcomer: Object, gone: bool) -> None:
    """Else an exhausted table would have a fresh budget for the price of a line."""
    ledger = with_accounts(by_year())
    live = [] if gone else [by_year()]
    assert reasons(*live, newcomer, ledger=ledger)["new"] == "SharesRows"
    words = message("new", *live, newcomer, ledger=ledger)
    assert words.startswith("spec.disjointFrom: 'by-year': stands for 'claim://vault/data/reviews")
    assert to_open(snapshot([*live, newcomer], ledger=ledger)) == []


def test_same_data_cannot_be_declared_disjoint() -> None:
    twin = part("twin", "year", "2024", disjointFrom=["by-year"])
    assert reasons(by_year(), twin)["twin"] == "DuplicateDataset"
    itself = part("selfish", None, disjointFrom=["selfish"])
    assert reasons(itself) == {"selfish": "SharesRows"}
    assert to_open(snapshot([itself])) == []


def test_unknown_name_is_refused_with_its_remedy() -> None:
    newcomer = by_fold(disjointFrom=["by-yaer"])
    assert reasons(newcomer) == {"by-fold": "InvalidSpec"}
    assert message("by-fold", newcomer) == (
        "spec.disjointFrom: 'by-yaer': no PrivateBlock of namespace vault has that name, and no"
        " account was opened for one; apply that block first, or apply this one without the name"
    )
    elsewhere = block("by-yaer", "elsewhere")
    assert reasons(elsewhere, newcomer)["by-fold"] == "InvalidSpec"


def test_refused_declaration_takes_no_rows() -> None:
    """The older block waits for its remedy; nobody else has to wait for it."""
    broken = by_year(hours=5, disjointFrom=["nobody"])
    assert reasons(broken, by_fold()) == {"by-year": "InvalidSpec", "by-fold": None}


def test_names_are_read_when_the_account_is_opened_and_never_again() -> None:
    """What others apply or delete later is nothing to a block that has its account."""
    blocks = [by_year(), by_fold(disjointFrom=["by-year"])]
    ledger = with_accounts(*blocks)
    assert reasons(blocks[1], ledger=ledger) == {"by-fold": None}
    again = by_fold(disjointFrom=["nobody"])
    assert reasons(again, ledger=ledger) == {"by-fold": None}
    assert to_open(snapshot([again], ledger=ledger)) == []


def test_later_declaration_of_an_open_account_does_not_count() -> None:
    """Deleted and applied again with a declaration that its opening did not make."""
    ledger = with_accounts(by_year())
    again = by_year(disjointFrom=["by-fold"])
    assert reasons(again, by_fold(), ledger=ledger) == {"by-year": None, "by-fold": "SharesRows"}


def test_evaluation_is_never_covered() -> None:
    scored = {
        "claim": TABLE,
        "format": "jsonl",
        "textColumn": "text",
        "labelColumn": "label",
        "partition": {"column": "fold", "values": ["test"]},
    }
    curious = part("curious", "fold", "train", hours=1, disjointFrom=["by-year"], evaluation=scored)
    assert reasons(by_year(), curious) == {"by-year": None, "curious": "EvaluationIsPrivate"}
