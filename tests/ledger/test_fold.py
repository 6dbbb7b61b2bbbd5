"""The rules of the ledger: whatever breaks one is refused by name, and changes nothing."""

import contextlib
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import (
    OTHER_TEAM,
    TEAM,
    charges_of,
    commit,
    granted,
    launched,
    opened,
    reference,
    settled,
)

from dpmoe_operator.ledger.account import Spending
from dpmoe_operator.ledger.entry import LedgerError
from dpmoe_operator.ledger.fold import LedgerState


@pytest.fixture
def ledger() -> LedgerState:
    """Account `a` with (10, 10), account `b` with (5, -3, 7)."""
    state = LedgerState()
    commit(state, opened("a", (10, 10)), opened("b", (5, -3, 7)))
    return state


def refused(ledger: LedgerState, problem: str, *records: Any) -> None:
    before = deepcopy(ledger)
    with pytest.raises(LedgerError) as error:
        commit(ledger, *records)
    assert problem in str(error.value)
    assert error.value.entry == f"entry-{before.sequence:012}"
    assert ledger == before


def test_amounts_move_from_reserved_to_consumed(ledger: LedgerState) -> None:
    commit(ledger, granted("job-1", {"a": (6, 3), "b": (1, 2, 3)}))
    assert ledger.accounts["a"].spending == Spending((6, 3), (0, 0), jobs=1)
    commit(ledger, launched("job-1"))
    commit(ledger, settled("job-1", {"a": (2, 1), "b": (0, 0, 0)}, steps=30))
    assert ledger.accounts["a"].spending == Spending((0, 0), (2, 1), jobs=1)
    assert ledger.accounts["b"].spending == Spending((0, 0, 0), (0, 0, 0), jobs=1)
    grant = ledger.grants["job-1"]
    assert grant.entry == "entry-000000000001"
    assert grant.settlement_entry == "entry-000000000003"
    assert grant.launched is not None
    assert grant.launched.workload.uid == "workload-1"


def test_namespaces_are_added_up_apart(ledger: LedgerState) -> None:
    other = {"job": reference("job-2", namespace=OTHER_TEAM)}
    commit(ledger, granted("job-1", {"a": (1, 2)}), granted("job-2", {"a": (3, 4)}, **other))
    account = ledger.accounts["a"]
    assert account.of_namespace(TEAM).reserved == (1, 2)
    assert account.of_namespace(OTHER_TEAM).reserved == (3, 4)
    assert account.of_namespace("nobody").total == (0, 0)
    commit(ledger, settled("job-2", {"a": (1, 1)}))
    assert ledger.accounts["a"].of_namespace(OTHER_TEAM) == Spending((0, 0), (1, 1), jobs=1)


def test_account_opens_once(ledger: LedgerState) -> None:
    refused(ledger, "opens account a a second time", opened("a", (99, 99)))


def test_account_needs_a_capacity_for_each_order(ledger: LedgerState) -> None:
    short = opened("c", (1, 2)).model_copy(update={"capacity": [1]})
    refused(ledger, "orders and capacity differ", short)


def test_job_is_granted_once(ledger: LedgerState) -> None:
    commit(ledger, granted("job-1"))
    refused(ledger, "grants job team-a/train (job-1) twice", granted("job-1"))
    commit(ledger, settled("job-1"))
    refused(ledger, "grants job team-a/train (job-1) twice", granted("job-1"))


def test_one_entry_grants_a_job_once(ledger: LedgerState) -> None:
    refused(ledger, "twice", granted("job-1"), granted("job-1", {"b": (1, 1, 1)}))


def test_one_order_within_capacity_is_enough(ledger: LedgerState) -> None:
    commit(ledger, granted("job-1", {"a": (10**9, 10)}))
    refused(ledger, "exceeds account a at every order", granted("job-2", {"a": (0, 1)}))
    commit(ledger, granted("job-3", {"a": (10**9, 0)}))


def test_negative_capacity_holds_nothing(ledger: LedgerState) -> None:
    refused(ledger, "exceeds account b at every order", granted("job-1", {"b": (6, 0, 8)}))
    commit(ledger, granted("job-1", {"b": (6, 0, 7)}))


def test_orders_are_not_mixed(ledger: LedgerState) -> None:
    """The first grant fits at one order, the second at the other, together at none."""
    commit(ledger, granted("job-1", {"a": (9, 20)}))
    refused(ledger, "at every order", granted("job-2", {"a": (20, 1)}))


