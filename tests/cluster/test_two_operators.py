"""Two real operators in one cluster: one grants, and the log stays one chain, whatever happens.

Nothing runs the trainers here: jobs are granted and launched, and their pods wait for a node.
"""

import os
import random
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.conftest import assets
from tests.cluster.operators import LEASE_SECONDS, Arena, Gate, Operator
from tests.cluster.world import Object, World, block, namespaces

from dpmoe_operator.control.times import parse_time
from dpmoe_operator.local.stack import Stack

HOUR = 3600.0
PAUSES = 6

Start = dict[str, Any]
"""How an operator is started: arguments of `Arena.start`."""


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """An API server without operator or runner."""
    if request.param == "envtest":
        os.environ["KUBEBUILDER_ASSETS"] = str(assets())
    stack = Stack(tmp_path_factory.mktemp(f"two-{request.param}"), api=request.param)
    try:
        stack.start_api()
        stack.install()
        world = World(stack)
        world.apply(*namespaces())
        yield world
    finally:
        stack.stop()


@pytest.fixture
def arena(world: World, tmp_path: Path) -> Iterator[Arena]:
    arena = Arena(world, tmp_path)
    yield arena
    arena.close()


@pytest.fixture
def gates(world: World, tmp_path: Path) -> Iterator[tuple[Gate, Gate]]:
    first = Gate(world.stack.kubeconfig, tmp_path / "first.yaml")
    second = Gate(world.stack.kubeconfig, tmp_path / "second.yaml")
    yield first, second
    first.end()
    second.end()


def start_pair(arena: Arena, first: Start, second: Start) -> tuple[Operator, Operator]:
    """An operator that leads, and another that waits."""
    leader = arena.start(**first)
    arena.until(lambda: arena.leads(leader), "the first operator leads")
    other = arena.start(**second)
    arena.until(lambda: "waiting" in other.log, "the second one waits")
    return leader, other


