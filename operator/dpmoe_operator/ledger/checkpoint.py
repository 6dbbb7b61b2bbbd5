"""Checkpoints: the whole state as entries of the log, so that nobody must start at the first one.

What holds, or the fold refuses the checkpoint:

- it says exactly what the entries before it add up to: every account, every open grant;
- of a settled grant it may keep only that there was one (`GrantClosed`), which still forbids a
  second grant of the same job;
- that too may be forgotten, but not before `FORGET_AFTER`: by then the job object is gone, and a
  restored backup that brings it back is older than backups are kept.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from dpmoe_operator.api.ledgerentry import (
    MAX_RECORDS,
    AccountKept,
    Balance,
    Checkpoint,
    GrantClosed,
    GrantKept,
    Record,
    ShareKept,
)
from dpmoe_operator.ledger.account import Account, Grant, Spending
from dpmoe_operator.ledger.entry import MAX_ENTRY_BYTES

FORGET_AFTER = timedelta(days=30)
"""How long a settled job stays known after its DPMoEJob is gone."""

KEEP_WHOLE = timedelta(hours=1)
"""How long a settled grant is kept with all its numbers, for whoever still writes its status."""


@dataclass(frozen=True)
class Contents:
    """The state that a checkpoint holds.

    Attributes:
        accounts: by name.
        grants: open grants, and those settled not long ago, by the job's uid.
        closed: what is still known of the other settled grants, by the job's uid.
    """

    accounts: Mapping[str, Account]
    grants: Mapping[str, Grant]
    closed: Mapping[str, GrantClosed]

    @classmethod
    def of(cls, parts: Sequence[Checkpoint]) -> "Contents":
        """Put the parts of a checkpoint together."""
        shares: dict[str, dict[str, Spending]] = {}
        for part in parts:
            for share in part.shares:
                shares.setdefault(share.account, {})[share.namespace] = _spending(share.balance)
        accounts = {
            kept.opened.account: Account(
                kept.opened,
                kept.time,
                _spending(kept.balance),
                shares.get(kept.opened.account, {}),
                kept.retired,
                kept.retirement_time,
            )
            for part in parts
            for kept in part.accounts
        }
        grants = {
            kept.granted.job.uid: Grant(
                kept.granted,
                kept.entry,
                kept.time,
                kept.launched,
                kept.settled,
                kept.settlement_entry,
                kept.settlement_time,
            )
            for part in parts
            for kept in part.grants
        }
        closed = {each.uid: each for part in parts for each in part.closed}
        return cls(accounts, grants, closed)

    def shortened(self, now: datetime, live: Set[str]) -> "Contents":
        """What a checkpoint written now keeps of this state.

        Args:
            now: its time.
            live: uids of the DPMoEJobs that still exist.
        """
        whole, closed = {}, dict(self.closed)
        for uid, grant in self.grants.items():
            if grant.settlement_time is None or _age(grant.settlement_time, now) < KEEP_WHOLE:
                whole[uid] = grant
            else:
                closed[uid] = close(grant)
        known = {
            uid: each
            for uid, each in closed.items()
            if uid in live or _age(each.time, now) <= FORGET_AFTER
        }
        return Contents(self.accounts, whole, known)

    def difference(self, state: "Contents", now: datetime) -> str | None:
        """Where this checkpoint says something else than the entries before it; None if nowhere.

        Args:
            state: what the entries before it add up to.
            now: the checkpoint's own time.
        """
        for name in sorted(self.accounts.keys() | state.accounts.keys()):
            if self.accounts.get(name) != state.accounts.get(name):
                return f"account {name} differs from what the entries before add up to"
        for uid, grant in self.grants.items():
            if state.grants.get(uid) != grant:
                return f"the grant of job {uid} differs from what the entries before say"
        settled = {u: close(g) for u, g in state.grants.items() if g.settled is not None}
        known = {**state.closed, **settled}
        for uid, each in self.closed.items():
            if known.get(uid) != each or uid in self.grants:
                return f"closed job {uid} differs from what the entries before say"
        kept = self.grants.keys() | self.closed.keys()
        for uid in state.grants.keys() | state.closed.keys():
            if uid in kept:
                continue
            if uid not in known:
                return f"the open grant of job {uid} is missing"
            if _age(known[uid].time, now) <= FORGET_AFTER:
                return f"job {uid}, settled at {known[uid].time}, is forgotten too early"
        return None


def close(grant: Grant) -> GrantClosed:
    """What stays known of a settled grant."""
    assert grant.settled is not None
    assert grant.settlement_entry is not None
    assert grant.settlement_time is not None
    return GrantClosed(
        uid=grant.granted.job.uid,
        outcome=grant.settled.outcome,
        entry=grant.settlement_entry,
        time=grant.settlement_time,
    )


def checkpoint_records(contents: Contents) -> list[Record]:
    """The records of a checkpoint, each for an entry of its own, in order."""
    batches = list(_batches(_items(contents))) or [[]]
    return [
        Record(checkpoint=_part(number, len(batches), batch))
        for number, batch in enumerate(batches, start=1)
    ]


Kept = AccountKept | ShareKept | GrantKept | GrantClosed


def _items(contents: Contents) -> Iterator[Kept]:
    for account in contents.accounts.values():
        yield AccountKept(
            opened=account.opened,
            time=account.time,
            balance=_balance(account.spending),
            retired=account.retired,
            retirement_time=account.retirement_time,
        )
    for name, account in contents.accounts.items():
        for namespace, spending in account.by_namespace.items():
            yield ShareKept(account=name, namespace=namespace, balance=_balance(spending))
    for grant in contents.grants.values():
        yield GrantKept(
            granted=grant.granted,
            entry=grant.entry,
            time=grant.time,
            launched=grant.launched,
            settled=grant.settled,
            settlement_entry=grant.settlement_entry,
            settlement_time=grant.settlement_time,
        )
    yield from contents.closed.values()


def _batches(items: Iterable[Kept]) -> Iterator[list[Kept]]:
    batch: list[Kept] = []
    size = 0
    for item in items:
        length = len(item.model_dump_json(by_alias=True, exclude_none=True).encode()) + 1
        if batch and (size + length > MAX_ENTRY_BYTES or len(batch) == MAX_RECORDS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def _part(number: int, of: int, batch: Sequence[Kept]) -> Checkpoint:
    def those(kind: Any) -> list[Any]:
        return [item for item in batch if isinstance(item, kind)]

    return Checkpoint(
        part=number,
        of=of,
        accounts=those(AccountKept),
        shares=those(ShareKept),
        grants=those(GrantKept),
        closed=those(GrantClosed),
    )


def _balance(spending: Spending) -> Balance:
    return Balance(
        reserved=[str(amount) for amount in spending.reserved],
        consumed=[str(amount) for amount in spending.consumed],
        jobs=spending.jobs,
    )


def _spending(balance: Balance) -> Spending:
    return Spending(
        tuple(int(amount) for amount in balance.reserved),
        tuple(int(amount) for amount in balance.consumed),
        balance.jobs,
    )


def _age(time: str, now: datetime) -> timedelta:
    return now - datetime.fromisoformat(time)
