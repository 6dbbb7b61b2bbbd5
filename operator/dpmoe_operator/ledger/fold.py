"""State = fold(log): pure, replayable, and itself the check that the log keeps the rules.

What holds after every entry, or `LedgerError` names the first that breaks it:

- an account is opened once; its capacity never changes; once retired it takes no grant any more;
- on each account, reserved + consumed ≤ capacity at some RDP order (the privacy filter);
- a job is granted at most once, over all its accounts together;
- a grant is launched at most once, and settled at most once, for at most what it reserved;
- a checkpoint says what the entries before it add up to. A fold may start at one: then what it
  says is taken on trust, and everything behind it is checked.
"""

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from dpmoe_operator.api.ledgerentry import (
    AccountOpened,
    AccountRetired,
    Charge,
    Checkpoint,
    GrantClosed,
    Granted,
    Launched,
    LedgerEntrySpec,
    ObjectReference,
    Record,
    Settled,
)
from dpmoe_operator.ledger.account import Account, Amounts, Grant, Spending, minus, plus
from dpmoe_operator.ledger.checkpoint import Contents
from dpmoe_operator.ledger.entry import GENESIS, LedgerError, entry_name, open_entry


@dataclass(frozen=True)
class Change:
    """What one entry does to the state, checked and not yet done.

    Attributes:
        accounts: the accounts that it changes, as they will be.
        grants: the grants that it changes, as they will be.
        parts: the parts of the checkpoint that it belongs to, up to this one.
        contents: the whole state, where it completes a checkpoint.
    """

    entry: LedgerEntrySpec
    accounts: Mapping[str, Account] = field(default_factory=dict)
    grants: Mapping[str, Grant] = field(default_factory=dict)
    parts: tuple[Checkpoint, ...] = ()
    contents: Contents | None = None


@dataclass
class LedgerState:
    """What the log says. Only `fold` and `append` change it.

    Attributes:
        accounts: by name.
        grants: open grants, and those settled since the last checkpoints, by the job's uid.
        closed: jobs that were settled longer ago, by uid.
        sequence: number of the next entry.
        head: digest of the last entry.
        blank: nothing is known yet: a checkpoint must come first.
        checkpoint: number of the first entry of the last complete checkpoint.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    closed: dict[str, GrantClosed] = field(default_factory=dict)
    sequence: int = 0
    head: str = GENESIS
    blank: bool = False
    checkpoint: int | None = None
    _parts: tuple[Checkpoint, ...] = field(default=(), repr=False)

    @classmethod
    def starting_at(cls, sequence: int, previous: str) -> "LedgerState":
        """The state before a checkpoint whose first entry has this number and predecessor."""
        return cls(sequence=sequence, head=previous, blank=sequence > 0)

    def knows(self, uid: str) -> bool:
        """Whether a job was ever granted, as far as that is still known."""
        return uid in self.grants or uid in self.closed

    def settlement_time(self, uid: str) -> str | None:
        """When a job's grant was settled; None where it is open or there is none."""
        if uid in self.closed:
            return self.closed[uid].time
        grant = self.grants.get(uid)
        return grant.settlement_time if grant is not None else None

    def contents(self) -> Contents:
        """The state as a checkpoint would hold it."""
        return Contents(self.accounts, self.grants, self.closed)

    def apply(self, manifest: Mapping[str, Any]) -> None:
        """Take in the next entry of the log.

        Raises:
            LedgerError: the entry breaks the chain or a rule; the state is then unchanged.
        """
        self.adopt(self.prepare(manifest))

    def prepare(self, manifest: Mapping[str, Any]) -> Change:
        """Check the next entry of the log, and what it would change.

        Raises:
            LedgerError: the entry breaks the chain or a rule.
        """
        entry = open_entry(manifest, sequence=self.sequence, previous=self.head)
        name = entry_name(self.sequence)
        part = next((r.checkpoint for r in entry.records if r.checkpoint is not None), None)
        if part is not None:
            return self._prepare_part(entry, name, part)
        if self.blank:
            raise LedgerError(name, "the log starts here, and not with a checkpoint")
        accounts, grants = self._preview(name, entry.time, entry.records)
        return Change(entry, accounts, grants)

    def adopt(self, change: Change) -> None:
        """Take in what `prepare` checked, on the state that it was checked on."""
        assert change.entry.sequence == self.sequence
        if change.contents is not None:
            self.accounts = dict(change.contents.accounts)
            self.grants = dict(change.contents.grants)
            self.closed = dict(change.contents.closed)
            self.checkpoint = self.sequence - len(change.parts) + 1
            self.blank = False
        else:
            self.accounts.update(change.accounts)
            self.grants.update(change.grants)
        self._parts = () if change.contents is not None else change.parts
        self.sequence += 1
        self.head = change.entry.digest

    def _prepare_part(self, entry: LedgerEntrySpec, name: str, part: Checkpoint) -> Change:
        if len(entry.records) != 1:
            raise LedgerError(name, "holds something beside a part of a checkpoint")
        # A writer that was interrupted leaves its checkpoint incomplete; the next starts anew.
        parts = (*self._parts, part) if part.part > 1 else (part,)
        if part.part != len(parts) or part.part > part.of or part.of != parts[0].of:
            raise LedgerError(name, f"part {part.part} of {part.of} is out of place")
        if part.part < part.of:
            return Change(entry, parts=parts)
        contents = Contents.of(parts)
        if not self.blank:
            problem = contents.difference(self.contents(), datetime.fromisoformat(entry.time))
            if problem is not None:
                raise LedgerError(name, f"the checkpoint does not hold: {problem}")
        return Change(entry, parts=parts, contents=contents)

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
            elif record.account_retired is not None:
                _retire(accounts, record.account_retired, name, time)
            elif record.granted is not None:
                if record.granted.job.uid in self.closed:
                    raise LedgerError(name, f"grants job {record.granted.job.uid} twice")
                _grant(accounts, grants, record.granted, name, time)
            elif record.launched is not None:
                _launch(grants, record.launched, name)
            elif record.settled is not None:
                _settle(accounts, grants, record.settled, name, time)
            else:
                raise LedgerError(name, "holds a part of a checkpoint beside something else")
        return changed_accounts, changed_grants


