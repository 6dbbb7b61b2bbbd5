"""An operator that stood still acts on what it believed before, when another one leads already.

It stands still at each of its calls in turn, and its watches lag from then on. Its successor does
what is to be done; then it wakes. Pods start quickly, so that nothing is late by chance.
"""

from collections.abc import Callable

from tests.crash.operators import Operator
from tests.crash.stories import CORE, Stage
from tests.crash.wire import Fault
from tests.crash.world import World

ENOUGH_ROUNDS = 6
"""In so many rounds a job runs and is settled."""

LEAST_CALLS = 25


def test_what_was_given_up_meanwhile_does_not_start() -> None:
    points = _at_every_call(_given_up_meanwhile)
    assert points > LEAST_CALLS


def _given_up_meanwhile(stage: Stage, first: Operator) -> None:
    world = stage.world
    stage.delete("dpmoejobs", "train")
    second = world.start_operator()
    second.turn()
    second.wire.lagging = True
    first.resume()
    first.kill()
    _run_pods(world)
    second.turn()
    world.truth.check()
    second.wire.catch_up()
    _to_the_end(stage, second)


def test_nothing_is_given_up_that_nobody_gave_up() -> None:
    points = _at_every_call(_another_job_meanwhile)
    assert points > LEAST_CALLS


def _another_job_meanwhile(stage: Stage, first: Operator) -> None:
    world = stage.world
    world.nodes.patience = 2
    stage.job("another", "a")
    second = world.start_operator()
    second.turn()
    _run_pods(world)
    first.resume()
    first.turn()
    _run_pods(world)
    first.kill()
    world.nodes.patience = None
    _to_the_end(stage, second)
    outcomes = [grant.settled and grant.settled.outcome for grant in world.ledger.grants.values()]
    assert outcomes == ["Completed", "Completed"]


def _at_every_call(happens: Callable[[Stage, Operator], None]) -> int:
    """Let an operator stand still at its first call, at its second, and so on; how many it made."""
    at = 0
    while True:
        with World() as world:
            stage = Stage(world)
            CORE[0].opening(stage)
            first = world.start_operator({at: Fault.PAUSE})
            for _ in range(ENOUGH_ROUNDS):
                first.turn()
                _run_pods(world)
            if first.wire.faults:
                return at
            if not first.works:
                happens(stage, first)
        at += 1


def _to_the_end(stage: Stage, operator: Operator) -> None:
    for _ in range(ENOUGH_ROUNDS):
        operator.turn()
        _run_pods(stage.world)
        stage.world.truth.check()
    assert all(grant.settled for grant in stage.world.ledger.grants.values())
    stage.world.truth.check_log()


def _run_pods(world: World) -> None:
    """Time enough for a pod to be created, to start, to train and to end."""
    for _ in range(4):
        world.settle()
        world.nodes.tick()
    world.settle()
