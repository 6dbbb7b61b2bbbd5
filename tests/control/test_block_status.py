"""The status of a block: how much is left, who spent it, and whether it stands."""

from decimal import Decimal
from typing import Any

import pytest
from tests.builders import (
    OTHER_TEAM,
    TEAM,
    Object,
    block,
    commit,
    granted,
    reference,
    snapshot,
    with_accounts,
)
from tests.control.statuses import LATER, condition

from dpmoe_operator.api.privateblock import PrivateBlockStatus
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.projection import (
    available_epsilon,
    block_status,
    epsilon_text,
    used_share,
)
from dpmoe_operator.control.settlement import Verdict, settle
from dpmoe_operator.control.times import format_time
from dpmoe_operator.ledger.account import Account
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.capacity import capacity, epsilon_of
from dpmoe_operator.privacy.units import format_epsilon

ACCOUNT = "claim://vault/data/reviews.jsonl"
ONE_ORDER = {"epsilon": "3", "orders": ["8"]}


def status_of(reviews: Object, ledger: LedgerState, **rest: Any) -> PrivateBlockStatus:
    seen = snapshot([reviews], ledger=ledger)
    [standing] = standings(seen).values()
    account = ledger.accounts.get(standing.account_name or "")
    fields = {
        "waiting": 0,
        "unlocked": account.capacity if account else None,
        "next_unlock": None,
        "anchored": True,
    }
    return block_status(standing, seen, **fields | rest)


def charged(ledger: LedgerState, units: int, uid: str, namespace: str = TEAM) -> None:
    commit(ledger, granted(uid, {ACCOUNT: (units,)}, job=reference(uid, namespace=namespace)))


def test_fresh_block_is_ready_with_all_of_its_budget() -> None:
    reviews = block(budget=ONE_ORDER)
    status = status_of(reviews, with_accounts(reviews), waiting=3)
    assert (status.state, status.reason, status.account) == ("Ready", "BudgetAvailable", ACCOUNT)
    assert (status.epsilon, status.available, status.used) == ("3", "3", "0%")
    assert (status.consumed, status.reserved) == ("0", "0")
    assert (status.waiting, status.jobs) == (3, 0)
    assert condition(status, "Ready").status == "True"


def test_numbers_of_a_block_in_use() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    [total] = ledger.accounts[ACCOUNT].capacity
    charged(ledger, 400_000_000, "j1")
    charged(ledger, 300_000_000, "j2", OTHER_TEAM)
    grant = ledger.grants["j1"]
    commit(ledger, settle(grant, Verdict("Completed", 100, ""), ledger))
    status = status_of(reviews, ledger, unlocked=(total,), next_unlock=LATER)

    def shown(units: int) -> str:
        exact = epsilon_of([units], "1e-6", ["8"])
        assert exact is not None
        return format_epsilon(int(exact * 10**9))

    assert (status.consumed, status.reserved) == (shown(400_000_000), shown(300_000_000))
    assert status.used == f"{700_000_000 / total:.0%}"
    assert status.jobs == 2
    assert status.next_unlock == format_time(LATER)
    [order] = status.orders or []
    assert (order.order, order.capacity, order.unlocked) == (
        "8",
        format_epsilon(total),
        format_epsilon(total),
    )
    assert (order.reserved, order.consumed) == ("0.3", "0.4")
    spenders = {s.namespace: (s.epsilon, s.jobs) for s in status.spenders or []}
    assert spenders == {TEAM: (shown(400_000_000), 1), OTHER_TEAM: (shown(300_000_000), 1)}


def test_exhausted_block() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    [total] = ledger.accounts[ACCOUNT].capacity
    charged(ledger, total, "j1")
    status = status_of(reviews, ledger)
    assert (status.state, status.reason) == ("Exhausted", "BudgetExhausted")
    assert (status.available, status.used) == ("0", "100%")
    assert condition(status, "Ready").status == "True"


def test_refused_block_says_why() -> None:
    status = status_of(block(budget={"epsilon": "-1"}), LedgerState())
    assert (status.state, status.reason) == ("Refused", "InvalidSpec")
    assert "spec.budget.epsilon: '-1'" in str(status.message)
    assert condition(status, "Ready").status == "False"
    assert status.available is None


def test_block_whose_account_is_not_open_yet() -> None:
    status = status_of(block(), LedgerState())
    assert (status.state, status.reason) == (None, "AccountPending")
    assert condition(status, "Ready").status == "Unknown"


def an_account(budget: Object) -> Account:
    [account] = with_accounts(block(budget=budget)).accounts.values()
    return account


def test_available_is_what_one_more_job_can_be_guaranteed_at_most() -> None:
    """A job whose price is all that is left at some order has an ε that is not above it."""
    ledger = with_accounts(block())
    account = ledger.accounts[ACCOUNT]
    orders = account.opened.orders
    assert available_epsilon(account, account.capacity) == "10"
    half = tuple(max(units, 0) // 2 for units in account.capacity)
    shown = Decimal(available_epsilon(account, half))
    for place, units in enumerate(half):
        if units > 0:
            curve = [9 * 10**15] * len(orders)
            curve[place] = units
            exact = epsilon_of(curve, "1e-6", orders)
            assert exact is not None
            assert exact <= shown * Decimal("1.001")
    nothing = tuple(min(units, 0) for units in account.capacity)
    assert available_epsilon(account, nothing) == "0"


def test_used_share_is_at_the_order_with_most_room() -> None:
    ledger = with_accounts(block(budget={"epsilon": "3", "orders": ["8", "64"]}))
    first, second = ledger.accounts[ACCOUNT].capacity
    commit(ledger, granted("j", {ACCOUNT: (first, second // 4)}))
    assert used_share(ledger.accounts[ACCOUNT]) == pytest.approx(0.25)


def test_block_without_any_usable_order_is_used_up() -> None:
    account = an_account({"epsilon": "0.1", "orders": ["2"]})
    assert max(account.capacity) < 0
    assert used_share(account) == 1.0
    assert available_epsilon(account, account.capacity) == "0"


def test_spent_curves_as_epsilon() -> None:
    account = an_account({"epsilon": "3", "orders": ["8"]})
    assert epsilon_text(account, (0,)) == "0"
    assert epsilon_text(account, account.capacity) == "3"
    assert epsilon_text(account, (9 * 10**15,)) == "inf"
    assert capacity("3", "1e-6", ["8"]) == account.capacity


def test_many_spenders_are_cut_to_the_schema() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    for number in range(40):
        charged(ledger, 1, f"j{number}", f"team-{number}")
    assert len(status_of(reviews, ledger).spenders or []) == 32