def test_grants_of_one_entry_count_together(ledger: LedgerState) -> None:
    refused(
        ledger,
        "job team-a/train exceeds account a",
        granted("job-1", {"a": (6, 6)}),
        granted("job-2", {"a": (6, 6)}),
    )


def test_grant_is_all_or_nothing(ledger: LedgerState) -> None:
    refused(ledger, "exceeds account b", granted("job-1", {"a": (1, 1), "b": (9, 9, 9)}))
    assert ledger.accounts["a"].spending.total == (0, 0)


def test_refund_makes_room(ledger: LedgerState) -> None:
    commit(ledger, granted("job-1", {"a": (10, 10)}))
    commit(ledger, settled("job-1", {"a": (4, 4)}), granted("job-2", {"a": (6, 6)}))
    refused(ledger, "at every order", granted("job-3", {"a": (1, 1)}))


def test_negative_amounts_are_refused(ledger: LedgerState) -> None:
    refused(ledger, "reserves a negative amount on a", granted("job-1", {"a": (-1, 5)}))
    commit(ledger, granted("job-1", {"a": (5, 5)}))
    refused(ledger, "other than 0 to what it reserved", settled("job-1", {"a": (-1, 0)}))


def test_unknown_accounts_and_orders_are_refused(ledger: LedgerState) -> None:
    refused(ledger, "account c, which was never opened", granted("job-1", {"c": (1,)}))
    refused(ledger, "on other orders than the account's", granted("job-1", {"a": (1, 1, 1)}))
    double = granted("job-1").model_copy(
        update={"charges": charges_of({"a": (1, 1)}) + charges_of({"a": (2, 2)})}
    )
    refused(ledger, "one account twice", double)


def test_launch_needs_an_open_grant(ledger: LedgerState) -> None:
    refused(ledger, "launches job team-a/train (job-1), which was never granted", launched("job-1"))
    commit(ledger, granted("job-1"), launched("job-1"))
    refused(ledger, "launches job job-1 twice", launched("job-1", "workload-2"))
    commit(ledger, settled("job-1"))
    refused(ledger, "which is settled already", launched("job-1"))


def test_settlement_needs_an_open_grant(ledger: LedgerState) -> None:
    refused(ledger, "settles job team-a/train (job-1), which was never granted", settled("job-1"))
    commit(ledger, granted("job-1"), settled("job-1", {"a": (0, 0)}))
    refused(ledger, "which is settled already", settled("job-1", {"a": (1, 1)}))


@pytest.mark.parametrize("charges", [{"a": (7, 3)}, {"a": (6, 4)}])
def test_settlement_is_at_most_the_reservation(
    ledger: LedgerState, charges: dict[str, tuple[int, ...]]
) -> None:
    commit(ledger, granted("job-1", {"a": (6, 3)}))
    refused(ledger, "settles job job-1 for other than 0 to", settled("job-1", charges))


def test_settlement_covers_the_accounts_of_the_grant(ledger: LedgerState) -> None:
    commit(ledger, granted("job-1", {"a": (6, 3), "b": (1, 1, 1)}))
    for charges in ({"a": (1, 1)}, {"a": (1, 1), "b": (1, 1, 1), "c": (1,)}, {"b": (1, 1, 1)}):
        refused(ledger, "on other accounts than it reserved", settled("job-1", charges))
    double = settled("job-1").model_copy(
        update={
            "charges": charges_of({"a": (1, 1), "b": (1, 1, 1)}) + charges_of({"a": (1, 1)}),
        }
    )
    refused(ledger, "one account twice", double)


def test_entry_may_not_be_empty(ledger: LedgerState) -> None:
    refused(ledger, "at least 1 item")


amounts = st.tuples(st.integers(-2, 12), st.integers(-2, 12))


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), amounts), max_size=25))
def test_no_sequence_of_records_breaks_the_filter(steps: list[Any]) -> None:
    """Whatever is tried, what the ledger took in stays within capacity at some order."""
    ledger = LedgerState()
    commit(ledger, opened("a", (10, 10)))
    for number, settles, units in steps:
        record = settled if settles else granted
        with contextlib.suppress(LedgerError):
            commit(ledger, record(f"job-{number}", {"a": units}))
        account = ledger.accounts["a"]
        assert min(account.spending.reserved) >= 0
        assert min(account.spending.consumed) >= 0
        assert any(t <= c for t, c in zip(account.spending.total, account.capacity, strict=True))
        open_grants = [g for g in ledger.grants.values() if g.settled is None]
        assert account.spending.reserved == tuple(
            sum(grant.amounts["a"][i] for grant in open_grants) for i in range(2)
        )
