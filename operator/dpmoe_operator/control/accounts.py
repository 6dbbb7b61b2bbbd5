"""Blocks and their accounts: which block objects stand, which accounts are opened or retired.

An account belongs to a dataset partition for ever. A block object only points at it: it stands if
it says what the account was opened with, if no other live object points at the same account, and
if no other account may hold its rows, nor the rows of its releasable evaluation set. Where a
block's own status tells of spending that the ledger does not know, the ledger was lost, and nothing
is opened afresh.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpmoe_operator.api.ledgerentry import AccountOpened, AccountRetired, ObjectReference
from dpmoe_operator.api.privateblock import PrivateBlockSpec
from dpmoe_operator.control.rows import Declarations, Refused, account_name, age, overlaps
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
        retired: why no job may be granted any more, though granted ones go on; None otherwise.
        orders: RDP orders on which its account is or will be kept.
        disjoint_from: accounts that the owner declares to share no row, where one is to be opened.
    """

    block: BlockView
    account_name: str | None
    refusal: Refused | None = None
    retired: str | None = None
    orders: tuple[str, ...] = ()
    disjoint_from: tuple[str, ...] = ()

    @property
    def spec(self) -> PrivateBlockSpec:
        """The spec of a block that stands."""
        assert self.refusal is None
        assert self.block.spec is not None
        return self.block.spec


def standings(snapshot: Snapshot) -> dict[tuple[str, str], Standing]:
    """Judge every block object of the snapshot."""
    bench = _Bench(snapshot)
    return {key: _if_served(bench.judge(block), snapshot) for key, block in snapshot.blocks.items()}


def to_open(snapshot: Snapshot) -> list[AccountOpened]:
    """The accounts that blocks of the snapshot need and the ledger lacks."""
    return [
        opening(standing.block, standing.disjoint_from)
        for standing in standings(snapshot).values()
        if standing.refusal is None
        and standing.retired is None
        and standing.account_name not in snapshot.ledger.accounts
    ]


def to_retire(snapshot: Snapshot) -> list[AccountRetired]:
    """The open accounts whose blocks were retired since the last round."""
    accounts = snapshot.ledger.accounts
    retired = (s for s in standings(snapshot).values() if s.retired is not None)
    return [
        AccountRetired(account=account.opened.account, block=_reference(standing.block))
        for standing in retired
        if (account := accounts.get(standing.account_name or "")) and account.retired is None
    ]


def opening(block: BlockView, disjoint_from: tuple[str, ...] = ()) -> AccountOpened:
    """The record that opens a block's account."""
    assert block.spec is not None
    budget = block.spec.budget
    orders = _declared_orders(block.spec)
    return AccountOpened(
        account=account_name(block),
        block=_reference(block),
        unit=unit_text(block.spec),
        epsilon=budget.epsilon,
        delta=budget.delta,
        conversion=budget.conversion,
        orders=list(orders),
        capacity=list(capacity(budget.epsilon, budget.delta, orders, budget.conversion)),
        disjoint_from=list(disjoint_from),
    )


def unit_text(spec: PrivateBlockSpec) -> str:
    """The privacy unit as one word: `example`, or `user:column`."""
    return spec.unit.kind if spec.unit.column is None else f"{spec.unit.kind}:{spec.unit.column}"


def _declared_orders(spec: PrivateBlockSpec) -> tuple[str, ...]:
    return tuple(spec.budget.orders) if spec.budget.orders else DEFAULT_ORDERS


def _reference(block: BlockView) -> ObjectReference:
    meta = block.meta
    return ObjectReference(namespace=meta.namespace, name=meta.name, uid=meta.uid)


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