def fold(manifests: Sequence[Mapping[str, Any]], *, start: int = 0) -> LedgerState:
    """The state after a whole log.

    Args:
        manifests: LedgerEntry objects in the order of their names. They begin with the first entry
            of all, or the one at `start` is the first of a checkpoint.
        start: from which of them on to fold; what is before is not looked at.

    Raises:
        LedgerError: names the first entry that breaks the chain or a rule.
    """
    state = LedgerState()
    if manifests:
        state = _state_before(manifests[start])
    for manifest in manifests[start:]:
        state.apply(manifest)
    if state.blank:
        raise LedgerError(
            entry_name(state.sequence), "missing: the checkpoint before is incomplete"
        )
    return state


def _state_before(manifest: Mapping[str, Any]) -> LedgerState:
    """The state to fold a log from that begins with this entry."""
    spec = manifest.get("spec")
    sequence = spec.get("sequence") if isinstance(spec, Mapping) else None
    previous = spec.get("previous") if isinstance(spec, Mapping) else None
    if not isinstance(sequence, int) or not isinstance(previous, str) or part_of(manifest) != 1:
        return LedgerState()
    return LedgerState.starting_at(sequence, previous)


def part_of(manifest: Mapping[str, Any]) -> int | None:
    """Which part of a checkpoint an unchecked entry says it is; None where it is none."""
    try:
        part = manifest["spec"]["records"][0]["checkpoint"]["part"]
    except (KeyError, IndexError, TypeError):
        return None
    return part if isinstance(part, int) else None


def checkpoints_in(manifests: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where complete checkpoints begin in a log, unchecked: positions in `manifests`."""
    found = []
    for end, manifest in enumerate(manifests):
        part = part_of(manifest)
        if part is not None and part == manifest["spec"]["records"][0]["checkpoint"].get("of"):
            found.append(end - part + 1)
    return [position for position in found if position >= 0]


def _retire(
    accounts: MutableMapping[str, Account], retired: AccountRetired, entry: str, time: str
) -> None:
    account = accounts.get(retired.account)
    if account is None:
        raise LedgerError(entry, f"retires account {retired.account}, which was never opened")
    if account.retired is not None:
        raise LedgerError(entry, f"retires account {retired.account} a second time")
    accounts[retired.account] = replace(account, retired=retired, retirement_time=time)


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
        if account.retired is not None:
            raise LedgerError(entry, f"grants on account {charge.account}, which is retired")
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
        after = plus(spending.consumed, consumed) if any(consumed) else spending.consumed
        return Spending(plus(spending.reserved, reserved), after, spending.jobs + jobs)

    return replace(
        account,
        spending=changed(account.spending),
        by_namespace={**account.by_namespace, namespace: changed(account.of_namespace(namespace))},
    )
