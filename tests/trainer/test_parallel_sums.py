"""Clipped sums of ranks that share experts and samples are those of one process."""

import copy

import pytest
import torch
from tests.trainer.families import FAMILIES, build, make_batch, rows
from tests.trainer.oracle import median_norm
from tests.trainer.processes import run_ranks

from dpmoe_trainer.dp import clipped_sum
from dpmoe_trainer.dp.balancing import ReleasedLoad, SequenceBalancing
from dpmoe_trainer.dp.clipping import Automatic, PerGroup
from dpmoe_trainer.models.expert_adapters import expert_factors
from dpmoe_trainer.parallel.shards import NotShardable, shard_experts, sharded_parameters
from dpmoe_trainer.parallel.sums import sum_over_ranks

FUSED = [name for name in FAMILIES if "switch" not in name]
LAYOUTS = {"EP 2": (2, 2), "EP 4": (4, 4), "DP 2": (2, 1), "DP 2 x EP 2": (4, 2)}
"""World and ranks that share the experts."""

WAYS = {
    "per group": lambda model: {"clipping": PerGroup()},
    "automatic": lambda model: {"clipping": Automatic()},
    "balancing loss": lambda model: {"balancing": SequenceBalancing(model, 1.0, 0.5).loss},
    "loads": lambda model: {"loads": ReleasedLoad(model, 1.0, 6.0, 0.1, "loss").loads},
}
"""Ways of clipping and balancing, as `clipped_sum` takes them for a model."""

# Of six samples; the last rank but one of four has none.
SPLITS = {2: [slice(0, 4), slice(4, 6)], 4: [slice(0, 1), slice(1, 5), slice(5, 5), slice(5, 6)]}


def tolerance(family: str) -> float:
    """Relative; DeepSeek's router computes in float32."""
    return 2e-7 if family.startswith("deepseek") else 1e-12


def on_one_rank(ranks, model, batch, clipping_norm, options):
    model = copy.deepcopy(model)
    shard_experts(model, ranks)
    mine = rows(batch, SPLITS[ranks.world][ranks.rank])
    sums, norms = clipped_sum(model, mine, clipping_norm, **options(model))
    shards = sharded_parameters(model)
    sum_over_ranks(sums, shards, ranks)
    firsts = {name: (shard.first, shard.count) for name, shard in shards.items()}
    return sums, norms, firsts


def part_of(whole, place, factor):
    """The experts [first, first + count) of a parameter that has all of them."""
    first, count = place
    if factor is None:
        return whole[first : first + count]
    return factor.as_kept(factor.by_expert(whole)[first : first + count])


def check_layout(model, batch, layout, limit, options=lambda model: {}):
    world, experts = LAYOUTS[layout]
    clipping_norm = median_norm(model, batch)
    expected, norms = clipped_sum(model, batch, clipping_norm, **options(model))
    found = run_ranks(world, on_one_rank, model, batch, clipping_norm, options, experts=experts)
    torch.testing.assert_close(torch.cat([each[1] for each in found]), norms, rtol=limit, atol=0.0)
    scale = max(float(total.abs().max()) for total in expected.values())
    factors = expert_factors(model)
    for sums, _, firsts in found:
        assert sums.keys() == expected.keys()
        for name, total in sums.items():
            whole = expected[name]
            if name in firsts:
                whole = part_of(whole, firsts[name], factors.get(name))
            assert total.shape == whole.shape
            assert float((total - whole).abs().max()) <= limit * scale, name
    assert any(firsts for _, _, firsts in found) == (experts > 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_of_a_layout_is_that_of_one_process(layout):
    model = build("mixtral-lm")
    check_layout(model, make_batch(model, 6, 5), layout, 1e-12)


@pytest.mark.parametrize("family", FUSED)
def test_every_family_with_shared_experts(family):
    model = build(family)
    check_layout(model, make_batch(model, 6, 5), "DP 2 x EP 2", tolerance(family))


def test_as_many_samples_as_tokens_need_a_row_more():
    model = build("mixtral-lm")
    check_layout(model, make_batch(model, 6, 4), "EP 2", 1e-12)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_ways_of_clipping_and_balancing(options):
    model = build("mixtral-lm")
    check_layout(model, make_batch(model, 6, 5), "DP 2 x EP 2", 1e-12, options)


def test_with_gradient_checkpointing():
    model = build("mixtral-lm")
    batch = make_batch(model, 6, 5)
    model.gradient_checkpointing_enable()
    model.train()
    check_layout(model, batch, "EP 2", 1e-12)


def with_infinity(ranks, model, batch):
    model = copy.deepcopy(model)
    shard_experts(model, ranks)
    sums, norms = clipped_sum(model, rows(batch, SPLITS[2][ranks.rank]), 0.5)
    return sum_over_ranks(sums, sharded_parameters(model), ranks), norms


@pytest.mark.parametrize("bad", [1, 5])
def test_a_sample_that_is_not_finite_counts_for_nothing_on_any_rank(bad):
    model = build("mixtral-lm")
    batch = make_batch(model, 6, 5)
    # A token of its own, whose embedding is infinite.
    batch["input_ids"].clamp_(max=38)
    batch["input_ids"][bad, 2] = 39
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = torch.inf
    kept = rows(batch, [index for index in range(6) if index != bad])
    expected, _ = clipped_sum(model, kept, 0.5)
    found = run_ranks(2, with_infinity, model, batch, experts=2)
    norms = torch.cat([norms for _, norms in found])
    assert [index for index in range(6) if norms[index].isinf()] == [bad]
    for place, (sums, _) in enumerate(found):
        for name, total in sums.items():
            whole = expected[name]
            if ".experts." in name:
                whole = whole.chunk(2)[place]
            torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-14)


def no_samples(ranks, model, batch):
    model = copy.deepcopy(model)
    shard_experts(model, ranks)
    return clipped_sum(model, rows(batch, slice(0, 0)), 0.5)


def test_a_batch_that_is_empty_everywhere_sums_to_zero():
    model = build("mixtral-lm")
    for sums, norms in run_ranks(2, no_samples, model, make_batch(model, 6, 5), experts=2):
        assert len(norms) == 0
        assert all(not total.any() for total in sums.values())


@pytest.mark.parametrize(
    ("family", "ranks", "reason"),
    [("switch", 2, "fused"), ("switch-lora", 2, "fused"), ("mixtral-lora", 3, "share evenly")],
)
def test_what_cannot_be_spread_is_refused_by_name(family, ranks, reason):
    from dpmoe_trainer.parallel.ranks import Ranks

    model = build(family)
    with pytest.raises(NotShardable, match=rf"experts.*{reason}"):
        shard_experts(model, Ranks(world=ranks, expert_ranks=ranks))
