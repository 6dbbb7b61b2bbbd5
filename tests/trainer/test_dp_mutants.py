"""Bugs that are known to break the guarantee, put in on purpose: each must fail a named check.

A check that passes with the bug in place would prove nothing without it. Each case first runs its
check on the engine as it is.
"""

import math

import pytest
import torch
from tests.trainer.families import build, crowd_of, make_batch
from tests.trainer.oracle import (
    check_bound,
    check_exact,
    check_isolation,
    check_noise,
    difference,
    median_norm,
)
from torch import nn
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from dpmoe_trainer.contract import OptimizerName, OptimizerPlan
from dpmoe_trainer.dp import NotPerSample, check_model, clipped_sum, engine, losses, noise, uses
from dpmoe_trainer.dp.balancing import ReleasedLoad
from dpmoe_trainer.dp.clipping import Groups, PerGroup
from dpmoe_trainer.dp.routes import LoadQuery
from dpmoe_trainer.dp.rules.experts import ExpertWeights
from dpmoe_trainer.dp.tape import Tape
from dpmoe_trainer.methods import dp_sgd
from dpmoe_trainer.models import select_trainable

# The checks, each on a model that the bug would hit.


def exactness(family="mixtral-lm"):
    model = build(family)
    batch = make_batch(model, 5, 8)
    check_exact(model, batch, median_norm(model, batch), 1e-10)


def isolation(family="mixtral-lm"):
    model = build(family)
    sample = make_batch(model, 1, 6, seed=8)
    clipping_norm = 0.5 * float(clipped_sum(model, sample, math.inf)[1])
    mates = [make_batch(model, 3, 6, seed=9), crowd_of(sample, 3)]
    check_isolation(model, sample, mates, clipping_norm, 1e-10)


def bound():
    model = build("dpmoe-bert")
    select_trainable(model, ["*.experts.*"])
    # Every token is alike, so that their gradients add up rather than cancel.
    batch = crowd_of(make_batch(model, 1, 8), 3)
    check_bound(model, batch, 0.1 * median_norm(model, batch))


def group_bound():
    def in_groups(model, batch, clipping_norm):
        return clipped_sum(model, batch, clipping_norm, clipping=PerGroup())

    model = build("dpmoe-bert")
    batch = crowd_of(make_batch(model, 1, 8), 3)
    check_bound(model, batch, 0.01 * median_norm(model, batch), in_groups)


def joint_bound():
    """Of gradients and the loads that are released with them."""

    def with_loads(model, batch, clipping_norm):
        asked = ReleasedLoad(model, clipping_norm, 4.0, 0.1, through="loss", load_share=0.3)
        return clipped_sum(model, batch, asked.gradient_norm, loads=asked.loads)

    model = build("olmoe-lm")
    batch = crowd_of(make_batch(model, 1, 6), 3)
    check_bound(model, batch, 0.1 * median_norm(model, batch), with_loads)


def exactness_of_ties():
    exactness("mixtral-tied")


def isolation_of_capacity():
    isolation("switch")


def noise_everywhere():
    model = build("dpmoe-bert")
    with torch.no_grad():
        model.layers[1].router.weight.zero_()  # All ties, broken the same way.
    sums, _ = clipped_sum(model, make_batch(model, 3, 5), 1.0)
    name = "layers.1.experts.up_proj"
    unhit = sums[name].flatten(1).abs().sum(1) == 0
    check_noise(noise.add_noise, sums, (name, unhit))


def public_divisor():
    """One unit moves the update by C over the expected batch, however many were drawn."""
    expected_batch, clipping_norm = 4.0, 0.5
    steps = [update_of(units, expected_batch, clipping_norm) for units in (3, 2)]
    assert difference(*steps) <= clipping_norm / expected_batch * (1 + 1e-5), "divisor"


class Units:
    """Rows of a tiny table."""

    def __init__(self, model):
        self._batch = make_batch(model, 3, 6)
        self.sizes = [6] * 3

    def batches(self, parts):
        for chosen in parts:
            yield {key: value[chosen] for key, value in self._batch.items()}


def update_of(units, expected_batch, clipping_norm):
    """How one step of plain SGD, without noise, moves the model."""
    model = build("dpmoe-bert", torch.float32)
    plan = OptimizerPlan(name=OptimizerName.SGD, learning_rate=1.0)
    updater = dp_sgd.Updater(model, plan, 1, expected_batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn = [(index,) for index in range(units)]
    updater.update(dp_sgd.sum_clipped(model, Units(model), drawn, clipping_norm, 8))
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


# The bugs.


def batch_normalised_loss(patch):
    def by_all_tokens(model, logits, labels):
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        token_losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        ).view_as(targets)
        return len(labels) * token_losses.sum(1) / (targets != -100).sum()

    assert engine.per_sample_losses is losses.per_sample_losses
    patch.setattr(engine, "per_sample_losses", by_all_tokens)


