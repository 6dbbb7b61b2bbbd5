"""Steps of several ranks: the same draws, noise and updates as those of one process."""

import copy

import numpy as np
import pytest
import torch
from tests.trainer.families import build
from tests.trainer.processes import CPU, run_ranks
from tests.trainer.test_parallel_sums import LAYOUTS

from dpmoe_trainer.contract import OptimizerPlan
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.dp.balancing import ReleasedLoad
from dpmoe_trainer.dp.clipping import FLAT, PerGroup
from dpmoe_trainer.dp.noise import NoiseKey, add_noise
from dpmoe_trainer.dp.sampling import poisson_draw
from dpmoe_trainer.evaluate import evaluate
from dpmoe_trainer.methods.dp_sgd import Updater, sum_clipped
from dpmoe_trainer.models.expert_adapters import expert_factors
from dpmoe_trainer.parallel.dense import gather_dense, offsets, shard_dense
from dpmoe_trainer.parallel.ranks import ALONE
from dpmoe_trainer.parallel.shards import gather_experts, shard_experts, sharded_parameters

FSDP = {"FSDP 2": (2, 1), "FSDP 2, EP 2": (2, 2), "FSDP 4, EP 2": (4, 2)}
"""The same, where what is no expert is spread over all ranks of the world."""

SIGMA, CLIP, EXPECTED, STEPS = 0.8, 0.4, 6.0, 3
SINGLES = [(row,) for row in range(14)]
USERS = [(0, 1, 2), (3,), (4, 5), (6,), (7,), (8, 9, 10, 11, 12), (13,)]


def some_rows() -> Rows:
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 40, random.integers(3, 9)).astype(np.int32) for _ in range(14)]
    return Rows(tokens, None, 0, CPU)


def steps(ranks, model, units, optimizer, clipping, released, dense):
    """A run's loop, and its model as one process holds it."""
    model, key = copy.deepcopy(model), NoiseKey(bytes(range(32)))
    balancing = ReleasedLoad(model, CLIP, EXPECTED, 0.1, "loss") if released else None
    shard_experts(model, ranks)
    if dense:
        shard_dense(model, ranks)
    plan = OptimizerPlan(name=optimizer, learning_rate=0.05, weight_decay=0.1)
    updater = Updater(model, plan, STEPS, EXPECTED, SIGMA * CLIP)
    firsts = {name: shard.first for name, shard in sharded_parameters(model).items()}
    for step in range(STEPS):
        drawn = poisson_draw(len(units), 0.5, key, step)
        clipped = sum_clipped(
            model,
            some_rows(),
            [units[index] for index in drawn],
            CLIP if balancing is None else balancing.gradient_norm,
            3,
            clipping=clipping,
            loads=None if balancing is None else balancing.loads,
            balancing=None if balancing is None else balancing.loss,
            ranks=ranks,
        )
        noised = add_noise(
            clipped, SIGMA, CLIP, key, step, firsts, offsets(model), expert_factors(model)
        )
        if balancing is not None:
            balancing.take(noised)
        updater.update(noised)
    scores = evaluate(model, some_rows(), 4, ranks)
    gather_dense(model, keep=True)
    gather_experts(model, keep=True)
    return {name: value.detach() for name, value in model.state_dict().items()}, scores


def check(layout, units, optimizer="adamw", clipping=FLAT, released=False, family="mixtral-lm"):
    model = build(family)
    arguments = (model, units, optimizer, clipping, released)
    expected, scores = steps(ALONE, *arguments, False)
    world, experts = (LAYOUTS | FSDP)[layout]
    found = run_ranks(world, steps, *arguments, layout in FSDP, experts=experts)
    for state, others in found:
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
            # Replicas must not drift apart by a single bit.
            assert torch.equal(value, found[0][0][name]), name
        assert others.accuracy == scores.accuracy
        # Losses are taken in float32.
        assert others.perplexity == pytest.approx(scores.perplexity, rel=1e-6)
    start = model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS | FSDP)
@pytest.mark.parametrize("units", [SINGLES, USERS], ids=["rows", "users"])
def test_layouts_make_the_same_model(layout, units):
    check(layout, units)


SHARED = ["DP 2 x EP 2", "FSDP 4, EP 2"]


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("optimizer", ["sgd", "adambc"])
def test_optimisers(optimizer, layout):
    check(layout, SINGLES, optimizer=optimizer)


@pytest.mark.parametrize("layout", SHARED)
def test_users_with_a_threshold_for_each_block_of_layers(layout):
    check(layout, USERS, clipping=PerGroup())


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("units", [SINGLES, USERS], ids=["rows", "users"])
def test_released_loads(units, layout):
    check(layout, units, released=True)


@pytest.mark.parametrize("layout", ["EP 4", "FSDP 4, EP 2"])
def test_biases_and_transposed_weights(layout):
    check(layout, SINGLES, family="gpt-oss-lm")


@pytest.mark.parametrize("layout", SHARED)
def test_a_table_that_is_also_the_head(layout):
    check(layout, USERS, family="mixtral-tied")


@pytest.mark.parametrize("layout", ["FSDP 2", "EP 4", "FSDP 4, EP 2"])
@pytest.mark.parametrize("family", ["mixtral-lora", "gpt-oss-lora"])
def test_adapters_on_experts(family, layout):
    check(layout, USERS, family=family)


def test_a_parameter_with_fewer_rows_than_ranks():
    check("FSDP 4, EP 2", SINGLES, family="qwen2-lm")
