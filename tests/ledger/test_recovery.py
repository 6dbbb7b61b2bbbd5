"""A log that was taken back: found on start, put back from the anchor, never granted on before."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.builders import NOW, MemoryStore, granted, opened, settled, wrapped

from dpmoe_operator.ledger import log
from dpmoe_operator.ledger.anchor import Anchor, AnchorError
from dpmoe_operator.ledger.entry import LedgerError, Unverified
from dpmoe_operator.ledger.fold import fold
from dpmoe_operator.ledger.log import Ledger, NoAnswer, format_time
from dpmoe_operator.ledger.recovery import reanchor, recover
from dpmoe_operator.ledger.verification import verify

NAMESPACE = "dpmoe-system"


class House:
    """A store, an anchor's volume, and operators that come and go."""

    def __init__(self, folder: Path) -> None:
        self.store, self.anchor, self.now = MemoryStore(), Anchor(folder), NOW
        self.made = 0

    async def operator(self) -> Ledger:
        ledger = Ledger(self.store, namespace=NAMESPACE, writer="test", anchor=self.anchor)
        await ledger.load()
        return ledger

    async def commit(self, ledger: Ledger, *records: Any) -> None:
        await ledger.append([wrapped(record) for record in records], time=format_time(self.now))
        await ledger.secure()

    async def jobs(self, ledger: Ledger, count: int) -> None:
        """Grant and settle some jobs, as far as the ledger is concerned, and tidy after each."""
        for _ in range(count):
            self.made += 1
            await self.commit(ledger, granted(f"job-{self.made}", {"a": (2,)}))
            await self.commit(ledger, settled(f"job-{self.made}", {"a": (1,)}))
            self.now += timedelta(minutes=10)
            await ledger.tidy(self.now, set())

    async def recover(self, drop: str | None = None) -> list[str]:
        return await recover(self.store, self.anchor, NAMESPACE, drop)


@pytest.fixture
async def house(tmp_path: Path) -> House:
    """A ledger with one account and three grants."""
    house = House(tmp_path)
    ledger = await house.operator()
    await house.commit(ledger, opened("a", (1000,)))
    await house.jobs(ledger, 3)
    return house


async def refused(house: House, reason: str) -> str:
    with pytest.raises(Unverified) as error:
        await house.operator()
    assert error.value.reason == reason
    return str(error.value)


def sequences(house: House) -> list[int]:
    return [entry["spec"]["sequence"] for _, entry in sorted(house.store.log.items())]


async def test_a_rolled_back_log_is_found_and_put_back(house: House) -> None:
    whole = dict(house.store.log)
    for name in sorted(whole)[4:]:
        del house.store.log[name]
    text = await refused(house, "RolledBack")
    assert "entry-000000000006 was in it" in text
    assert "dpmoe ledger recover" in text
    assert await house.recover() == sorted(whole)[4:]
    assert house.store.log == whole
    assert await house.recover() == []
    ledger = await house.operator()
    assert ledger.state.accounts["a"].spending.consumed == (3,)


async def test_a_log_that_was_lost_whole(house: House) -> None:
    whole = dict(house.store.log)
    house.store.log.clear()
    assert "is empty" in await refused(house, "RolledBack")
    await house.recover()
    assert house.store.log == whole


async def test_a_hole_in_the_log(house: House) -> None:
    whole = dict(house.store.log)
    del house.store.log["entry-000000000003"]
    await refused(house, "ChainBroken")
    assert await house.recover() == ["entry-000000000003"]
    assert house.store.log == whole


async def test_taken_back_under_a_living_operator(house: House) -> None:
    """It would write behind the entry that it wrote last, and that is not there any more."""
    ledger = await house.operator()
    for name in sorted(house.store.log)[4:]:
        del house.store.log[name]
    before = dict(house.store.log)
    with pytest.raises(LedgerError) as error:
        await house.commit(ledger, granted("late", {"a": (1,)}))
    assert error.value.reason == "RolledBack"
    with pytest.raises(LedgerError):
        await ledger.load()
    assert house.store.log == before
    await house.recover()
    await ledger.load()
    await house.commit(ledger, granted("late", {"a": (1,)}))


async def test_crash_between_entry_and_anchor(house: House) -> None:
    ledger = await house.operator()
    await ledger.append([wrapped(granted("unseen", {"a": (1,)}))], time=format_time(house.now))
    before = house.anchor.head()
    again = await house.operator()
    assert "unseen" in again.state.grants
    after = house.anchor.head()
    assert before is not None
    assert after is not None
    assert (after.sequence, after.digest) == (before.sequence + 1, again.state.head)


