"""What people read of blocks: their status, projected from the ledger.

Status is never read back to give budget; it is read where it can only withhold it. So what a
refused block had spent outlives its source.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from dpmoe_operator.api.privateblock import OrderStatus, PrivateBlockStatus, Spender
from dpmoe_operator.control.accounts import Standing
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import Snapshot
from dpmoe_operator.ledger.account import Account, minus
from dpmoe_operator.privacy.capacity import conversion_cost, epsilon_of
from dpmoe_operator.privacy.units import NANO, capacity_units, format_epsilon, spend_units

BlockState = Literal["Ready", "Exhausted", "Retired", "Refused"]

LEDGER_VERIFIED = "LedgerVerified"
"""Condition of a block: whether what the ledger says of it may be relied on."""

LEDGER_ANCHORED = (
    LEDGER_VERIFIED,
    "True",
    "Anchored",
    "the ledger holds, and agrees with its anchor",
)
LEDGER_NOT_ANCHORED = (
    LEDGER_VERIFIED,
    "Unknown",
    "NoAnchor",
    "the ledger holds; without an anchor nothing shows whether it was taken back as a whole",
)


def epsilon_text(account: Account, amounts: Sequence[int]) -> str:
    """A curve on an account as the ε that it guarantees at the account's δ, for people."""
    opened = account.opened
    epsilon = epsilon_of(amounts, Decimal(opened.delta), opened.orders, opened.conversion)
    return "inf" if epsilon is None else format_epsilon(spend_units(epsilon))


def available_epsilon(account: Account, unlocked: Sequence[int]) -> str:
    """The ε, at the account's δ, that no job that still fits can exceed; all of it when unspent.

    A job that fits at order α has an ε of at most what is left there plus what the conversion
    costs there.
    """
    opened = account.opened
    bounds = [
        Decimal(left) / NANO
        + conversion_cost(Decimal(order), Decimal(opened.delta), opened.conversion)
        for order, left in zip(opened.orders, minus(unlocked, account.spending.total), strict=True)
        if left > 0
    ]
    epsilon = min(max(bounds, default=Decimal(0)), Decimal(opened.epsilon))
    return format_epsilon(capacity_units(epsilon))


def used_share(account: Account) -> float:
    """How much of the account is promised, in [0, 1]: the share at the order with most room."""
    shares = [
        total / capacity
        for total, capacity in zip(account.spending.total, account.capacity, strict=True)
        if capacity > 0
    ]
    return min(shares, default=1.0)


def block_status(
    standing: Standing,
    snapshot: Snapshot,
    *,
    waiting: int,
    unlocked: Sequence[int] | None,
    next_unlock: datetime | None,
    anchored: bool,
) -> PrivateBlockStatus:
    """The status of a block.

    Args:
        standing: the block and whether it stands.
        snapshot: for its account.
        waiting: jobs that ask for it and have no budget yet.
        unlocked: what unlocking released so far at each order; None where no account is open.
        next_unlock: when time-unlocking completes.
        anchored: whether the ledger is checked against an anchor.
    """
    verified = LEDGER_ANCHORED if anchored else LEDGER_NOT_ANCHORED
    old, generation = standing.block.status, standing.block.meta.generation
    account = snapshot.ledger.accounts.get(standing.account_name or "")
    if standing.retired is not None:
        unlocked = account.zero if account else None
    elif standing.refusal is not None:
        unlocked = None
    state, reason, message = _block_state(standing, account, unlocked)
    ready = {None: "Unknown", "Ready": "True", "Exhausted": "True"}.get(state, "False")
    numbers = _remembered(standing)
    if account is not None and unlocked is not None:
        numbers = _numbers(account, unlocked)
        numbers["waiting"] = waiting
        numbers["next_unlock"] = format_time(next_unlock) if next_unlock else None
    return PrivateBlockStatus(
        state=state,
        reason=reason,
        message=message[:2048],
        account=standing.account_name or old.get("account"),
        observed_generation=generation,
        conditions=conditions_of(
            old, [("Ready", ready, reason, message), verified], generation, snapshot.now
        ),
        **numbers,
    )


def _block_state(
    standing: Standing, account: Account | None, unlocked: Sequence[int] | None
) -> tuple[BlockState | None, str, str]:
    """State, reason and message of a block."""
    if standing.retired is not None:
        return "Retired", "BlockRetired", standing.retired
    if standing.refusal is not None:
        return "Refused", *standing.refusal
    if account is None or unlocked is None:
        return None, "AccountPending", "the account is being opened"
    used = used_share(account)
    message = (
        f"{used:.1%} of epsilon {account.opened.epsilon} at delta {account.opened.delta} is"
        f" promised to {account.spending.jobs} jobs, for ever"
    )
    if used >= 1:
        return "Exhausted", "BudgetExhausted", message
    return "Ready", "BudgetAvailable", message


def _numbers(account: Account, unlocked: Sequence[int]) -> dict[str, Any]:
    """The account, as the fields of a block's status."""
    spending = account.spending
    return {
        "epsilon": account.opened.epsilon,
        "consumed": epsilon_text(account, spending.consumed),
        "reserved": epsilon_text(account, spending.reserved),
        "available": available_epsilon(account, unlocked),
        "used": f"{used_share(account):.0%}",
        "jobs": spending.jobs,
        "orders": [
            OrderStatus(
                order=order,
                capacity=format_epsilon(account.capacity[i]),
                unlocked=format_epsilon(unlocked[i]),
                reserved=format_epsilon(spending.reserved[i]),
                consumed=format_epsilon(spending.consumed[i]),
            )
            for i, order in enumerate(account.opened.orders)
        ],
        "spenders": [
            Spender(
                namespace=namespace,
                epsilon=epsilon_text(account, spent.total),
                jobs=spent.jobs,
            )
            for namespace, spent in sorted(account.by_namespace.items())[:32]
        ],
    }


def _remembered(standing: Standing) -> dict[str, Any]:
    """What a block's status said was spent from its account, kept while the block is refused.

    Were the ledger lost, this would be all that is left to tell.
    """
    old = standing.block.status
    if standing.account_name not in (None, old.get("account")):
        return {}
    return {name: old[name] for name in ("consumed", "reserved", "jobs") if name in old}


def conditions_of(
    old: Mapping[str, Any],
    wanted: Sequence[tuple[str, str, str, str]],
    generation: int,
    now: datetime,
) -> list[Any]:
    """Conditions with their transition times kept where the status did not change."""
    before = {c.get("type"): c for c in old.get("conditions") or []}
    result = []
    for kind, status, reason, message in wanted:
        previous = before.get(kind, {})
        same = previous.get("status") == status
        result.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message[:2048],
                "lastTransitionTime": previous.get("lastTransitionTime")
                if same
                else format_time(now),
                "observedGeneration": generation,
            }
        )
    return result