def jobs(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def writers(arena: Arena) -> list[str]:
    return [entry["spec"]["writer"] for entry in arena.entries()]


def test_of_two_that_live_one_grants_and_never_more_than_there_is(arena: Arena) -> None:
    arena.world.apply(block(budget={"epsilon": "3", "delta": "1e-5"}))
    operators = [arena.start(lease_seconds=10), arena.start(lease_seconds=10)]
    for batch in range(3):
        arena.ask(*jobs(f"many-{batch}", 12), epsilon="1")
    arena.until(lambda: len(arena.states()) == 36 and all(arena.states()), "all are decided")
    [leader] = [operator for operator in operators if "leading as" in operator.log]
    assert arena.leads(leader)
    assert all(leader.is_named(writer) for writer in writers(arena))
    assert 0 < len(arena.granted()) < 36
    arena.check()


def test_stopped_leader_is_replaced_and_wakes_as_one_that_waits(arena: Arena) -> None:
    arena.world.apply(block())
    leader, other = start_pair(arena, {}, {})
    arena.ask(*jobs("before", 2))
    arena.until_granted(*jobs("before", 2))
    arena.until_quiet()
    with leader.stopped():
        arena.until(lambda: arena.leads(other), "the other takes over")
        arena.ask(*jobs("meanwhile", 2))
        arena.until_granted(*jobs("meanwhile", 2))
    arena.ask(*jobs("after", 2))
    arena.until(lambda: "lost the lease" in leader.log, "the first one knows")
    arena.until_granted(*jobs("after", 2))
    assert arena.leads(other)
    turns = [writer for writer, _ in groupby(writers(arena))]
    assert [leader.is_named(writer) for writer in turns] == [True, False]

    other.kill()
    arena.ask(*jobs("last", 2))
    arena.until_granted(*jobs("last", 2))
    assert leader.is_named(writers(arena)[-1])
    arena.check()


def test_next_container_of_a_killed_operator_does_not_wait_for_its_lease(arena: Arena) -> None:
    arena.world.apply(block())
    pod: Start = {"lease_seconds": 600, "pod_uid": "0f6e1d5c-94a5-4bfb-8d0d-0b7c8e7a1111"}
    first = arena.start(**pod)
    arena.until(lambda: arena.leads(first), "the first container leads")
    first.kill()
    second = arena.start(**pod)
    arena.ask("after")
    arena.until_granted("after")
    assert arena.leads(second)


def test_entry_of_a_stopped_leader_that_arrives_too_late_is_refused(
    arena: Arena, gates: tuple[Gate, Gate]
) -> None:
    arena.world.apply(block())
    gate, _ = gates
    leader, other = start_pair(arena, {"kubeconfig": gate.kubeconfig}, {})
    arena.until(lambda: arena.records("accountOpened"), "the account is open")
    gate.close()
    arena.ask(*jobs("contested", 2))
    assert gate.arrived.wait(20), "the leader grants"
    with leader.stopped():
        arena.until_granted(*jobs("contested", 2))
        assert gate.open() == 409
    arena.until(lambda: "was written by another operator" in leader.log, "it hears of it")
    arena.ask("after")
    arena.until_granted("after")
    assert arena.leads(other)
    turns = [writer for writer, _ in groupby(writers(arena))]
    assert [leader.is_named(writer) for writer in turns] == [True, False]

    other.kill()
    arena.ask("last")
    arena.until_granted("last")
    assert len(arena.check().grants) == 4


def test_entry_of_a_stopped_leader_that_arrives_just_in_time_counts(
    arena: Arena, gates: tuple[Gate, Gate]
) -> None:
    """The next leader has read the log and decided, and is refused: it launches those grants."""
    arena.world.apply(block())
    first, second = gates
    leader, other = start_pair(
        arena, {"kubeconfig": first.kubeconfig}, {"kubeconfig": second.kubeconfig}
    )
    arena.until(lambda: arena.records("accountOpened"), "the account is open")
    first.close()
    second.close()
    arena.ask(*jobs("contested", 2))
    assert first.arrived.wait(20), "the leader grants"
    with leader.stopped():
        assert second.arrived.wait(20), "so does the next one, since nothing is in the log yet"
        assert first.open() == 201
        assert second.open() == 409
        arena.until(lambda: len(arena.records("launched")) == 2, "the grants are launched")
    by = {e["spec"]["writer"]: set().union(*e["spec"]["records"]) for e in arena.entries()}
    [granting] = [writer for writer, kinds in by.items() if "granted" in kinds]
    [launching] = [writer for writer, kinds in by.items() if "launched" in kinds]
    assert leader.is_named(granting)
    assert other.is_named(launching)
    arena.ask("after")
    arena.until_granted("after")
    assert len(arena.check().grants) == 3


def test_log_stays_one_chain_wherever_operators_are_stopped(arena: Arena) -> None:
    chance = random.Random(7)
    arena.world.apply(block())
    pair = start_pair(arena, {}, {})
    for pause in range(PAUSES):
        arena.ask(*jobs(f"pause-{pause}", 2))
        time.sleep(chance.uniform(0, 0.3))
        leader = next((each for each in pair if arena.leads(each)), pair[0])
        with leader.stopped():
            time.sleep(chance.choice([0.2, LEASE_SECONDS + 0.5]))
    arena.until_granted(*(name for pause in range(PAUSES) for name in jobs(f"pause-{pause}", 2)))
    assert len(arena.check().grants) == 2 * PAUSES


@pytest.mark.parametrize("skew", [HOUR, -HOUR])
def test_clocks_two_hours_apart_change_nothing(arena: Arena, skew: float) -> None:
    """The log's times run backwards when the leader changes, and only unlocking rests on them.

    A clock that is ahead of the one that opened the account unlocks too early, one that is behind
    too late: fairness suffers, the budget does not.
    """
    timed = {"kind": "time", "lifetimeSeconds": 600}
    dataset = block()["spec"]["dataset"]
    dataset = dataset | {"claim": {"claimName": "notes", "path": "timed.jsonl"}}
    arena.world.apply(block(), block("timed", dataset=dataset, unlocking=timed))
    leader, other = start_pair(arena, {"skew": skew}, {"skew": -skew})
    arena.ask("first")
    arena.until_granted("first")
    arena.until_quiet()
    with leader.stopped():
        arena.until(lambda: arena.leads(other), "the other takes over")
        arena.ask(*jobs("timed", 3), of="timed", epsilon="3")
        arena.ask("second")
        arena.until_granted("second")
        assert ("timed-0" in arena.granted()) == (skew < 0)
        assert arena.leads(other)
    other.stop()
    arena.ask("third")
    arena.until_granted("third")
    arena.check()

    def error(entry: Object) -> float:
        created = parse_time(entry["metadata"]["creationTimestamp"])
        return (parse_time(entry["spec"]["time"]) - created).total_seconds()

    turns = [round(error(entry) / HOUR) * HOUR for entry in arena.entries()]
    assert [turn for turn, _ in groupby(turns)] == [skew, -skew, skew]