async def test_nothing_takes_effect_on_a_volume_that_refuses(house: House) -> None:
    ledger = await house.operator()
    await ledger.append([wrapped(granted("job", {"a": (1,)}))], time=format_time(house.now))
    hidden = house.anchor.folder.rename(house.anchor.folder.with_name("away"))
    for attempt in (ledger.secure, ledger.load):
        with pytest.raises(AnchorError) as error:
            await attempt()
        assert error.value.reason == "AnchorUnusable"
    with pytest.raises(AnchorError):
        await house.commit(ledger, granted("another", {"a": (1,)}))
    hidden.rename(house.anchor.folder)
    await ledger.load()
    assert "job" in ledger.state.grants
    assert "another" not in ledger.state.grants
    head = house.anchor.head()
    assert head is not None
    assert head.digest == ledger.state.head


async def test_lost_anchor_is_never_replaced_silently(house: House) -> None:
    for path in house.anchor.folder.iterdir():
        path.unlink()
    assert "reanchor" in await refused(house, "AnchorLost")
    assert house.anchor.head() is None
    head = house.store.log["entry-000000000006"]["spec"]["digest"]
    for wrong in ("", "0" * 64, head[:4]):
        with pytest.raises(LedgerError, match="ends the log with digest"):
            await reanchor(house.store, house.anchor, wrong, house.now)
    assert await reanchor(house.store, house.anchor, head[:16], house.now) == 7
    await house.operator()


async def test_reanchor_refuses_a_log_that_does_not_hold(house: House) -> None:
    del house.store.log["entry-000000000003"]
    head = house.store.log["entry-000000000006"]["spec"]["digest"]
    with pytest.raises(LedgerError, match="entry-000000000003"):
        await reanchor(house.store, house.anchor, head, house.now)


async def test_another_log_in_the_anchors_place(house: House, tmp_path: Path) -> None:
    other = House(tmp_path)
    with pytest.raises(AnchorError):
        await other.operator()
    fresh = Ledger(other.store, namespace=NAMESPACE, writer="other")
    await other.commit(fresh, opened("b", (5,)))
    await other.jobs(fresh, 0)
    for _ in range(6):
        other.made += 1
        await other.commit(fresh, granted(f"other-{other.made}", {"b": (0,)}))
    assert "disagree about entry-000000000006" in await refused(other, "AnchorForked")
    foreign = other.store.log["entry-000000000000"]["spec"]["digest"]
    for drop in (None, foreign):
        with pytest.raises(LedgerError, match="put this log's own volume in place"):
            await other.recover(drop)


class HeldUp(MemoryStore):
    """The same log, for a writer that stands still before each create."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__()
        self.log = store.log
        self.reached, self.gate = asyncio.Event(), asyncio.Event()

    async def create(self, manifest: Mapping[str, Any]) -> None:
        self.reached.set()
        await self.gate.wait()
        await super().create(manifest)


class Fork:
    """A writer stood still while others went on and the log was taken back; now its entry is in.

    Attributes:
        whole: the log before it was taken back.
        writer: who stood still.
        digest: that of its entry.
    """

    def __init__(self, house: House) -> None:
        self.house = house

    async def happen(self) -> None:
        house, log = self.house, self.house.store.log
        store = HeldUp(house.store)
        self.writer = Ledger(store, namespace=NAMESPACE, writer="late", anchor=house.anchor)
        await self.writer.load()
        records = [wrapped(granted("late", {"a": (2,)}))]
        late = asyncio.create_task(self.writer.append(records, time=format_time(house.now)))
        await store.reached.wait()
        await house.jobs(await house.operator(), 2)
        self.whole = dict(log)
        for name in sorted(log)[7:]:
            del log[name]
        store.gate.set()
        await late
        self.digest = log["entry-000000000007"]["spec"]["digest"]


async def test_an_entry_in_a_lost_ones_place_is_taken_out_by_its_digest(house: House) -> None:
    fork = Fork(house)
    await fork.happen()
    await refused(house, "RolledBack")
    assert "disagree about entry-000000000007" in str(await raised(fork.writer.secure()))
    said = str(await raised(house.recover()))
    assert said.startswith("entry-000000000007: is another in the log")
    assert fork.digest[:16] in said
    assert "--drop" in said
    for wrong in ("", fork.digest[:7], fork.whole["entry-000000000007"]["spec"]["digest"]):
        assert "does not name it" in str(await raised(house.recover(wrong)))
        assert sequences(house) == list(range(8))
    assert await house.recover(fork.digest[:8]) == sorted(fork.whole)[7:]
    assert house.store.log == fork.whole
    assert await house.recover(fork.digest) == [], "nothing is left to take out"
    await fork.writer.load()
    assert "late" not in fork.writer.state.grants


async def test_taking_out_that_is_cut_short_is_repeated(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = Fork(house)
    await fork.happen()
    late = Ledger(house.store, namespace=NAMESPACE, writer="late")
    await late.load()
    await late.append([wrapped(granted("later", {"a": (2,)}))], time=format_time(house.now))
    for cut in ("remove", "create"):
        with monkeypatch.context() as network:
            network.setattr(house.store, cut, refuse_second_call(getattr(house.store, cut)))
            assert isinstance(await raised(house.recover(fork.digest)), NoAnswer)
        assert house.store.log != fork.whole
    await house.recover(fork.digest)
    assert house.store.log == fork.whole


async def raised(attempt: Awaitable[Any]) -> Exception:
    with pytest.raises((Unverified, NoAnswer)) as error:
        await attempt
    return error.value


def refuse_second_call(call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """As a connection that breaks after the first of several calls."""
    calls = 0

    async def cut(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise NoAnswer("cut")
        await call(*arguments)

    return cut


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint behind every tenth entry."""
    monkeypatch.setattr(log, "CHECKPOINT_ENTRIES", 10)


