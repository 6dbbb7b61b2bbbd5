"""Plays a story to its end, with a fault at a chosen call, and tells how it ended."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.crash.operators import Operator
from tests.crash.server import Call
from tests.crash.stories import Stage, Story
from tests.crash.wire import Fault
from tests.crash.world import OWNED, World

from dpmoe_operator.launch.launching import JOB_NAME
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.local.apiserver.resources import JOBS, PODS

MAX_TICKS = 60
TICK_SECONDS = 2.0
"""Longer than a client waits before it follows again after its watch broke once."""

LAUNCHED = (JOBS.storage, PODS.storage, *OWNED)


@dataclass(frozen=True)
class Ending:
    """How a story ended.

    Attributes:
        calls: of the first operator process.
        met: whether its fault came to happen.
        lost: names of the jobs whose last word went before a new operator could read it.
        complaints: what was logged as an error.
        state: everything that must not depend on the fault.
    """

    calls: list[Call]
    met: bool
    lost: set[str]
    complaints: list[str]
    state: Mapping[str, Any]


def play(story: Story, fault: Fault | None = None, at: int = 0) -> Ending:
    """Play a story; the first operator meets a fault at one of its calls.

    Args:
        story: what happens.
        fault: what goes wrong, if anything.
        at: number of the call at which it does, from 0.
    """
    with World(**story.settings) as world:
        faults = {at: fault} if fault is not None else {}
        director = Director(world, story, faults, patience=at % 3)
        director.finish()
        return Ending(
            calls=world.operators[0].wire.calls,
            met=not world.operators[0].wire.faults,
            lost={world.ledger.grants[uid].granted.job.name for uid in world.unheard},
            complaints=world.complaints.lines,
            state=summary(world),
        )


class Director:
    """Lets operators, people and nodes act in turn until nothing moves any more."""

    def __init__(
        self, world: World, story: Story, faults: Mapping[int, Fault], patience: int = 0
    ) -> None:
        """Set the stage and start the first operator.

        Args:
            world: where it is played.
            story: what is played.
            faults: what the first operator meets, by the number of the call.
            patience: rounds of its successor, until what it left undone catches up with that one.
        """
        self._world, self._stage = world, Stage(world)
        self._left = list(story.turns)
        self._patience = patience
        story.opening(self._stage)
        world.start_operator(faults)

    def finish(self) -> None:
        """Play to the end, and look whether it is one."""
        for _ in range(MAX_TICKS):
            before = self._world.activity
            self.tick()
            if self._world.activity == before and not self._left and not self._undone():
                self._world.truth.check_log()
                self._world.truth.check_statuses(
                    self._world.objects("privateblocks"), self._world.objects("dpmoejobs")
                )
                return
        raise AssertionError(f"never quiet; {len(self._left)} turns of the story are left")

    def tick(self) -> None:
        """Everybody acts once."""
        self._operate()
        self._act()
        self._world.nodes.tick()
        self._world.wait(TICK_SECONDS)
        self._world.truth.check()

    def _operate(self) -> None:
        """The operator in charge does a round; one that died or stands still is replaced."""
        world = self._world
        world.operators[-1].turn()
        if not world.operators[-1].works:
            world.start_operator()
        elif self._undone():
            self._patience -= 1
            if self._patience < 0:
                self._catch_up()

    def _undone(self) -> bool:
        """Whether an operator of before left something that may still come."""
        wires = [operator.wire for operator in self._world.operators]
        return any(wire.in_flight or wire.paused.is_set() for wire in wires)

    def _catch_up(self) -> None:
        self._world.arrive_late()
        for operator in filter(_stands_still, self._world.operators):
            operator.resume()
            operator.turn()
            operator.kill()

    def _act(self) -> None:
        if self._left:
            when, do = self._left[0]
            if when(self._stage):
                do(self._stage)
                self._left.pop(0)
                self._world.settle()


def _stands_still(operator: Operator) -> bool:
    return operator.alive and not operator.works


def summary(world: World) -> dict[str, Any]:
    """What must not depend on where an operator died: no times, no entries' names, no uids."""
    ledger = world.ledger
    return {
        "accounts": {name: account.spending for name, account in ledger.accounts.items()},
        "grants": {
            grant.granted.job.name: (grant.launched is not None, _bare(grant))
            for grant in ledger.grants.values()
        },
        "statuses": {
            f"{plural}/{obj['metadata']['name']}": _timeless(obj["status"])
            for plural in ("privateblocks", "dpmoejobs")
            for obj in world.objects(plural).values()
        },
        "steps": sorted(world.nodes.steps.values()),
        "left": sorted(
            (key[1], stored.object["metadata"]["labels"][JOB_NAME])
            for key in LAUNCHED
            for stored in world.cluster.store.scan(key)
        ),
    }


def _bare(grant: Grant) -> Grant:
    """A grant without what depends on when it was written, and by which words."""
    settled = grant.settled and grant.settled.model_copy(update={"message": ""})
    return Grant(grant.granted, entry="", time="", settled=settled)


_CHANGING = re.compile(r"entry-\d+|\d{4}-\d\d-\d\dT[\d:.]+Z")


def _timeless(status: Any) -> Any:
    if isinstance(status, dict):
        return {key: _timeless(value) for key, value in status.items()}
    if isinstance(status, list):
        return [_timeless(value) for value in status]
    return _CHANGING.sub("…", status) if isinstance(status, str) else status