def per_token_clipping(patch):
    """Each routed row clipped on its own, as layer-wise hooks on flat tokens do."""

    def clipped_sum(self, factors):
        a, g = self._input.value(), self.gradient
        row_norms = a.norm(dim=1) * g.norm(dim=1)
        limit = float(factors.min())
        self.gradient = g * (limit / row_norms.clamp_min(1e-300)).clamp_max(1)[:, None]
        return whole(self, torch.ones_like(factors))

    whole = ExpertWeights.clipped_sum
    patch.setattr(ExpertWeights, "clipped_sum", clipped_sum)
    patch.setattr(engine, "clip_factors", lambda norms, bound, *how: torch.full_like(norms, bound))


def noise_on_hit_experts_only(patch):
    whole = noise.add_noise

    def only_hit(sums, *rest):
        unhit = {
            name: total.flatten(1).abs().sum(1) == 0
            for name, total in sums.items()
            if ".experts." in name
        }
        noised = whole(sums, *rest)
        for name, experts in unhit.items():
            noised[name][experts] = 0
        return noised

    patch.setattr(noise, "add_noise", only_hit)


def double_noise(patch):
    """Once a physical batch rather than once a step."""
    whole = noise.add_noise

    def twice(sums, noise_multiplier, clipping_norm, key, step):
        once = whole(sums, noise_multiplier, clipping_norm, key, step)
        return whole(once, noise_multiplier, clipping_norm, key, step + 1)

    patch.setattr(noise, "add_noise", twice)


def stale_norms(patch):
    """The norms of the batch before, as a layer keeps them that is not reset."""
    fresh, kept = Tape.norms, {}

    def stale(self):
        norms = fresh(self)
        kept.setdefault(len(norms), norms)
        return kept[len(norms)]

    # One batch is seen before; the next of its size finds its norms.
    patch.setattr(Tape, "norms", stale)
    model = build("mixtral-lm")
    clipped_sum(model, make_batch(model, 5, 8, seed=77), 1.0)


def divisor_by_real_batch_size(patch):
    whole = dp_sgd.sum_clipped

    def rescaled(model, rows, units, *rest):
        total = whole(model, rows, units, *rest)
        return {name: 4.0 / len(units) * value for name, value in total.items()}

    patch.setattr(dp_sgd, "sum_clipped", rescaled)


def dropped_tie_cross_term(patch):
    whole = uses.inner_products

    def without_cross_terms(one, other):
        product = whole(one, other)
        return product if one is other else torch.zeros_like(product)

    patch.setattr(uses, "inner_products", without_cross_terms)


def capacity_over_the_batch(patch):
    """What a token's expert has room for, counted over all tokens rather than the sample's."""

    def forward(self, hidden_states):
        logits = self.classifier(hidden_states)
        weights, chosen = logits.softmax(-1).max(-1)
        one_hot = nn.functional.one_hot(chosen, self.num_experts)
        place = one_hot.flatten(0, 1).cumsum(0).view_as(one_hot)
        return one_hot * (place <= self.expert_capacity), weights[..., None], logits

    patch.setattr(SwitchTransformersTop1Router, "forward", forward)


def a_whole_threshold_for_each_group(patch):
    patch.setattr(Groups, "thresholds", lambda self, bound: [bound] * len(self.shares))


def loads_on_top_of_the_gradient(patch):
    """The gradient clipped to all of C, with loads besides."""
    whole = ReleasedLoad.__init__

    def unshared(self, model, clipping_norm, *rest, **named):
        whole(self, model, clipping_norm, *rest, **named)
        self.gradient_norm = clipping_norm

    patch.setattr(ReleasedLoad, "__init__", unshared)


def loads_of_layers_that_share_no_bound(patch):
    """Each layer's load with all of the norm."""

    def scale(self):
        return self.norm / max(self.bounds.values())

    patch.setattr(LoadQuery, "scale", property(scale))


MUTANTS = [
    (batch_normalised_loss, isolation, "isolation"),
    (batch_normalised_loss, exactness, "norms"),
    (per_token_clipping, bound, "bound"),
    (a_whole_threshold_for_each_group, group_bound, "bound"),
    (loads_on_top_of_the_gradient, joint_bound, "bound"),
    (loads_of_layers_that_share_no_bound, joint_bound, "bound"),
    (noise_on_hit_experts_only, noise_everywhere, "noise at unhit experts"),
    (double_noise, noise_everywhere, "noise at"),
    (stale_norms, exactness, "norms"),
    (divisor_by_real_batch_size, public_divisor, "divisor"),
    (dropped_tie_cross_term, exactness_of_ties, "norms"),
    (capacity_over_the_batch, isolation_of_capacity, "isolation"),
]


@pytest.mark.parametrize(
    ("bug", "check", "name"), MUTANTS, ids=[f"{m[0].__name__}-{m[1].__name__}" for m in MUTANTS]
)
def test_a_bug_fails_its_check_by_name(monkeypatch, bug, check, name):
    check()
    bug(monkeypatch)
    with pytest.raises(AssertionError, match=name):
        check()


def test_a_capacity_over_the_batch_is_refused_by_name(monkeypatch):
    check_model(build("switch"))
    capacity_over_the_batch(monkeypatch)
    with pytest.raises(NotPerSample, match="capacity of experts for the whole batch"):
        check_model(build("switch"))