@pytest.mark.usefixtures("small")
async def test_old_entries_move_to_the_archive(house: House) -> None:
    ledger = await house.operator()
    await house.jobs(ledger, 30)
    kept = sequences(house)
    assert len(kept) < 30
    assert kept == list(range(kept[0], ledger.state.sequence))
    archived = list(house.anchor.entries())
    assert [m["spec"]["sequence"] for m in archived] == list(range(ledger.state.sequence))
    assert fold(archived) == ledger.state
    again = await house.operator()
    assert again.state == ledger.state
    assert again.state.accounts["a"].spending.consumed == (33,)
    await house.jobs(again, 10)
    assert len(sequences(house)) < 30
    end = verify([house.store.log[name] for name in sorted(house.store.log)])
    assert end.state == again.state
    assert end.trusted == end.first > 0


@pytest.mark.usefixtures("small")
async def test_nothing_is_removed_that_the_archive_does_not_hold(house: House) -> None:
    ledger = await house.operator()
    segment = house.anchor.folder / "log-000000000000.jsonl"
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([lines[0], lines[1].replace(b'"test"', b'"tost"'), *lines[2:]]))
    with pytest.raises(AnchorError) as error:
        await house.jobs(ledger, 30)
    assert error.value.reason == "AnchorDamaged"
    assert sequences(house)[0] == 0


@pytest.mark.usefixtures("small")
async def test_interrupted_removal_goes_on(house: House) -> None:
    ledger = await house.operator()
    remove, left = house.store.remove, 3

    async def interrupted(name: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError
        await remove(name)

    house.store.remove = interrupted  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await house.jobs(ledger, 30)
    assert sequences(house)[0] == 3
    house.store.remove = remove  # type: ignore[method-assign]
    again = await house.operator()
    await house.jobs(again, 1)
    assert sequences(house)[0] > 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("left", [0, 3, 12])
async def test_restore_of_a_backup_from_before_the_archive(house: House, left: int) -> None:
    """Entries that were archived since come back with it, and what is between is put back too."""
    backup = dict(house.store.log)
    ledger = await house.operator()
    await house.jobs(ledger, 30)
    expected = ledger.state
    house.store.log = {name: backup[name] for name in sorted(backup)[:left]}
    await refused(house, "RolledBack")
    await house.recover()
    again = await house.operator()
    assert again.state == expected
    await house.jobs(again, 1)
    assert len(sequences(house)) < 40


async def test_without_an_anchor_the_log_only_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "CHECKPOINT_ENTRIES", 10)
    store = MemoryStore()
    ledger = Ledger(store, namespace=NAMESPACE, writer="test", anchor=None)
    await ledger.load()
    await ledger.append([wrapped(opened("a", (1000,)))], time=format_time(NOW))
    for number in range(40):
        await ledger.append([wrapped(granted(f"j{number}", {"a": (1,)}))], time=format_time(NOW))
        await ledger.tidy(NOW, set())
    assert len(store.log) == ledger.state.sequence > 41
    again = Ledger(store, namespace=NAMESPACE, writer="test", anchor=None)
    await again.load()
    assert again.state == ledger.state
