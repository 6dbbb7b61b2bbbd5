"""Flat, per-group and automatic clipping: what is summed, and that C bounds it in each."""

import math

import pytest
import torch
from tests.trainer.families import TOLERANCE, build, crowd_of, join, make_batch, rows
from tests.trainer.oracle import difference, median_norm, one_at_a_time, size

from dpmoe_trainer.dp import NotPerSample, UncoveredParameter, check_model, clipped_sum
from dpmoe_trainer.dp.clipping import Automatic, Flat, Group, PerGroup, clip_gradient

EXPERTS_APART = PerGroup((Group(("*.experts.*",), 3.0), Group(("*",), 1.0)))

WAYS = {
    "flat": Flat(),
    "blocks": PerGroup(),
    "patterns": EXPERTS_APART,
    "automatic": Automatic(0.05),
}


def group_of(way, name):
    """Where a parameter belongs, told in another way than the engine's."""
    if way is EXPERTS_APART:
        return ".experts." in name
    if isinstance(way, PerGroup):
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: numbers[0] + 1]) if numbers else None
    return None


def clipped_alone(model, sample, clipping_norm, way):
    """One sample's clipped gradient, by autograd and the definitions."""
    gradient, norms = one_at_a_time(model, sample, math.inf)
    if isinstance(way, Automatic):
        factor = clipping_norm / (float(norms) + way.gamma)
        return {name: factor * part for name, part in gradient.items()}
    groups = {group_of(way, name) for name in gradient}
    weights = {True: 3.0, False: 1.0} if way is EXPERTS_APART else dict.fromkeys(groups, 1.0)
    clipped = {}
    for group in groups:
        parts = {name: part for name, part in gradient.items() if group_of(way, name) == group}
        limit = clipping_norm * math.sqrt(weights[group] / sum(weights[g] for g in groups))
        factor = min(1.0, limit / max(size(parts), 1e-300))
        clipped |= {name: factor * part for name, part in parts.items()}
    return clipped


@pytest.mark.parametrize("way", ["blocks", "patterns", "automatic"])
@pytest.mark.parametrize(
    "family", ["dpmoe-bert", "mixtral-tied", "mixtral-lora", "gpt-oss-lm", "switch"]
)
def test_the_sum_is_that_of_samples_clipped_one_at_a_time(family, way):
    model = build(family)
    batch = make_batch(model, 5, 6)
    clipping_norm = median_norm(model, batch)
    expected = {}
    for index in range(5):
        sample = rows(batch, slice(index, index + 1))
        for name, part in clipped_alone(model, sample, clipping_norm, WAYS[way]).items():
            expected[name] = expected.get(name, 0) + part

    sums, norms = clipped_sum(model, batch, clipping_norm, clipping=WAYS[way])

    assert difference(sums, expected) <= TOLERANCE[family] * size(expected)
    # The norms that are returned are those of whole gradients.
    _, whole = one_at_a_time(model, batch, math.inf)
    assert torch.allclose(norms, whole, rtol=1e-10, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["dpmoe-bert", "qwen2-lm", "switch"])
def test_one_sample_moves_the_sum_by_at_most_the_clipping_norm(family, way):
    model = build(family)
    batch = join(make_batch(model, 3, 7), crowd_of(make_batch(model, 1, 7, seed=4), 1))
    clipping_norm = 0.1 * median_norm(model, batch)
    whole, _ = clipped_sum(model, batch, clipping_norm, clipping=WAYS[way])
    moves = []
    for index in range(4):
        others = [other for other in range(4) if other != index]
        without, _ = clipped_sum(model, rows(batch, others), clipping_norm, clipping=WAYS[way])
        moves.append(difference(whole, without))
    assert max(moves) <= clipping_norm * (1 + 1e-5)
    # Gradients are ten times as large, so a way that clips harder than it must fails here.
    assert max(moves) >= 0.9 * clipping_norm


def test_each_group_has_a_norm_and_a_threshold_of_its_own():
    model = build("dpmoe-bert")
    batch = crowd_of(make_batch(model, 1, 6), 1)
    clipping_norm = 0.01 * median_norm(model, batch)
    sums, _ = clipped_sum(model, batch, clipping_norm, clipping=EXPERTS_APART)
    experts = size({name: part for name, part in sums.items() if ".experts." in name})
    others = size({name: part for name, part in sums.items() if ".experts." not in name})
    assert experts == pytest.approx(clipping_norm * math.sqrt(3 / 4))
    assert others == pytest.approx(clipping_norm * math.sqrt(1 / 4))


