"""The round loop's own life: it ends when told to, and does no harm once another operator leads."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.builders import (
    SETTINGS,
    MemoryStore,
    block,
    commit,
    granted,
    job,
    launched,
    opened,
)
from tests.control.workloads import workload

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import Conflict, Forbidden
from dpmoe_operator.kube.lease import Leadership
from dpmoe_operator.kube.loop import RoundLoop
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.ledger.log import Ledger


class Served:
    """A watch that has nothing to wait for."""

    async def follow(self, _namespaces: Any) -> dict[str, str]:
        return {}

    async def restart(self) -> None:
        return


class Refusing:
    """A client whose writes all meet a conflict.

    Attributes:
        asked: what it was asked for.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def refuse(resource: Any, _namespace: str, name: Any, *_: Any, **__: Any) -> None:
            title = name if isinstance(name, str) else name["metadata"].get("name", "")
            self.asked.append((f"{method} {resource.plural}", title))
            raise Conflict(409, "Conflict", "it has changed")

        return refuse

    def asked_for_jobs(self) -> list[tuple[str, str]]:
        """What was asked about Kubernetes Jobs."""
        return [each for each in self.asked if each[0].endswith(" jobs")]


class World:
    """A loop with everything around it.

    Attributes:
        seen: called when the loop lists everything anew.
    """

    def __init__(self) -> None:
        self.picture = Picture()
        self.client = Refusing()
        self.store = MemoryStore()
        self.truth = LedgerState()
        self.lease = SimpleNamespace(held=True, wait=asyncio.Event().wait)
        self.seen: Callable[[], None] = lambda: None
        self.loop = RoundLoop(
            client=cast(KubeClient, self.client),
            picture=self.picture,
            ledger=Ledger(self.store, namespace="dpmoe-system", writer="test"),
            leadership=cast(Leadership, self.lease),
            resync=self._resync,
            watch=cast(WorkloadWatch, Served()),
            settings=SETTINGS,
            identity="test",
            round_seconds=3600,
        )

    async def _resync(self) -> None:
        self.seen()

    def another_operator_writes(self, *records: Any) -> None:
        """An entry that this operator did not write."""
        manifest = commit(self.truth, *records)
        self.store.log[manifest["metadata"]["name"]] = manifest

    async def run(self, seconds: float = 0.5) -> None:
        """Let the loop run for a while: some rounds, and then it waits."""
        task = asyncio.create_task(self.loop.run())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


@pytest.fixture
def world() -> World:
    return World()


async def test_a_change_in_the_moment_of_the_end_does_not_keep_it_alive(world: World) -> None:
    task = asyncio.create_task(world.loop.run())
    await asyncio.sleep(0.3)  # The first round is over, and the loop waits.
    world.picture.changed.set()
    await asyncio.sleep(0)  # The event is on its way to the loop, which has not seen it yet.
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert task.cancelled()


async def test_job_that_only_the_ledger_knows_yet_is_looked_up_before_it_counts_as_deleted(
    world: World,
) -> None:
    """A new leader's watches may be slower than the log of the old one."""
    world.another_operator_writes(opened(), granted("job-1"), launched("job-1"))

    def see() -> None:
        assert world.loop._ledger.state.sequence == 1, "the look comes after the ledger"
        world.picture.put_job(job(uid="job-1"))
        world.picture.on_workload("ADDED", workload("job-1"))

    world.seen = see
    await world.run()
    assert len(world.store.log) == 1, "it was neither settled"
    assert world.client.asked_for_jobs() == [], "nor stopped"


async def test_job_that_another_operator_just_granted_does_not_look_like_an_orphan(
    world: World,
) -> None:
    """Its Job is seen at once, its grant only when somebody reads the log again."""

    def see() -> None:
        if world.truth.sequence == 0:
            world.another_operator_writes(opened(), granted("job-1"), launched("job-1"))
        else:
            world.picture.put_job(job(uid="job-1"))
        world.picture.on_workload("ADDED", workload("job-1"))

    world.seen = see
    await world.run()
    assert world.client.asked_for_jobs() == []
    assert len(world.store.log) == 1


async def test_job_without_a_grant_is_removed(world: World) -> None:
    world.picture.on_workload("ADDED", workload("job-1"))
    await world.run()
    assert world.client.asked_for_jobs()[0][0] == "delete jobs"


async def test_who_loses_the_lease_before_the_action_leaves_it_to_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(_self: Ledger) -> None:
        world.lease.held = False

    monkeypatch.setattr(Ledger, "confirm", lose)
    world.picture.on_workload("ADDED", workload("job-1"))
    await world.run()
    assert world.client.asked == []


@pytest.mark.parametrize("held", [True, False])
async def test_who_loses_the_lease_before_the_commit_does_not_commit(
    world: World, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    async def follow(_self: Served, _namespaces: Any) -> dict[str, str]:
        world.lease.held = held
        return {}

    monkeypatch.setattr(Served, "follow", follow)
    world.picture.put_block(block())
    await world.run()
    assert len(world.store.log) == int(held), "the account is opened by who leads"


async def test_entry_of_another_operator_makes_the_loop_look_again(world: World) -> None:
    """A refused append brings its entry into the ledger, but not its objects into the picture."""
    looks: list[int] = []

    def see() -> None:
        looks.append(world.truth.sequence)
        if len(looks) == 1:
            world.another_operator_writes(opened(), granted("job-1"), launched("job-1"))
            world.picture.put_block(block())
        else:
            world.picture.put_job(job(uid="job-1"))
            world.picture.on_workload("ADDED", workload("job-1"))

    world.seen = see
    await world.run()
    assert looks == [0, 1]
    assert len(world.store.log) == 2, "and then it opens its account"
    assert world.client.asked_for_jobs() == []


async def test_ended_job_in_a_forbidden_namespace_stalls_no_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> None:
        raise Forbidden(403, "Forbidden", "pods is forbidden")

    monkeypatch.setattr(world.client, "list", refuse, raising=False)
    world.another_operator_writes(opened(), granted("job-1"), launched("job-1"))

    def see() -> None:
        world.picture.put_job(job(uid="job-1"))
        world.picture.on_workload("ADDED", workload("job-1", conditions={"Failed": "Deadline"}))

    world.seen = see
    before = world.loop.last_round
    await world.run()
    assert world.loop.last_round > before
    assert len(world.store.log) == 1, "and it is not settled"
