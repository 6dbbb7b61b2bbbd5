"""Blocks and accounts: one account for one data set, for ever, whatever objects say."""

from datetime import timedelta
from typing import Any

from tests.builders import (
    ABSENT,
    NOW,
    OWNER,
    Object,
    block,
    commit,
    granted,
    snapshot,
    with_accounts,
)

from dpmoe_operator.control.accounts import Standing, standings, to_open
from dpmoe_operator.control.times import format_time
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS

ACCOUNT = "claim://vault/data/reviews.jsonl"
SAME = {"claim": {"claimName": "data", "path": "reviews.jsonl"}}


def judge(*blocks: Object, ledger: LedgerState | None = None) -> dict[str, Standing]:
    """Standings by the block's name."""
    judged = standings(snapshot(blocks, ledger=ledger))
    return {name: standing for (_, name), standing in judged.items()}


def reason(standing: Standing) -> str | None:
    return standing.refusal[0] if standing.refusal else None


def older(hours: int) -> dict[str, Any]:
    return {"creationTimestamp": format_time(NOW - timedelta(hours=hours))}


def test_block_stands_and_its_account_is_opened() -> None:
    reviews = block(uid="u1", unit={"kind": "user", "column": "author"})
    standing = judge(reviews)["reviews"]
    assert reason(standing) is None
    assert standing.account_name == ACCOUNT
    [opening] = to_open(snapshot([reviews]))
    assert opening.account == ACCOUNT
    assert (opening.block.namespace, opening.block.name, opening.block.uid) == (
        *(OWNER, "reviews"),
        "u1",
    )
    assert opening.unit == "user:author"
    assert (opening.epsilon, opening.delta, opening.conversion) == ("10", "1e-6", "tight")
    assert tuple(opening.orders) == DEFAULT_ORDERS == standing.orders
    assert tuple(opening.capacity) == capacity("10", "1e-6", DEFAULT_ORDERS)


def test_own_orders_and_conversion_are_kept() -> None:
    reviews = block(budget={"orders": ["2", "4.5"], "conversion": "classic"})
    [opening] = to_open(snapshot([reviews]))
    assert opening.orders == ["2", "4.5"]
    assert tuple(opening.capacity) == capacity("10", "1e-6", ("2", "4.5"), "classic")
    assert judge(reviews, ledger=with_accounts(reviews))["reviews"].orders == ("2", "4.5")


def test_open_account_is_not_opened_again() -> None:
    reviews = block()
    assert to_open(snapshot([reviews], ledger=with_accounts(reviews))) == []


def test_unreadable_block_is_refused_in_its_own_words() -> None:
    standing = judge(block(budget={"epsilon": "-3"}))["reviews"]
    assert standing.refusal is not None
    assert standing.refusal[0] == "InvalidSpec"
    assert "spec.budget.epsilon: '-3'" in standing.refusal[1]
    assert to_open(snapshot([block(budget={"epsilon": "-3"})])) == []


def test_delete_and_reapply_keeps_the_account() -> None:
    ledger = with_accounts(block(uid="first"))
    commit(ledger, granted("job-1", {ACCOUNT: (10**9,) * 24}))
    again = block(uid="second", meta=older(0))
    assert reason(judge(again, ledger=ledger)["reviews"]) is None
    assert to_open(snapshot([again], ledger=ledger)) == []
    assert ledger.accounts[ACCOUNT].spending.jobs == 1


def test_renaming_keeps_the_account() -> None:
    ledger = with_accounts(block())
    renamed = block("fresh-start", dataset=SAME)
    assert judge(renamed, ledger=ledger)["fresh-start"].account_name == ACCOUNT
    assert to_open(snapshot([renamed], ledger=ledger)) == []


def test_reapplied_block_may_not_ask_for_another_budget() -> None:
    ledger = with_accounts(block())
    changes: dict[str, dict[str, Any]] = {
        "spec.budget.epsilon: '20': must be '10'": {"budget": {"epsilon": "20"}},
        "spec.budget.delta: '1e-5': must be '1e-6'": {"budget": {"delta": "1e-5"}},
        "spec.budget.conversion: 'classic': must be 'tight'": {"budget": {"conversion": "classic"}},
        "spec.budget.orders: ['2', '4']": {"budget": {"orders": ["2", "4"]}},
        "spec.unit: 'user:author': must be 'example'": {
            "unit": {"kind": "user", "column": "author"}
        },
    }
    for problem, change in changes.items():
        standing = judge(block(uid="again", **change), ledger=ledger)["reviews"]
        assert standing.refusal is not None
        assert standing.refusal[0] == "BudgetDiffersFromLedger"
        assert problem in standing.refusal[1]
        assert "2030-01-01T12:00:00" in standing.refusal[1]
        assert "never refilled" in standing.refusal[1]


def test_smaller_budget_is_a_change_too() -> None:
    ledger = with_accounts(block())
    standing = judge(block(budget={"epsilon": "5"}), ledger=ledger)["reviews"]
    assert reason(standing) == "BudgetDiffersFromLedger"


def test_other_default_orders_of_a_newer_operator_change_nothing() -> None:
    """A block that names no orders keeps those that its account was opened with."""
    old = block(budget={"orders": ["2", "4"]})
    ledger = with_accounts(old)
    without = block(uid=old["metadata"]["uid"])
    standing = judge(without, ledger=ledger)["reviews"]
    assert reason(standing) is None
    assert standing.orders == ("2", "4")


