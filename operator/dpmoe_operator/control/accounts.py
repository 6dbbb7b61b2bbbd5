"""Blocks and their accounts: which block objects stand, and which accounts must be opened.

An account belongs to a dataset partition for ever. A block object only points at it: it stands if
it says what the account was opened with, and if no other live object points at the same account.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dpmoe_operator.api.ledgerentry import AccountOpened, ObjectReference
from dpmoe_operator.api.privateblock import PrivateBlockSpec
from dpmoe_operator.control.views import BlockView, Snapshot
from dpmoe_operator.ledger.fold import Account
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS


@dataclass(frozen=True)
class Standing:
    """How a block object relates to the ledger.

    Attributes:
        block: the object.
        account_name: the identity of its data; None where the manifest does not parse.
        refusal: (reason, message) where the object may not be used.
    """

    block: BlockView
    account_name: str | None
    refusal: tuple[str, str] | None = None

    @property
    def spec(self) -> PrivateBlockSpec:
        """The spec of a block that stands."""
        assert self.refusal is None
        assert self.block.spec is not None
        return self.block.spec


def standings(snapshot: Snapshot) -> dict[tuple[str, str], Standing]:
    """Judge every block object of the snapshot."""
    holders = _holders(snapshot)
    accounts = snapshot.ledger.accounts
    opened_for = {account.opened.block.uid: name for name, account in accounts.items()}
    return {
        key: _judge(block, holders, opened_for.get(block.meta.uid), accounts)
        for key, block in snapshot.blocks.items()
    }


def to_open(snapshot: Snapshot) -> list[AccountOpened]:
    """The accounts that blocks of the snapshot need and the ledger lacks."""
    records = {
        standing.account_name: opening(standing.block)
        for standing in standings(snapshot).values()
        if standing.refusal is None
        and standing.account_name is not None
        and standing.account_name not in snapshot.ledger.accounts
    }
    return list(records.values())


def opening(block: BlockView) -> AccountOpened:
    """The record that opens a block's account, or that its account was opened with."""
    assert block.spec is not None
    budget = block.spec.budget
    orders = tuple(budget.orders) if budget.orders else DEFAULT_ORDERS
    return AccountOpened(
        account=block.spec.dataset.account(block.meta.namespace),
        block=ObjectReference(
            namespace=block.meta.namespace, name=block.meta.name, uid=block.meta.uid
        ),
        unit=unit_text(block.spec),
        epsilon=budget.epsilon,
        delta=budget.delta,
        conversion=budget.conversion,
        orders=list(orders),
        capacity=list(capacity(budget.epsilon, budget.delta, orders, budget.conversion)),
    )


def unit_text(spec: PrivateBlockSpec) -> str:
    """The privacy unit as one word: `example`, or `user:column`."""
    return spec.unit.kind if spec.unit.column is None else f"{spec.unit.kind}:{spec.unit.column}"


def _holders(snapshot: Snapshot) -> dict[str, BlockView]:
    """The live object that holds each account: the one it was opened for, else the oldest."""
    holders: dict[str, BlockView] = {}
    for block in sorted(snapshot.blocks.values(), key=lambda b: (b.meta.created, b.meta.uid)):
        if block.spec is None:
            continue
        name = block.spec.dataset.account(block.meta.namespace)
        account = snapshot.ledger.accounts.get(name)
        if name not in holders or (account and account.opened.block.uid == block.meta.uid):
            holders[name] = block
    return holders


def _judge(
    block: BlockView,
    holders: Mapping[str, BlockView],
    opened_for: str | None,
    accounts: Mapping[str, Account],
) -> Standing:
    if block.spec is None:
        return Standing(block, None, ("InvalidSpec", str(block.error)))
    name = block.spec.dataset.account(block.meta.namespace)
    if opened_for is not None and opened_for != name:
        problem = (
            f"spec.dataset: {name!r}: must stay {opened_for!r}, the data that this block's account"
            " was opened for; apply another block for other data"
        )
        return Standing(block, name, ("DatasetChanged", problem))
    holder = holders[name]
    if holder.meta.uid != block.meta.uid:
        problem = (
            f"spec.dataset: {name!r}: is the data of block {holder.meta.name} already;"
            " delete one of the two blocks, their budget is one and the same"
        )
        return Standing(block, name, ("DuplicateDataset", problem))
    difference = _difference(accounts[name], opening(block)) if name in accounts else None
    if difference is not None:
        return Standing(block, name, ("BudgetDiffersFromLedger", difference))
    return Standing(block, name)


def _difference(account: Account, now: AccountOpened) -> str | None:
    """Where the manifest contradicts what the ledger opened, in the words of the manifest."""
    then = account.opened
    fields = {
        "spec.budget.epsilon": (then.epsilon, now.epsilon),
        "spec.budget.delta": (then.delta, now.delta),
        "spec.budget.conversion": (then.conversion, now.conversion),
        "spec.budget.orders": (then.orders, now.orders),
        "spec.unit": (then.unit, now.unit),
    }
    for name, (old, new) in fields.items():
        if old != new:
            return (
                f"{name}: {new!r}: must be {old!r}, with which the account of this data was opened"
                f" on {account.time}; a budget is never refilled or changed"
            )
    return None