@pytest.mark.parametrize("by", [(), EXPERTS_APART.by, (Group(("none",)), Group(("*",), 0.2))])
def test_squared_thresholds_sum_to_the_clipping_norms_square(by):
    names = ["embed.weight", "layers.0.w", "layers.1.experts.w", "layers.10.w", "head.weight"]
    groups = PerGroup(by).groups(names)
    assert list(groups.of) == names
    assert set(groups.of.values()) == set(range(len(groups.shares)))
    thresholds = groups.thresholds(0.7)
    assert math.sqrt(sum(threshold**2 for threshold in thresholds)) == pytest.approx(0.7)
    if not by:
        assert groups.of == dict(zip(names, [0, 1, 2, 3, 0], strict=True))


@pytest.mark.parametrize("way", ["blocks", "automatic"])
def test_a_checkpointed_layer_is_clipped_likewise(way):
    model = build("mixtral-lm")
    batch = make_batch(model, 4, 6)
    clipping_norm = median_norm(model, batch)
    plain, _ = clipped_sum(model, batch, clipping_norm, clipping=WAYS[way])
    model.gradient_checkpointing_enable()
    again, _ = clipped_sum(model, batch, clipping_norm, clipping=WAYS[way])
    assert difference(plain, again) <= 1e-12 * size(plain)


@pytest.mark.parametrize("way", ["blocks", "automatic"])
def test_samples_without_a_gradient_or_a_finite_one_contribute_zero(way):
    model = build("dpmoe-bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layers.1.", "classifier.")))
    batch = make_batch(model, 3, 5)
    del batch["input_ids"]
    batch["hidden_states"] = torch.randn(3, 5, 16, dtype=torch.float64)
    expected, _ = clipped_sum(model, rows(batch, [0, 2]), 1.0, clipping=WAYS[way])
    batch["hidden_states"][1, 0, 0] = math.inf
    sums, norms = clipped_sum(model, batch, 1.0, clipping=WAYS[way])
    assert all(torch.equal(sums[name], expected[name]) for name in expected)
    assert norms.isinf().tolist() == [False, True, False]
    silent = make_batch(model_lm := build("mixtral-lm"), 2, 5)
    silent["labels"][:] = -100
    sums, norms = clipped_sum(model_lm, silent, 1.0, clipping=WAYS[way])
    assert not norms.any()
    assert not any(part.any() for part in sums.values())


@pytest.mark.parametrize("way", WAYS)
def test_a_formed_gradient_is_clipped_as_the_engine_clips(way):
    model = build("dpmoe-bert")
    sample = make_batch(model, 1, 6)
    clipping_norm = 0.5 * median_norm(model, sample)
    gradient, _ = clipped_sum(model, sample, math.inf)
    formed, finite = clip_gradient(gradient, clipping_norm, WAYS[way])
    engine, _ = clipped_sum(model, sample, clipping_norm, clipping=WAYS[way])
    assert difference(formed, engine) <= 1e-10 * size(engine)
    assert finite
    gradient["classifier.bias"][0] = math.nan
    broken, finite = clip_gradient(gradient, clipping_norm, WAYS[way])
    assert not finite
    assert not any(part.any() for part in broken.values())


def test_what_cannot_be_grouped_is_refused_by_name():
    model = build("switch")
    batch = make_batch(model, 2, 4)
    halves = PerGroup((Group(("*.expert_0.*",)), Group(("*",))))
    with pytest.raises(UncoveredParameter, match=r"expert_0\.w.*several clipping groups"):
        clipped_sum(model, batch, 1.0, clipping=halves)
    # Before any data is read, too.
    with pytest.raises(UncoveredParameter, match="several clipping groups"):
        check_model(model, clipping=halves)
    with pytest.raises(NotPerSample, match=r"'shared\.weight' is in no clipping group"):
        clipped_sum(model, batch, 1.0, clipping=PerGroup((Group(("*.experts.*",)),)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_without_meaning_are_refused(value):
    with pytest.raises(ValueError, match="gamma"):
        Automatic(value)
    with pytest.raises(ValueError, match="weight"):
        Group(("*",), value)
    with pytest.raises(ValueError, match="no parameters"):
        Group(())
    model = build("dpmoe-bert")
    with pytest.raises(ValueError, match="automatic clipping needs a finite"):
        clipped_sum(model, make_batch(model, 1, 3), math.inf, clipping=Automatic())
