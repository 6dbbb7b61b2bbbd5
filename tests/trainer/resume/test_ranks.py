"""A run of several ranks over its attempts, without a process group: each rank is a thread."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.runs import PlanMaker, plan_of
from torch import nn

from dpmoe_trainer.checkpoint import Part
from dpmoe_trainer.contract import TrainingPlan
from dpmoe_trainer.dp.balancing import Balancing
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import BadCheckpoint, JournalLost, PeerLost, StopRequested
from dpmoe_trainer.journal import Journal, open_journal
from dpmoe_trainer.methods.dp_sgd import Updater
from dpmoe_trainer.peers import Peers
from dpmoe_trainer.progress import ProgressBoard
from dpmoe_trainer.resume import Run
from dpmoe_trainer.state import State

EXPERTS, STEPS = 4, 6


class Layer(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        experts = torch.randn(EXPERTS, 3, 2, generator=generator)
        self.experts = nn.Parameter(experts[part.first : part.first + part.count].clone())
        self.dense = nn.Parameter(torch.randn(3, generator=generator))


class Group:
    """What ranks have in common: the collectives that `Peers` asks for."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world)
        self._said: list[Any] = [None] * world

    def ranks(self, rank: int) -> Peers:
        return Peers(
            rank,
            self.world,
            any_of=lambda mine: any(self._gather(rank, mine)),
            from_first=lambda value: self._gather(rank, value)[0],
        )

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._said[rank] = value
        self._barrier.wait(20)
        answer = list(self._said)
        self._barrier.wait(20)
        return answer

    def together(self, act: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world

        def work(rank: int) -> None:
            try:
                results[rank] = act(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Stage:
    """Attempts of one run, each with as many ranks as it likes."""

    def __init__(self, make_plan: PlanMaker, folder: Path) -> None:
        self.folder = folder / "volume"
        self._make_plan = make_plan
        self.journal: Journal | None = None

    def plan(self, world: int) -> TrainingPlan:
        return plan_of(
            self._make_plan(
                privacy__steps=STEPS,
                training__optimizer={"name": "adamw", "learningRate": 0.01},
                parallel={"processes": world, "expertParallel": world},
                checkpoint={"path": str(self.folder), "everySteps": 2},
            )
        )

    def attempt(
        self,
        world: int,
        until: int = STEPS,
        stop: Callable[[int, int], bool] = lambda rank, step: False,
        between: Callable[[int, int], None] = lambda rank, step: None,
    ) -> list[Any]:
        """Trains to step `until`; each rank's key, first step and parameters, or its error."""
        plan = self.plan(world)
        group = Group(world)
        self.journal = open_journal(self.folder, plan.run_digest(), f"pod-{world}", 0)

        def act(rank: int) -> Any:
            each = EXPERTS // world
            part = Part(rank * each, each, EXPERTS)
            layer = Layer(part)
            updater = Updater(layer, plan.training.optimizer, STEPS, 1.0)
            state = State(updater, Balancing(1.0), {"experts": part} if world > 1 else None)
            board = ProgressBoard(STEPS, lambda steps: 0.0)
            now = 0
            settings = Settings(Path(), Path(), None, None, None)
            journal = self.journal if rank == 0 else None
            run = Run(plan, settings, board, lambda: stop(rank, now), journal, group.ranks(rank))
            first = run.resume(state, ["rows"])
            for now in range(first, until):
                between(rank, now)
                run.draw(now)
                updater.update(gradients(layer, part, now))
                run.keep(now + 1)
            return run.key.secret, first, board.drawn, dict(layer.named_parameters())

        return group.together(act)


def gradients(layer: Layer, part: Part, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    experts = torch.randn(EXPERTS, 3, 2, generator=generator)
    return {
        "experts": experts[part.first : part.first + part.count].clone(),
        "dense": torch.randn(3, generator=generator),
    }


def joined(results: list[Any]) -> Mapping[str, torch.Tensor]:
    parts = [parameters for *_, parameters in results]
    return {
        "experts": torch.cat([part["experts"] for part in parts]),
        "dense": parts[0]["dense"],
    }


@pytest.fixture
def stage(make_plan: PlanMaker, tmp_path: Path) -> Stage:
    return Stage(make_plan, tmp_path)


@pytest.mark.parametrize("worlds", [(1, 1), (4, 4), (4, 2), (2, 4), (4, 1), (1, 2)])
def test_a_run_goes_on_with_other_ranks_to_the_same_model(
    worlds: tuple[int, int], stage: Stage, make_plan: PlanMaker, tmp_path: Path
) -> None:
    undisturbed = joined(Stage(make_plan, tmp_path / "other").attempt(1))
    before, after = worlds
    earlier = stage.attempt(before, until=5)
    later = stage.attempt(after)
    assert {first for _, first, *_ in later} == {4}
    assert {secret for secret, *_ in earlier + later} == {earlier[0][0]}
    assert {drawn for _, _, drawn, _ in later} == {STEPS}
    for name, tensor in joined(later).items():
        assert torch.equal(tensor, undisturbed[name]), name


def test_one_rank_that_is_asked_to_stop_stops_all_after_the_step(stage: Stage) -> None:
    results = stage.attempt(2, stop=lambda rank, step: rank == 1 and step == 3)
    assert [type(result) for result in results] == [StopRequested] * 2
    assert {first for _, first, *_ in stage.attempt(2)} == {3}


def test_what_ends_rank_0_ends_all(stage: Stage) -> None:
    def overtake(rank: int, step: int) -> None:
        if rank == 0 and step == 3:
            (stage.folder / "attempt-0002.journal").write_text("")

    first, second = stage.attempt(2, between=overtake)
    assert isinstance(first, PeerLost)
    assert "a newer attempt" in str(first)
    assert isinstance(second, PeerLost)
    assert "rank 0 ended the run" in str(second)


def test_a_refusal_of_rank_0_is_its_own_and_the_others_end(stage: Stage) -> None:
    stage.attempt(2, until=3)
    (stage.folder / "key").unlink()
    first, second = stage.attempt(2)
    assert isinstance(first, JournalLost)
    assert isinstance(second, PeerLost)


def test_a_checkpoint_of_another_model_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.attempt(1, until=3)
    build = Layer.__init__

    def larger(layer: Layer, part: Part) -> None:
        build(layer, part)
        layer.dense = nn.Parameter(torch.zeros(5))

    monkeypatch.setattr(Layer, "__init__", larger)
    (result,) = stage.attempt(1)
    assert isinstance(result, BadCheckpoint)
    assert "'dense' (3,) of torch.float32, and the model (5,)" in str(result)
