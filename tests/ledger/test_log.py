"""Appending by compare-and-swap: one chain, whatever the network does and whoever else writes."""

import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.builders import (
    MemoryStore,
    granted,
    launched,
    opened,
    run,
    settled,
    wrapped,
)

from dpmoe_operator.ledger.entry import LedgerError, entry_name
from dpmoe_operator.ledger.fold import fold
from dpmoe_operator.ledger.log import ATTEMPTS, Ledger, NoAnswer, StaleView

TIME = "2030-01-01T00:00:00Z"


def writer(store: MemoryStore, name: str = "one") -> Ledger:
    return Ledger(store, namespace="dpmoe-system", writer=name)


def append(ledger: Ledger, *records: Any) -> str:
    return run(ledger.append([wrapped(record) for record in records], time=TIME))


@pytest.fixture
def store() -> MemoryStore:
    """A log with one account of capacity 10."""
    result = MemoryStore()
    append(writer(result), opened("a", (10,)))
    return result


@pytest.fixture
def ledger(store: MemoryStore) -> Ledger:
    result = writer(store)
    run(result.load())
    return result


def in_step(ledger: Ledger, store: MemoryStore) -> bool:
    return ledger.state == fold(run(store.entries()))


def test_append_commits_and_follows(ledger: Ledger, store: MemoryStore) -> None:
    assert append(ledger, granted("job-1", {"a": (5,)})) == "entry-000000000001"
    assert append(ledger, settled("job-1", {"a": (5,)})) == "entry-000000000002"
    assert in_step(ledger, store)


def test_two_writers_cannot_follow_one_head(ledger: Ledger, store: MemoryStore) -> None:
    other = writer(store, "two")
    run(other.load())
    append(other, granted("job-1", {"a": (8,)}))
    with pytest.raises(StaleView, match="entry-000000000001 was written by another operator"):
        append(ledger, granted("job-2", {"a": (8,)}))
    assert in_step(ledger, store)
    assert list(ledger.state.grants) == ["job-1"]
    with pytest.raises(LedgerError, match="exceeds account a"):
        append(ledger, granted("job-2", {"a": (8,)}))


def test_stale_writer_catches_up_over_many_entries(ledger: Ledger, store: MemoryStore) -> None:
    other = writer(store, "two")
    run(other.load())
    for number in range(5):
        append(other, granted(f"job-{number}", {"a": (1,)}))
    with pytest.raises(StaleView):
        append(ledger, granted("job-9", {"a": (1,)}))
    assert in_step(ledger, store)
    append(ledger, granted("job-9", {"a": (1,)}))


def test_illegal_records_are_never_written(ledger: Ledger, store: MemoryStore) -> None:
    before = dict(store.log)
    with pytest.raises(LedgerError, match="exceeds"):
        append(ledger, granted("job-1", {"a": (11,)}))
    with pytest.raises(LedgerError, match="at least 1"):
        append(ledger)
    assert store.log == before


def test_what_cannot_be_read_back_is_never_written(store: MemoryStore) -> None:
    """An entry that breaks the schema would end the log for every operator, for ever."""
    broken = writer(store, "w" * 300)
    run(broken.load())
    with pytest.raises(LedgerError, match=r"spec\.writer"):
        append(broken, granted("job-1", {"a": (1,)}))
    assert list(store.log) == ["entry-000000000000"]


@pytest.mark.parametrize("fault", ["lost", "unheard"])
def test_lost_answer_is_looked_up(ledger: Ledger, store: MemoryStore, fault: str) -> None:
    store.faults = [fault]
    append(ledger, granted("job-1", {"a": (5,)}))
    assert in_step(ledger, store)
    assert len(store.log) == 2


