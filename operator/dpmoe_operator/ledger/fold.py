"""State = fold(log): pure, replayable, and itself the check that the log keeps the rules.

What holds after every entry, or `LedgerError` names the first that breaks it:

- an account is opened once; its capacity never changes;
- on each account, reserved + consumed ≤ capacity at some RDP order (the privacy filter);
- a job is granted at most once, over all its accounts together;
- a grant is launched at most once, and settled at most once, for at most what it reserved.
"""

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpmoe_operator.api.ledgerentry import (
    AccountOpened,
    Charge,
    Granted,
    Launched,
    ObjectReference,
    Record,
    Settled,
)
from dpmoe_operator.ledger.entry import GENESIS, LedgerError, entry_name, open_entry

Amounts = tuple[int, ...]


def plus(a: Sequence[int], b: Sequence[int]) -> Amounts:
    """Order by order, a + b."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def minus(a: Sequence[int], b: Sequence[int]) -> Amounts:
    """Order by order, a − b."""
    return tuple(x - y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Spending:
    """Reserved and consumed amounts, in 10⁻⁹ ε at each order of the account."""

    reserved: Amounts
    consumed: Amounts
    jobs: int = 0

    @property
    def total(self) -> Amounts:
        """Everything that can no longer be promised to somebody else."""
        return plus(self.reserved, self.consumed)


@dataclass(frozen=True)
class Account:
    """One dataset partition's budget."""

    opened: AccountOpened
    time: str
    spending: Spending
    by_namespace: Mapping[str, Spending]

    @property
    def capacity(self) -> Amounts:
        """The total budget at each order, in 10⁻⁹ ε."""
        return tuple(self.opened.capacity)

    @property
    def zero(self) -> Amounts:
        """No amount, at each order."""
        return (0,) * len(self.opened.capacity)

    def of_namespace(self, namespace: str) -> Spending:
        """What the jobs of one namespace reserved and consumed here."""
        return self.by_namespace.get(namespace, Spending(self.zero, self.zero))

    def fits(self, amounts: Sequence[int]) -> bool:
        """Whether the filter still holds with `amounts` added: at some order, all fits."""
        sums = zip(self.spending.total, amounts, self.opened.capacity, strict=True)
        return any(spent + asked <= capacity for spent, asked, capacity in sums)


@dataclass(frozen=True)
class Grant:
    """One job's reservation, and how it ended."""

    granted: Granted
    entry: str
    time: str
    launched: Launched | None = None
    settled: Settled | None = None
    settlement_entry: str | None = None
    settlement_time: str | None = None

    @property
    def amounts(self) -> dict[str, Amounts]:
        """Reserved amounts by account."""
        return {charge.account: tuple(charge.amounts) for charge in self.granted.charges}


@dataclass
class LedgerState:
    """What the log says. Only `fold` and `append` change it."""

    accounts: dict[str, Account] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    sequence: int = 0
    head: str = GENESIS

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """Take in the next entry of the log.

        Raises:
            LedgerError: the entry breaks the chain or a rule; the state is then unchanged.
        """
        entry = open_entry(manifest, sequence=self.sequence, previous=self.head)
        name = entry_name(self.sequence)
        accounts, grants = self._preview(name, entry.time, entry.records)
        self.accounts.update(accounts)
        self.grants.update(grants)
        self.sequence += 1
        self.head = entry.digest

    def check(self, records: Iterable[Record]) -> None:
        """Refuse records that the log could not take now.

        Raises:
            LedgerError: a record breaks a rule.
        """
        self._preview(entry_name(self.sequence), "", records)

    def _preview(
        self, name: str, time: str, records: Iterable[Record]
    ) -> tuple[dict[str, Account], dict[str, Grant]]:
        changed_accounts: dict[str, Account] = {}
        changed_grants: dict[str, Grant] = {}
        accounts = ChainMap(changed_accounts, self.accounts)
        grants = ChainMap(changed_grants, self.grants)
        for record in records:
            if record.account_opened is not None:
                _open(accounts, record.account_opened, name, time)
            elif record.granted is not None:
                _grant(accounts, grants, record.granted, name, time)
            elif record.launched is not None:
                _launch(grants, record.launched, name)
            else:
                assert record.settled is not None
                _settle(accounts, grants, record.settled, name, time)
        return changed_accounts, changed_grants


def fold(manifests: Iterable[Mapping[str, Any]]) -> LedgerState:
    """The state after a whole log.

    Args:
        manifests: LedgerEntry objects in the order of their names.

    Raises:
        LedgerError: names the first entry that breaks the chain or a rule.
    """
    state = LedgerState()
    for manifest in manifests:
        state.apply(manifest)
    return state


