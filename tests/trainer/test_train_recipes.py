"""Whole runs with other ways of clipping, balancing and updating than the default ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.runs import PlanMaker, Trainer
from transformers import AutoModelForSequenceClassification

from dpmoe_trainer import train as loop
from dpmoe_trainer.contract import ExitCode
from dpmoe_trainer.dp.balancing import ReleasedLoad

RELEASED = {"method": "released-load", "strength": 0.1, "through": "bias", "loadShare": 0.1}
ADAMBC = {"name": "adambc", "learningRate": 0.01}


@pytest.fixture
def upcycled(make_plan: PlanMaker, tiny_bert: Path) -> PlanMaker:
    """Plans for a BERT that becomes a mixture of experts."""

    def make(**changes: Any) -> dict[str, Any]:
        upcycle = {"experts": 4, "topK": 2, "layers": [0, 1]}
        return make_plan(model__path=str(tiny_bert), model__upcycle=upcycle, **changes)

    return make


def biases(folder: Path) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.stack([layer.router.selection_bias for layer in model.layers])


def test_balanced_by_released_loads(trainer: Trainer, upcycled: PlanMaker) -> None:
    plan = upcycled(
        privacy__clipping={"mode": "per-group"},
        training__balancing=RELEASED,
        training__optimizer=ADAMBC,
    )
    assert trainer.run(plan).code == ExitCode.COMPLETED
    # Three steps of at most a tenth each, and part of the model that is kept.
    moved = biases(trainer.output)
    assert moved.count_nonzero() == moved.numel()
    assert moved.abs().max() <= 0.3 + 1e-6


def test_balanced_by_each_rows_own_loss(trainer: Trainer, upcycled: PlanMaker) -> None:
    plan = upcycled(
        privacy__clipping={"mode": "automatic", "gamma": 0.01},
        training__balancing={"method": "sequence", "strength": 0.1},
        blocks__0__unit={"kind": "user", "column": "user"},
    )
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert not biases(trainer.output).any()


@pytest.mark.parametrize("balancing", [RELEASED, {"method": "sequence", "strength": 0.1}])
def test_balanced_below_the_trained_layers(
    trainer: Trainer, upcycled: PlanMaker, balancing: dict[str, Any]
) -> None:
    """Frozen experts are balanced too, so what the frozen layers make of a row is not cached."""
    trained = ["layers.1.*", "classifier.*"]
    run = trainer.run(upcycled(model__trainable=trained, training__balancing=balancing))
    assert run.code == ExitCode.COMPLETED


def test_balanced_by_released_loads_through_a_loss(trainer: Trainer, make_plan: PlanMaker) -> None:
    run = trainer.run(make_plan(training__balancing=RELEASED | {"through": "loss"}))
    assert run.code == ExitCode.COMPLETED


def test_loads_are_seen_noised_or_not_at_all(
    trainer: Trainer, upcycled: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What steers is what was summed plus noise of σC; nothing else changes a router's bias."""
    summed: list[dict[str, torch.Tensor]] = []
    seen: list[dict[str, torch.Tensor]] = []
    bounds = []
    whole = loop.sum_clipped

    def sum_clipped(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        sums = whole(*args, **options)
        bounds.append((args[3], options["loads"].norm))
        summed.append({name: sums[name].clone() for name in options["loads"].experts})
        return sums

    def take(self: ReleasedLoad, released: dict[str, torch.Tensor]) -> None:
        assert self.loads is not None
        seen.append({name: released.pop(name).clone() for name in self.loads.experts})

    monkeypatch.setattr(loop, "sum_clipped", sum_clipped)
    monkeypatch.setattr(ReleasedLoad, "take", take)
    plan = upcycled(privacy__steps=60, privacy__samplingRate=0.05, training__balancing=RELEASED)
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert not biases(trainer.output).any()
    noise = torch.cat(
        [
            after[name] - before[name]
            for before, after in zip(summed, seen, strict=True)
            for name in before
        ]
    )
    scale = float(noise.pow(2).mean().sqrt())
    assert scale == pytest.approx(1.0, abs=3 / math.sqrt(2 * len(noise)))
    # Gradients and loads together are bounded by C, which is one.
    assert all(math.hypot(*bound) == pytest.approx(1.0, rel=1e-12) for bound in bounds)


REFUSED = [
    (
        {"training__balancing": RELEASED},
        ExitCode.BAD_MODEL,
        "MixtralTopKRouter has no bias on its choice",
    ),
    (
        {
            "privacy__clipping": {
                "mode": "per-group",
                "groups": [{"parameters": ["*.experts.*"]}],
            }
        },
        ExitCode.BAD_MODEL,
        "'model.embed_tokens.weight' is in no clipping group",
    ),
    (
        {"training__optimizer": ADAMBC | {"momentum": 0.5}},
        ExitCode.BAD_PLAN,
        "momentum: 0.5 has no meaning for adambc",
    ),
    ({"privacy__clipping": {"mode": "automatic"}}, ExitCode.BAD_PLAN, "gamma must be set"),
    (
        {"training__balancing": {"method": "sequence", "strength": 1.0, "loadShare": 0.1}},
        ExitCode.BAD_PLAN,
        "only there",
    ),
]


@pytest.mark.parametrize(("changes", "code", "words"), REFUSED)
def test_refused_before_data_is_read(
    trainer: Trainer, make_plan: PlanMaker, changes: dict[str, Any], code: ExitCode, words: str
) -> None:
    run = trainer.run(make_plan(**changes, blocks__0__data__path="/no/such/table"))
    assert run.code == code
    assert words in run.stderr


def test_adapters_are_trained_and_merged(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path
) -> None:
    plan = make_plan(model__trainable=[], model__lora={"rank": 2, "alpha": 4.0})
    assert trainer.run(plan).code == ExitCode.COMPLETED
    start, kept = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (tiny_mixtral, trainer.output)
    )
    assert kept.keys() == start.keys()
    # Where the head started from is the plan's own, and not in the folder.
    changed = {n for n in kept if n != "score.weight" and not torch.equal(kept[n], start[n])}
    assert any("self_attn" in name for name in changed)
    assert any("experts" in name for name in changed)
    assert all("self_attn" in name or "experts" in name for name in changed)


def test_adapters_of_a_model_that_becomes_a_mixture(trainer: Trainer, upcycled: PlanMaker) -> None:
    adapters = {"rank": 2, "alpha": 4.0, "attention": False}
    plan = upcycled(model__trainable=[], model__lora=adapters)
    assert trainer.run(plan).code == ExitCode.COMPLETED
    kept = AutoModelForSequenceClassification.from_pretrained(trainer.output).state_dict()
    assert not any("lora" in name for name in kept)