def test_lost_answer_and_another_writer(ledger: Ledger, store: MemoryStore) -> None:
    other = writer(store, "two")
    run(other.load())
    store.faults = ["lost"]
    intruder = granted("job-2", {"a": (1,)})

    create = store.create

    async def interrupted(manifest: Any) -> None:
        try:
            await create(manifest)
        except NoAnswer:
            store.create = create  # type: ignore[method-assign]
            append(other, intruder)
            raise

    store.create = interrupted  # type: ignore[method-assign]
    with pytest.raises(StaleView):
        append(ledger, granted("job-1", {"a": (1,)}))
    assert in_step(ledger, store)
    assert list(ledger.state.grants) == ["job-2"]


def test_silent_store_ends_in_no_answer(ledger: Ledger, store: MemoryStore) -> None:
    store.faults = ["lost"] * ATTEMPTS
    with pytest.raises(NoAnswer):
        append(ledger, granted("job-1", {"a": (5,)}))
    assert in_step(ledger, store)
    append(ledger, granted("job-2", {"a": (5,)}))
    assert in_step(ledger, store)


def test_late_create_that_lands_is_taken_in(ledger: Ledger, store: MemoryStore) -> None:
    store.faults = ["late", *["lost"] * (ATTEMPTS - 1)]
    with pytest.raises(NoAnswer):
        append(ledger, granted("job-1", {"a": (6,)}))
    store.deliver()
    with pytest.raises(StaleView):
        append(ledger, granted("job-2", {"a": (6,)}))
    assert in_step(ledger, store)
    assert list(ledger.state.grants) == ["job-1"]


def test_late_create_after_another_entry_bounces(ledger: Ledger, store: MemoryStore) -> None:
    store.faults = ["late", *["lost"] * (ATTEMPTS - 1)]
    with pytest.raises(NoAnswer):
        append(ledger, granted("job-1", {"a": (6,)}))
    append(ledger, granted("job-2", {"a": (6,)}))
    store.deliver()
    assert in_step(ledger, store)
    assert list(ledger.state.grants) == ["job-2"]


def test_unreadable_conflict_is_no_answer(ledger: Ledger, store: MemoryStore) -> None:
    other = writer(store, "two")
    run(other.load())
    append(other, granted("job-1", {"a": (1,)}))
    store.deaf = 1
    with pytest.raises(NoAnswer):
        append(ledger, granted("job-2", {"a": (1,)}))
    with pytest.raises(StaleView):
        append(ledger, granted("job-2", {"a": (1,)}))
    assert in_step(ledger, store)


def test_vanishing_entry_is_no_answer(ledger: Ledger, store: MemoryStore) -> None:
    other = writer(store, "two")
    run(other.load())
    append(other, granted("job-1", {"a": (1,)}))

    entry = store.entry

    async def without_the_last(name: str) -> Any:
        return None if name == "entry-000000000001" else await entry(name)

    store.entry = without_the_last  # type: ignore[method-assign]
    with pytest.raises(NoAnswer, match="cannot be read"):
        append(ledger, granted("job-2", {"a": (1,)}))


def test_load_refuses_a_broken_log(store: MemoryStore) -> None:
    store.log["entry-000000000000"]["spec"]["writer"] = "somebody else"
    with pytest.raises(LedgerError, match="entry-000000000000: digest"):
        run(writer(store).load())


def test_catching_up_refuses_a_broken_entry(ledger: Ledger, store: MemoryStore) -> None:
    other = writer(store, "two")
    run(other.load())
    append(other, granted("job-1", {"a": (1,)}))
    store.log["entry-000000000001"]["spec"]["writer"] = "somebody else"
    with pytest.raises(LedgerError, match="entry-000000000001: digest"):
        append(ledger, granted("job-2", {"a": (1,)}))
    assert ledger.state.sequence == 1


def test_log_that_lost_its_end_is_refused(ledger: Ledger, store: MemoryStore) -> None:
    """A restored backup knows nothing of what was spent since: granting must stop."""
    append(ledger, granted("job-1", {"a": (9,)}))
    del store.log["entry-000000000001"]
    with pytest.raises(LedgerError, match="entry-000000000001: was in the log"):
        run(ledger.load())
    append(writer_at(store), granted("job-2", {"a": (9,)}))
    with pytest.raises(LedgerError, match="entry-000000000001: was in the log"):
        run(ledger.load())
    assert list(ledger.state.grants) == ["job-1"]


