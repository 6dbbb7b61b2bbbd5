"""Wherever an operator dies, the next one brings every story to the end that it would have had.

Each story is played once undisturbed, which says which calls its operator makes, reads and the
anchor's appends included. Then it is played again for each of them, and something happens there.
"""

import pytest
from tests.crash.play import Ending, play
from tests.crash.server import Call
from tests.crash.stories import CORE, MORE, Story
from tests.crash.wire import Fault

CRASHES = (Fault.KILL_BEFORE, Fault.KILL_AFTER)
OTHERS = tuple(fault for fault in Fault if fault not in CRASHES)
LEAST_CRASH_POINTS = 500


@pytest.mark.parametrize("story", CORE, ids=lambda story: story.name)
def test_killed_at_any_call_it_ends_as_if_nothing_had_happened(story: Story) -> None:
    calm = play(story)
    for at in range(len(calm.calls)):
        for fault in CRASHES:
            check_same(story, calm, fault, at)


@pytest.mark.parametrize("story", CORE, ids=lambda story: story.name)
def test_other_faults_change_nothing_either(story: Story) -> None:
    calm = play(story)
    for turn, at in enumerate(_writes(calm)[::2]):
        check_same(story, calm, _in_turn(OTHERS, calm.calls[at], turn), at)


@pytest.mark.parametrize("story", MORE, ids=lambda story: story.name)
def test_any_fault_at_any_write_of_other_stories_changes_nothing(story: Story) -> None:
    calm = play(story)
    for turn, at in enumerate(_writes(calm)):
        check_same(story, calm, _in_turn(tuple(Fault), calm.calls[at], turn), at)


def test_there_are_enough_points_at_which_it_is_killed() -> None:
    points = sum(len(play(story).calls) * len(CRASHES) for story in CORE)
    assert points >= LEAST_CRASH_POINTS


def _writes(calm: Ending) -> list[int]:
    """Numbers of the calls that change something."""
    return [at for at, call in enumerate(calm.calls) if call.writes]


def _in_turn(faults: tuple[Fault, ...], call: Call, turn: int) -> Fault:
    """Another one of the faults from call to call, of those that make sense there."""
    allowed = [fault for fault in faults if fault.fits(call)]
    return allowed[turn % len(allowed)]


def check_same(story: Story, calm: Ending, fault: Fault, at: int) -> None:
    """The end is that of the undisturbed story, but for what could not be known any more.

    A pod that was stopped goes with its report. If the operator that heard it dies before the
    settlement is in the log, or none was there, nothing is proven and the whole plan is charged.
    """
    ending = play(story, fault, at)
    where = f"{fault.value}, at call {at}: {calm.calls[at]}"
    assert ending.met, where
    if fault.kills:
        assert ending.complaints == [], where
    if not ending.lost:
        assert ending.state == calm.state, where
        return
    for name, (launched, grant) in ending.state["grants"].items():
        if name not in ending.lost or grant.settled.outcome != "ReportMissing":
            assert (launched, grant) == calm.state["grants"][name], where
        else:
            assert grant.settled.steps == grant.granted.steps, where
    for part in ("steps", "left"):
        assert ending.state[part] == calm.state[part], where
