"""An operator that stood still acts on what it believed before, when another one leads already.

It stands still at each of its writes in turn. Meanwhile the job is deleted, and its successor, whose
watches lag, gives the job up. Then it wakes and ends its round, and nodes are quick to start pods.
"""

import pytest
from tests.crash.play import play
from tests.crash.stories import CORE, Stage
from tests.crash.wire import Fault
from tests.crash.world import World

STORY = CORE[0]


@pytest.mark.parametrize("rounds", [1, 2], ids=["before it is settled", "afterwards"])
def test_what_was_given_up_meanwhile_does_not_start(rounds: int) -> None:
    calls = play(STORY).calls
    for at in (number for number, call in enumerate(calls) if Fault.PAUSE.fits(call)):
        if calls[at].writes:
            _wake_too_late(at, rounds)


def _wake_too_late(at: int, rounds: int) -> None:
    with World() as world:
        stage = Stage(world)
        STORY.opening(stage)
        first = world.start_operator({at: Fault.PAUSE})
        while first.works:
            first.turn()
            _run_pods(world)
        stage.delete("dpmoejobs", "train")
        second = world.start_operator()
        second.turn()
        second.wire.lagging = True
        for _ in range(rounds - 1):
            second.turn()
        first.resume()
        first.kill()
        _run_pods(world)
        second.turn()
        world.truth.check()
        second.wire.catch_up()
        while not all(grant.settled for grant in world.ledger.grants.values()):
            second.turn()
            _run_pods(world)
            world.truth.check()
        world.truth.check_log()


def _run_pods(world: World) -> None:
    """Time enough for a pod to be created, to start, and to take a step."""
    for _ in range(3):
        world.settle()
        world.nodes.tick()
    world.settle()
