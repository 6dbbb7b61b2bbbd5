"""Blocks and their accounts: which block objects stand, and which accounts must be opened.

An account belongs to a dataset partition for ever. A block object only points at it: it stands if
it says what the account was opened with, if no other live object points at the same account, and
if no other account may hold its rows, nor the rows of its releasable evaluation set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from dpmoe_operator.api.identity import DataIdentity, TakenRows
from dpmoe_operator.api.ledgerentry import AccountOpened, ObjectReference
from dpmoe_operator.api.privateblock import PrivateBlockSpec
from dpmoe_operator.control.views import BlockView, Snapshot
from dpmoe_operator.ledger.account import Account
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS


@dataclass(frozen=True)
class Standing:
    """How a block object relates to the ledger.

    Attributes:
        block: the object.
        account_name: the identity of its data; None where the manifest does not parse.
        refusal: (reason, message) where the object may not be used.
        orders: RDP orders on which its account is or will be kept.
    """

    block: BlockView
    account_name: str | None
    refusal: tuple[str, str] | None = None
    orders: tuple[str, ...] = ()

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
    overlaps = dict(_overlaps(holders, accounts))
    judged = {
        key: _judge(block, holders, opened_for.get(block.meta.uid), accounts, overlaps)
        for key, block in snapshot.blocks.items()
    }
    return {key: _if_served(standing, snapshot) for key, standing in judged.items()}


def _if_served(standing: Standing, snapshot: Snapshot) -> Standing:
    """Refuse a block whose namespace the operator may not look into."""
    namespace = standing.block.meta.namespace
    if standing.refusal is not None or namespace not in snapshot.unserved:
        return standing
    problem = (
        f"metadata.namespace: {namespace!r}: the operator has no rights there"
        f" ({snapshot.unserved[namespace]}); add it to dataNamespaces of the Helm release"
    )
    return replace(standing, refusal=("NamespaceNotServed", problem))


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
    orders = _declared_orders(block.spec)
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
        disjoint_from=[],
    )


def unit_text(spec: PrivateBlockSpec) -> str:
    """The privacy unit as one word: `example`, or `user:column`."""
    return spec.unit.kind if spec.unit.column is None else f"{spec.unit.kind}:{spec.unit.column}"


def _declared_orders(spec: PrivateBlockSpec) -> tuple[str, ...]:
    return tuple(spec.budget.orders) if spec.budget.orders else DEFAULT_ORDERS


def _holders(snapshot: Snapshot) -> dict[str, BlockView]:
    """The live object that holds each account: the one it was opened for, else the oldest."""
    holders: dict[str, BlockView] = {}
    for block in sorted(snapshot.blocks.values(), key=_age):
        if block.spec is None:
            continue
        name = block.spec.dataset.account(block.meta.namespace)
        account = snapshot.ledger.accounts.get(name)
        if name not in holders or (account and account.opened.block.uid == block.meta.uid):
            holders[name] = block
    return holders


def _overlaps(
    holders: Mapping[str, BlockView], accounts: Mapping[str, Account]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Refusals by the uid of the block: its rows, or those it evaluates on, belong to another.

    Accounts of the ledger come first, then live blocks by age: whoever has the rows keeps them.
    """
    taken = TakenRows()
    for name in accounts:
        taken.take(DataIdentity.parse(name))
    for name, block in sorted(holders.items(), key=lambda item: _age(item[1])):
        if name in accounts:
            continue
        identity = DataIdentity.parse(name)
        owner = taken.owner(identity)
        if owner is None:
            taken.take(identity)
            continue
        problem = (
            f"spec.dataset: {name!r}: may share rows with {str(owner)!r}, which has a budget of its"
            " own; name other data, or partition both by the same column"
        )
        yield block.meta.uid, ("SharesRows", problem)
    for block in holders.values():
        assert block.spec is not None
        if block.spec.evaluation is None:
            continue
        scored = block.spec.evaluation.identity(block.meta.namespace)
        owner = taken.owner(scored)
        if owner is not None:
            problem = (
                f"spec.evaluation: {str(scored)!r}: may share rows with the private data"
                f" {str(owner)!r}; scores on it would be released uncounted, so name other data"
            )
            yield block.meta.uid, ("EvaluationIsPrivate", problem)


def _age(block: BlockView) -> tuple[datetime, str]:
    return block.meta.created, block.meta.uid


def _judge(
    block: BlockView,
    holders: Mapping[str, BlockView],
    opened_for: str | None,
    accounts: Mapping[str, Account],
    overlaps: Mapping[str, tuple[str, str]],
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
    if block.meta.uid in overlaps:
        return Standing(block, name, overlaps[block.meta.uid])
    if name not in accounts:
        return Standing(block, name, orders=_declared_orders(block.spec))
    account = accounts[name]
    difference = _difference(account, block)
    if difference is not None:
        return Standing(block, name, ("BudgetDiffersFromLedger", difference))
    return Standing(block, name, orders=tuple(account.opened.orders))


def _difference(account: Account, block: BlockView) -> str | None:
    """Where the manifest contradicts what the ledger opened, in the words of the manifest.

    A manifest that names no orders takes the account's, whatever the default is by now.
    """
    assert block.spec is not None
    then, now = account.opened, opening(block)
    fields = {
        "spec.budget.epsilon": (then.epsilon, now.epsilon),
        "spec.budget.delta": (then.delta, now.delta),
        "spec.budget.conversion": (then.conversion, now.conversion),
        "spec.budget.orders": (then.orders, block.spec.budget.orders or then.orders),
        "spec.unit": (then.unit, now.unit),
    }
    for name, (old, new) in fields.items():
        if old != new:
            return (
                f"{name}: {new!r}: must be {old!r}, with which the account of this data was opened"
                f" on {account.time}; a budget is never refilled or changed"
            )
    return None