def _open(
    accounts: MutableMapping[str, Account], opened: AccountOpened, entry: str, time: str
) -> None:
    if opened.account in accounts:
        raise LedgerError(entry, f"opens account {opened.account} a second time")
    if len(opened.orders) != len(opened.capacity):
        raise LedgerError(entry, f"account {opened.account}: orders and capacity differ in length")
    zero = (0,) * len(opened.capacity)
    accounts[opened.account] = Account(opened, time, Spending(zero, zero), {})


def _grant(
    accounts: MutableMapping[str, Account],
    grants: MutableMapping[str, Grant],
    granted: Granted,
    entry: str,
    time: str,
) -> None:
    job = granted.job
    if job.uid in grants:
        raise LedgerError(entry, f"grants job {job.namespace}/{job.name} ({job.uid}) twice")
    for charge in _distinct(granted.charges, entry):
        account = _account(accounts, charge, entry)
        if min(charge.amounts) < 0:
            raise LedgerError(entry, f"reserves a negative amount on {charge.account}")
        if not account.fits(charge.amounts):
            raise LedgerError(
                entry,
                f"job {job.namespace}/{job.name} exceeds account {charge.account} at every order",
            )
        accounts[charge.account] = _spend(
            account, job.namespace, reserved=tuple(charge.amounts), consumed=account.zero, jobs=1
        )
    grants[job.uid] = Grant(granted, entry, time)


def _launch(grants: MutableMapping[str, Grant], launched: Launched, entry: str) -> None:
    grant = _open_grant(grants, launched.job, entry, "launches")
    if grant.launched is not None:
        raise LedgerError(entry, f"launches job {launched.job.uid} twice")
    grants[launched.job.uid] = replace(grant, launched=launched)


def _open_grant(
    grants: Mapping[str, Grant], reference: ObjectReference, entry: str, verb: str
) -> Grant:
    grant = grants.get(reference.uid)
    job = f"{reference.namespace}/{reference.name} ({reference.uid})"
    if grant is None:
        raise LedgerError(entry, f"{verb} job {job}, which was never granted")
    if grant.settled is not None:
        raise LedgerError(entry, f"{verb} job {job}, which is settled already")
    return grant


def _settle(
    accounts: MutableMapping[str, Account],
    grants: MutableMapping[str, Grant],
    settled: Settled,
    entry: str,
    time: str,
) -> None:
    grant = _open_grant(grants, settled.job, entry, "settles")
    job = settled.job.uid
    reserved = grant.amounts
    if {charge.account for charge in settled.charges} != reserved.keys():
        raise LedgerError(entry, f"settles job {job} on other accounts than it reserved")
    for charge in _distinct(settled.charges, entry):
        account = _account(accounts, charge, entry)
        if any(
            not 0 <= used <= held
            for used, held in zip(charge.amounts, reserved[charge.account], strict=True)
        ):
            raise LedgerError(entry, f"settles job {job} for other than 0 to what it reserved")
        accounts[charge.account] = _spend(
            account,
            grant.granted.job.namespace,
            reserved=minus(account.zero, reserved[charge.account]),
            consumed=tuple(charge.amounts),
            jobs=0,
        )
    grants[settled.job.uid] = replace(
        grant, settled=settled, settlement_entry=entry, settlement_time=time
    )


def _distinct(charges: Sequence[Charge], entry: str) -> Sequence[Charge]:
    if len({charge.account for charge in charges}) != len(charges):
        raise LedgerError(entry, "charges one account twice in one record")
    return charges


def _account(accounts: Mapping[str, Account], charge: Charge, entry: str) -> Account:
    account = accounts.get(charge.account)
    if account is None:
        raise LedgerError(entry, f"charges account {charge.account}, which was never opened")
    if len(charge.amounts) != len(account.capacity):
        raise LedgerError(entry, f"charges {charge.account} on other orders than the account's")
    return account


def _spend(
    account: Account, namespace: str, *, reserved: Amounts, consumed: Amounts, jobs: int
) -> Account:
    def changed(spending: Spending) -> Spending:
        return Spending(
            plus(spending.reserved, reserved),
            plus(spending.consumed, consumed),
            spending.jobs + jobs,
        )

    return replace(
        account,
        spending=changed(account.spending),
        by_namespace={**account.by_namespace, namespace: changed(account.of_namespace(namespace))},
    )
