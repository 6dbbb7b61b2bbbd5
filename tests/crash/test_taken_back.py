"""A log that was taken back, as by a restored backup, freezes; put back, it goes on as before."""

from collections.abc import Iterator

import pytest
from tests.builders import ABSENT, TEAM, UNITS, Object, block, job
from tests.crash.play import Director, play, summary
from tests.crash.stories import MORE
from tests.crash.world import World

STORY = next(story for story in MORE if story.name == "one of two rivals is stopped")
"""Somebody waits for budget all the time."""


def lengths() -> Iterator[tuple[int, int]]:
    """From how many entries on how many are taken back."""
    with World() as world:
        Director(world, STORY, {}).finish()
        total = len(world.truth.entries())
    for length in range(2, total + 1):
        for count in {1, length - 1}:
            yield length, count


@pytest.mark.parametrize("restarted", [True, False], ids=["restarted", "running"])
def test_nothing_is_committed_until_it_is_put_back(restarted: bool) -> None:
    calm = play(STORY)
    for length, count in lengths():
        with World() as world:
            director = Director(world, STORY, {})
            while len(world.truth.entries()) < length:
                director.tick()
            world.take_back(count)
            if restarted:
                world.operators[-1].kill()
                world.start_operator()
            left = world.truth.entries()
            for _ in range(3):
                director.tick()
            assert world.truth.entries() == left, (length, count)
            if restarted:
                assert {_state(each) for each in _blocks(world)} == {"Frozen"}, (length, count)
            world.recover()
            director.finish()
            assert summary(world) == calm.state, (length, count)


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