def writer_at(store: MemoryStore) -> Ledger:
    fresh = writer(store, "fresh")
    run(fresh.load())
    return fresh


def test_load_takes_in_what_others_wrote(ledger: Ledger, store: MemoryStore) -> None:
    append(writer_at(store), granted("job-1", {"a": (1,)}))
    run(ledger.load())
    run(ledger.load())
    assert in_step(ledger, store)


CAPACITY = 20


class TwoWriters(RuleBasedStateMachine):
    """Two operators append to one store over a bad network; late creates land at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.writers = [writer(self.store, "one"), writer(self.store, "two")]
        self.jobs = 0
        self.seen: dict[str, str] = {}
        append(self.writers[0], opened("a", (CAPACITY,)))

    def attempt(self, who: int, *records: Any) -> None:
        """As the loop does: what is refused or unknown is decided anew, later."""
        try:
            append(self.writers[who], *records)
        except (StaleView, NoAnswer, LedgerError):
            return
        assert in_step(self.writers[who], self.store)

    @rule(who=st.integers(0, 1), amount=st.integers(0, 8))
    def grant(self, who: int, amount: int) -> None:
        self.jobs += 1
        self.attempt(who, granted(f"job-{self.jobs}", {"a": (amount,)}))

    @rule(who=st.integers(0, 1), number=st.integers(1, 30))
    def grant_again(self, who: int, number: int) -> None:
        self.attempt(who, granted(f"job-{number}", {"a": (3,)}))

    @rule(who=st.integers(0, 1), number=st.integers(1, 30))
    def launch(self, who: int, number: int) -> None:
        self.attempt(who, launched(f"job-{number}"))

    @rule(who=st.integers(0, 1), number=st.integers(1, 30), amount=st.integers(0, 8))
    def settle(self, who: int, number: int, amount: int) -> None:
        self.attempt(who, settled(f"job-{number}", {"a": (amount,)}))

    @rule(faults=st.lists(st.sampled_from(["lost", "unheard", "late", ""]), max_size=7))
    def bad_network(self, faults: list[str]) -> None:
        self.store.faults = faults

    @rule(reads=st.integers(0, 2))
    def deaf(self, reads: int) -> None:
        self.store.deaf = reads

    @precondition(lambda self: self.store.late)
    @rule()
    def late_create_lands(self) -> None:
        self.store.deliver()

    @rule(who=st.integers(0, 1))
    def restart(self, who: int) -> None:
        self.writers[who] = writer(self.store, f"writer-{self.jobs}-{who}")
        run(self.writers[who].load())

    @invariant()
    def log_is_one_chain_within_capacity(self) -> None:
        state = fold(run(self.store.entries()))
        assert state.sequence == len(self.store.log)
        assert state.accounts["a"].spending.total[0] <= CAPACITY

    @invariant()
    def no_grant_is_committed_twice(self) -> None:
        grants = [
            record["granted"]["job"]["uid"]
            for manifest in self.store.log.values()
            for record in manifest["spec"]["records"]
            if "granted" in record
        ]
        assert len(grants) == len(set(grants))

    @invariant()
    def entries_never_change(self) -> None:
        now = {name: json.dumps(manifest) for name, manifest in self.store.log.items()}
        assert {name: now[name] for name in self.seen} == self.seen
        self.seen = now

    @invariant()
    def writers_know_a_beginning_of_the_log(self) -> None:
        entries = run(self.store.entries())
        for ledger in self.writers:
            assert fold(entries[: ledger.state.sequence]) == ledger.state


TestTwoWriters = TwoWriters.TestCase
TestTwoWriters.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_names_of_entries_are_dense(ledger: Ledger, store: MemoryStore) -> None:
    for number in range(3):
        append(ledger, granted(f"job-{number}", {"a": (1,)}))
    assert list(store.log) == [entry_name(number) for number in range(4)]