class _Bench:
    """Judges the blocks of one snapshot, each in the light of all others and of the ledger."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._accounts = snapshot.ledger.accounts
        self._opened_for = {a.opened.block.uid: name for name, a in self._accounts.items()}
        self._holders = _holders(snapshot)
        self._lost = _lost(snapshot)
        unopened = {n: b for n, b in self._holders.items() if n not in self._accounts}
        self._declared = Declarations(snapshot, unopened)
        self._overlaps = dict(
            overlaps(self._holders, self._accounts, self._lost.keys(), self._declared)
        )

    def judge(self, block: BlockView) -> Standing:
        """How a block stands."""
        if block.spec is None:
            return Standing(block, None, ("InvalidSpec", str(block.error)))
        name = account_name(block)
        refusal = self._not_its_account(block, name)
        if refusal is not None:
            return Standing(block, name, refusal)
        account = self._accounts.get(name)
        refusal = self._overlaps.get(block.meta.uid)
        if refusal is None and account is not None:
            refusal = _difference(account, block)
        return Standing(
            block,
            name,
            refusal,
            retired=_retirement(block, account),
            orders=tuple(account.opened.orders) if account else _declared_orders(block.spec),
            disjoint_from=self._declared.accounts.get(name, ()),
        )

    def _not_its_account(self, block: BlockView, name: str) -> Refused | None:
        """Why a block has no say about the account of its data."""
        opened_for = self._opened_for.get(block.meta.uid, name)
        if opened_for != name:
            return (
                "DatasetChanged",
                f"spec.dataset: {name!r}: must stay {opened_for!r}, the data that this block's"
                " account was opened for; apply another block for other data",
            )
        holder = self._holders[name]
        if holder.meta.uid != block.meta.uid:
            return (
                "DuplicateDataset",
                f"spec.dataset: {name!r}: is the data of block {holder.meta.name} already;"
                " delete one of the two blocks, their budget is one and the same",
            )
        if name in self._lost:
            return _lost_ledger(name, self._lost[name], self._accounts.get(name))
        return None


def _holders(snapshot: Snapshot) -> dict[str, BlockView]:
    """The live object that holds each account: the one it was opened for, else the oldest."""
    holders: dict[str, BlockView] = {}
    for block in sorted(snapshot.blocks.values(), key=age):
        if block.spec is None:
            continue
        name = account_name(block)
        account = snapshot.ledger.accounts.get(name)
        if name not in holders or (account and account.opened.block.uid == block.meta.uid):
            holders[name] = block
    return holders


def _lost(snapshot: Snapshot) -> Mapping[str, BlockView]:
    """Accounts of which the ledger knows too little, and the block whose status says so.

    A status is never read to give budget, only to withhold it.
    """
    accounts = snapshot.ledger.accounts
    result = {}
    for block in snapshot.blocks.values():
        name = account_name(block) if block.spec is not None else None
        if name is not None and block.status.get("account") == name:
            known = accounts[name].spending.jobs if name in accounts else 0
            if (block.status.get("jobs") or 0) > known:
                result[name] = block
    return result


def _lost_ledger(name: str, witness: BlockView, account: Account | None) -> Refused:
    """Why the account of a block is not to be relied on, and not to be opened afresh."""
    knows = f"knows of {account.spending.jobs}" if account else "has no such account"
    return (
        "LedgerBehind" if account else "AccountMissing",
        f"spec.dataset: {name!r}: the status of block {witness.meta.name} says that"
        f" {witness.status['jobs']} jobs had budget of its account, but the ledger {knows}: it was"
        " lost or taken back, or this is another one; put its entries back from the anchor (dpmoe"
        " ledger recover)",
    )


def _retirement(block: BlockView, account: Account | None) -> str | None:
    """Why a block takes no job any more, whatever its manifest says by now."""
    assert block.spec is not None
    if account is not None and account.retired is not None:
        by = account.retired.block
        problem = (
            f"the account of this data was retired on {account.retirement_time} by block"
            f" {by.namespace}/{by.name}, for ever; what was granted before goes on"
        )
        if block.spec.retired:
            return problem
        return f"spec.retired: False: must be true: {problem}"
    if not block.spec.retired:
        return None
    if account is None:
        return "spec.retired is true; no account was ever opened for this data"
    return "spec.retired is true; the account is being retired"


def _difference(account: Account, block: BlockView) -> Refused | None:
    """Where the manifest contradicts what the ledger opened, in the words of the manifest.

    A manifest that names no orders takes the account's, whatever the default is by now.
    """
    assert block.spec is not None
    then, now = account.opened, block.spec.budget
    fields = {
        "spec.budget.epsilon": (then.epsilon, now.epsilon),
        "spec.budget.delta": (then.delta, now.delta),
        "spec.budget.conversion": (then.conversion, now.conversion),
        "spec.budget.orders": (then.orders, now.orders or then.orders),
        "spec.unit": (then.unit, unit_text(block.spec)),
    }
    for name, (old, new) in fields.items():
        if old != new:
            return (
                "BudgetDiffersFromLedger",
                f"{name}: {new!r}: must be {old!r}, with which the account of this data was opened"
                f" on {account.time}; a budget is never refilled or changed",
            )
    return None