def test_changed_dataset_is_refused() -> None:
    """Without CEL somebody may edit the spec in place: that is not the data that was opened."""
    ledger = with_accounts(block(uid="u1"))
    moved = block(uid="u1", dataset={"claim": {"claimName": "data", "path": "more.jsonl"}})
    standing = judge(moved, ledger=ledger)["reviews"]
    assert standing.refusal is not None
    assert standing.refusal[0] == "DatasetChanged"
    assert f"must stay '{ACCOUNT}'" in standing.refusal[1]
    assert to_open(snapshot([moved], ledger=ledger)) == []


def test_second_block_over_the_same_data_is_refused() -> None:
    first, second = block("a", dataset=SAME, meta=older(2)), block("b", dataset=SAME, meta=older(1))
    for blocks in ([first, second], [second, first]):
        judged = judge(*blocks)
        assert reason(judged["a"]) is None
        assert judged["b"].refusal is not None
        assert judged["b"].refusal[0] == "DuplicateDataset"
        assert "block a already" in judged["b"].refusal[1]
        assert [opening.block.name for opening in to_open(snapshot(blocks))] == ["a"]


def test_block_that_opened_the_account_holds_it_against_older_ones() -> None:
    opener = block("a", dataset=SAME, meta=older(1))
    ledger = with_accounts(opener)
    judged = judge(opener, block("b", dataset=SAME, meta=older(5)), ledger=ledger)
    assert (reason(judged["a"]), reason(judged["b"])) == (None, "DuplicateDataset")


def test_duplicate_takes_over_when_the_first_is_deleted() -> None:
    ledger = with_accounts(block("a", dataset=SAME))
    assert reason(judge(block("b", dataset=SAME), ledger=ledger)["b"]) is None


def test_other_partitions_have_accounts_of_their_own() -> None:
    years = [
        block(f"y{year}", dataset={**SAME, "partition": {"column": "year", "values": [year]}})
        for year in ("2024", "2025")
    ]
    assert [reason(standing) for standing in judge(*years).values()] == [None, None]
    assert len(to_open(snapshot(years))) == 2


def overlapping(partition: Any) -> Object:
    return block("second", dataset={**SAME, "partition": partition}, meta=older(0))


PARTS: list[Any] = [
    {"column": "year", "values": ["2024", "2025"]},
    {"column": "author", "values": ["me"]},
    ABSENT,
]


def test_rows_that_have_an_account_get_no_second_one() -> None:
    """Cut the exhausted table anew, and its rows would have a fresh budget."""
    first = block(dataset={"partition": {"column": "year", "values": ["2024"]}}, meta=older(2))
    for ledger in (with_accounts(first), None):
        for live in ([first], []):
            if ledger is None and not live:
                continue
            for partition in PARTS:
                second = overlapping(partition)
                standing = judge(*live, second, ledger=ledger)["second"]
                assert standing.refusal is not None, partition
                assert standing.refusal[0] == "SharesRows"
                assert f"{ACCOUNT}?year=2024" in standing.refusal[1]
                names = [o.block.name for o in to_open(snapshot([*live, second], ledger=ledger))]
                assert "second" not in names


def test_folder_and_a_file_in_it_share_rows() -> None:
    folder = block("all", dataset={"claim": {"claimName": "data", "path": "all"}}, meta=older(2))
    file = block("one", dataset={"claim": {"claimName": "data", "path": "all/one.jsonl"}})
    judged = judge(file, folder)
    assert (reason(judged["all"]), reason(judged["one"])) == (None, "SharesRows")


def test_open_accounts_stand_against_newcomers_of_any_age() -> None:
    first = block(dataset={"partition": {"column": "year", "values": ["2024"]}}, meta=older(1))
    whole = block("whole", dataset=SAME, meta=older(9))
    judged = judge(first, whole, ledger=with_accounts(first))
    assert (reason(judged["reviews"]), reason(judged["whole"])) == (None, "SharesRows")


EVALUATION = {"format": "jsonl", "textColumn": "text", "labelColumn": "label"}


def test_evaluation_on_private_rows_of_another_block_is_refused() -> None:
    """Scores leave the pod uncounted: they must not be computed on anybody's private data."""
    private = block("secret", meta=older(2))
    scored = {**EVALUATION, "claim": {"claimName": "data", "path": "secret.jsonl"}}
    curious = block("curious", evaluation=scored, meta=older(1))
    for ledger, blocks in (
        (None, [private, curious]),
        (with_accounts(private), [curious]),
        (with_accounts(private, curious), [private, curious]),
    ):
        standing = judge(*blocks, ledger=ledger)["curious"]
        assert standing.refusal is not None
        assert standing.refusal[0] == "EvaluationIsPrivate"
        assert "claim://vault/data/secret.jsonl" in standing.refusal[1]


def test_shared_evaluation_set_is_fine() -> None:
    public = {**EVALUATION, "claim": {"claimName": "data", "path": "public.jsonl"}}
    judged = judge(block("a", evaluation=public), block("b", evaluation=public))
    assert [reason(standing) for standing in judged.values()] == [None, None]
