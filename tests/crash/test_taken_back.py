"""A log that was taken back, as by a restored backup, freezes; put back, it goes on as before."""

from collections.abc import Iterator
from itertools import count

import pytest
from tests.builders import ABSENT, TEAM, UNITS, Object, block, job
from tests.crash.play import Director, play, summary
from tests.crash.stories import MORE
from tests.crash.wire import Fault
from tests.crash.world import World

STORY = next(story for story in MORE if story.name == "one of two rivals is stopped")
"""Somebody waits for budget all the time."""


def lengths() -> Iterator[tuple[int, int]]:
    """From how many entries on how many are taken back."""
    with World() as world:
        Director(world, STORY, {}).finish()
        total = len(world.truth.entries())
    for length in range(2, total + 1):
        for lost in {1, length - 1}:
            yield length, lost


@pytest.mark.parametrize("restarted", [True, False], ids=["restarted", "running"])
def test_nothing_is_committed_until_it_is_put_back(restarted: bool) -> None:
    calm = play(STORY)
    for length, lost in lengths():
        with World() as world:
            director = Director(world, STORY, {})
            while len(world.truth.entries()) < length:
                director.tick()
            world.take_back(lost)
            if restarted:
                world.operators[-1].kill()
                world.start_operator()
            left = world.truth.entries()
            for _ in range(3):
                director.tick()
            assert world.truth.entries() == left, (length, lost)
            if restarted:
                assert {_state(each) for each in _blocks(world)} == {"Frozen"}, (length, lost)
            world.recover()
            director.finish()
            assert summary(world) == calm.state, (length, lost)


def test_an_operator_that_did_not_see_the_lost_entry_does_not_write_another() -> None:
    with World() as world:
        world.apply(block("a", budget={"epsilon": "3", "orders": ["8"]}))
        behind = world.start_operator()
        behind.turn()
        behind.turn()
        ahead = world.start_operator()
        world.apply(_job("first"))
        ahead.turn()
        ahead.kill()
        assert len(world.truth.entries()) == 2
        world.take_back(1)
        world.apply(_job("second"))
        behind.turn()
        assert len(world.truth.entries()) == 1
        assert [_state(each) for each in _blocks(world)] == ["Frozen"]


def test_an_entry_in_a_lost_ones_place_takes_no_effect_and_is_taken_out() -> None:
    """An operator stands still at any of its calls: only the anchor knows that it is too late."""
    forks = 0
    for at in count():
        with World() as world:
            world.apply(block("a", budget={"epsilon": "3", "orders": ["8"]}))
            asleep = world.start_operator()
            asleep.turn()
            asleep.turn()
            world.apply(_job("first"))
            asleep.wire.faults[len(asleep.wire.calls) + at] = Fault.PAUSE
            asleep.turn()
            if asleep.works:
                break
            ahead = world.start_operator()
            ahead.turn()
            ahead.kill()
            world.take_back(1)
            asleep.resume()
            asleep.wire.catch_up()
            forks += world.truth.fork() is not None
            for _ in range(3):
                asleep.turn()
                world.truth.check()
            assert [_state(each) for each in _blocks(world)] == ["Frozen"], at
            world.recover()
            for _ in range(3):
                world.wait(10)
                asleep.turn()
            assert [_state(each) for each in _blocks(world)] == ["Ready"], at
            assert len(world.ledger.grants) == 1
            world.truth.check_log()
    assert forks > 0


def test_an_anchor_with_half_a_line_is_mended_and_the_log_goes_on() -> None:
    with World() as world:
        world.apply(block("a", budget={"epsilon": "3", "orders": ["8"]}))
        world.start_operator().turn()
        world.operators[-1].kill()
        (segment,) = world.anchor.glob("log-*.jsonl")
        whole = segment.read_bytes()
        segment.write_bytes(whole + b'{"metadata":{"name":"entry-0000')
        world.apply(_job("first"))
        operator = world.start_operator()
        operator.turn()
        operator.turn()
        world.truth.check_log()
        assert len(world.ledger.grants) == 1


def _job(name: str) -> Object:
    return job(
        name,
        TEAM,
        blocks={"names": ["a"]},
        privacy={"epsilon": ABSENT, "noiseMultiplier": "8"},
        training={"steps": 4, "logicalBatch": UNITS},
    )


def _blocks(world: World) -> list[Object]:
    return list(world.objects("privateblocks").values())


def _state(manifest: Object) -> str:
    state: str = manifest["status"]["state"]
    return state
