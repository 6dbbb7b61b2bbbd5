"""Checkpoints: a fold from the middle is a fold from the start, and a wrong one is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import NOW, OTHER_TEAM, Object, commit, granted, launched, opened, reference
from tests.builders import settled as settled_job

from dpmoe_operator.api.ledgerentry import AccountRetired, Record
from dpmoe_operator.ledger import checkpoint
from dpmoe_operator.ledger.checkpoint import FORGET_AFTER, KEEP_WHOLE, Contents, checkpoint_records
from dpmoe_operator.ledger.entry import LedgerError
from dpmoe_operator.ledger.fold import LedgerState, checkpoints_in, fold

LATER = NOW + KEEP_WHOLE + timedelta(seconds=1)
MUCH_LATER = NOW + FORGET_AFTER + timedelta(seconds=1)


class Log:
    """A log that grows, and what it adds up to."""

    def __init__(self) -> None:
        self.state = LedgerState()
        self.manifests: list[Object] = []

    def commit(self, *records: Any, time: datetime = NOW) -> None:
        self.manifests.append(commit(self.state, *records, time=time))

    def checkpoint(self, time: datetime = NOW, live: Sequence[str] = ()) -> None:
        self.keep(self.state.contents().shortened(time, set(live)), time)

    def keep(self, contents: Contents, time: datetime = NOW) -> None:
        for record in checkpoint_records(contents):
            self.commit(record, time=time)

    def from_checkpoint(self) -> LedgerState:
        return fold(self.manifests, start=checkpoints_in(self.manifests)[-1])


@pytest.fixture
def log() -> Log:
    """Two accounts, one open grant, one launched, one settled."""
    log = Log()
    log.commit(opened("a", (100, 50)), opened("b", (5, 70)))
    log.commit(granted("open", {"a": (6, 3), "b": (1, 2)}), granted("done", {"a": (1, 1)}))
    log.commit(granted("running", {"a": (2, 1)}, job=reference("running", namespace=OTHER_TEAM)))
    log.commit(launched("running"), launched("done"))
    log.commit(settled_job("done", {"a": (1, 0)}, steps=3))
    return log


def test_fold_from_a_checkpoint_is_the_fold_of_all(log: Log) -> None:
    log.checkpoint()
    log.commit(granted("after", {"a": (1, 1)}))
    assert log.from_checkpoint() == fold(log.manifests) == log.state
    assert log.state.checkpoint == 5
    assert set(log.state.grants) == {"open", "running", "done", "after"}


def test_settled_grants_shrink_with_time(log: Log) -> None:
    log.checkpoint(LATER)
    assert set(log.state.grants) == {"open", "running"}
    assert log.state.closed["done"].outcome == "Completed"
    assert log.state.closed["done"].entry == "entry-000000000004"
    assert log.state.settlement_time("done") == "2030-01-01T12:00:00.000000Z"
    assert log.from_checkpoint() == fold(log.manifests) == log.state


def test_closed_job_is_not_granted_again(log: Log) -> None:
    log.checkpoint(LATER)
    with pytest.raises(LedgerError, match="grants job done twice"):
        log.commit(granted("done", {"a": (1, 1)}))


def test_jobs_that_are_gone_are_forgotten_after_a_month(log: Log) -> None:
    log.checkpoint(MUCH_LATER, live=["done"])
    assert log.state.knows("done")
    log.checkpoint(MUCH_LATER)
    assert not log.state.knows("done")
    assert log.from_checkpoint() == fold(log.manifests) == log.state


def test_retired_accounts_stay_retired(log: Log) -> None:
    log.commit(Record(account_retired=AccountRetired(account="b", block=reference("block"))))
    log.checkpoint()
    assert log.from_checkpoint() == log.state
    with pytest.raises(LedgerError, match="account b, which is retired"):
        log.commit(granted("late", {"b": (0, 0)}))


def test_large_state_is_split_and_put_together(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_ENTRY_BYTES", 500)
    log.checkpoint()
    assert len(log.manifests) > 7
    assert log.from_checkpoint() == fold(log.manifests) == log.state
    assert log.state.checkpoint == 5


def test_interrupted_checkpoint_is_passed_over(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_ENTRY_BYTES", 500)
    first, *_ = checkpoint_records(log.state.contents())
    log.commit(first)
    log.commit(granted("between", {"a": (1, 1)}))
    assert checkpoints_in(log.manifests) == []
    log.commit(first.model_copy(deep=True))  # It is not complete either.
    log.checkpoint()
    assert log.from_checkpoint() == fold(log.manifests) == log.state
    assert "between" in log.state.grants


def test_parts_out_of_place_are_refused(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_ENTRY_BYTES", 500)
    first, second, third, *_ = checkpoint_records(log.state.contents())
    with pytest.raises(LedgerError, match=r"part 2 of \d+ is out of place"):
        log.commit(second)
    log.commit(first)
    with pytest.raises(LedgerError, match=r"part 3 of \d+ is out of place"):
        log.commit(third)
    with pytest.raises(LedgerError, match="beside"):
        log.commit(second, granted("beside", {"a": (1, 1)}))


def fresh_account(contents: Contents) -> Contents:
    state = LedgerState()
    commit(state, opened("a", (100, 50)))
    return replace(contents, accounts={**contents.accounts, **state.accounts})


def without_account(contents: Contents) -> Contents:
    return replace(contents, accounts={"a": contents.accounts["a"]})


def without_grant(uid: str) -> Callable[[Contents], Contents]:
    def lie(contents: Contents) -> Contents:
        return replace(contents, grants={u: g for u, g in contents.grants.items() if u != uid})

    return lie


def unsettled(contents: Contents) -> Contents:
    done = contents.grants["done"]
    again = replace(done, settled=None, settlement_entry=None, settlement_time=None)
    return replace(contents, grants={**contents.grants, "done": again})


def ghost(contents: Contents) -> Contents:
    grant = replace(contents.grants["open"], granted=granted("ghost", {"a": (1, 1)}))
    return replace(contents, grants={**contents.grants, "ghost": grant})


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        (fresh_account, "account a differs"),
        (without_account, "account b differs"),
        (without_grant("open"), "the open grant of job open is missing"),
        (without_grant("done"), "forgotten too early"),
        (unsettled, "the grant of job done differs"),
        (ghost, "the grant of job ghost differs"),
    ],
)
def test_a_lying_checkpoint_is_refused(
    log: Log, lie: Callable[[Contents], Contents], problem: str
) -> None:
    before = log.state.sequence
    with pytest.raises(LedgerError, match=problem):
        log.keep(lie(log.state.contents()))
    assert log.state.sequence == before


def test_closed_lies_are_refused(log: Log) -> None:
    log.checkpoint(LATER)
    contents = log.state.contents()
    other = contents.closed["done"].model_copy(update={"outcome": "NeverStarted"})
    for closed in ({}, {"done": other}):
        with pytest.raises(LedgerError, match="checkpoint does not hold"):
            log.keep(replace(contents, closed=closed), LATER)


@given(st.lists(st.sampled_from(["grant", "launch", "settle", "open", "checkpoint"]), max_size=30))
def test_any_history_folds_the_same_from_its_last_checkpoint(steps: list[str]) -> None:
    log, number, time = Log(), 0, NOW
    log.commit(opened("a0", (1000, 1000)))
    for step in [*steps, "checkpoint"]:
        number, time = number + 1, time + timedelta(minutes=20)
        unsettled = [uid for uid, grant in log.state.grants.items() if grant.settled is None]
        unlaunched = [uid for uid in unsettled if log.state.grants[uid].launched is None]
        if step == "open":
            log.commit(opened(f"a{number}", (number, 5)), time=time)
        elif step == "grant":
            log.commit(granted(f"j{number}", {"a0": (2, 3)}), time=time)
        elif step == "launch" and unlaunched:
            log.commit(launched(unlaunched[0]), time=time)
        elif step == "settle" and unsettled:
            log.commit(settled_job(unsettled[0], {"a0": (1, 3)}, steps=1), time=time)
        elif step == "checkpoint":
            log.checkpoint(time)
    assert log.from_checkpoint() == fold(log.manifests) == log.state
