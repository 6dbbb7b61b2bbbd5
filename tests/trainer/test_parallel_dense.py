"""What is no expert, spread over the ranks: one process's sums, at a share of its memory."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tests.trainer.families import FAMILIES, build, make_batch, rows
from tests.trainer.oracle import median_norm
from tests.trainer.processes import run_ranks
from tests.trainer.test_parallel_sums import FUSED, SPLITS, WAYS, part_of, tolerance
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from dpmoe_trainer.dp import clipped_sum, engine, tape
from dpmoe_trainer.errors import PeerLost
from dpmoe_trainer.models.expert_adapters import expert_factors
from dpmoe_trainer.parallel.dense import (
    DenseShard,
    dense_shards,
    gather_dense,
    shard_dense,
    trained_here,
)
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.parallel.shards import (
    NotShardable,
    gather_experts,
    shard_experts,
    sharded_parameters,
)
from dpmoe_trainer.parallel.sums import sum_over_ranks

LAYOUTS = {"FSDP 2": (2, 1), "FSDP 2, EP 2": (2, 2), "FSDP 4, EP 2": (4, 2)}
"""World and ranks that share the experts."""


def sharded(model, ranks):
    model = copy.deepcopy(model)
    shard_experts(model, ranks)
    shard_dense(model, ranks)
    return model


def on_one_rank(ranks, model, batch, clipping_norm, options, splits):
    model = sharded(model, ranks)
    mine = rows(batch, splits[ranks.rank])
    sums, norms = clipped_sum(model, mine, clipping_norm, **options(model))
    dense, shards = dense_shards(model), sharded_parameters(model)
    sum_over_ranks(sums, shards, ranks, dense)
    firsts = {name: shard.first for name, shard in dense.items()}
    places = {name: (shard.first, shard.count) for name, shard in shards.items()}
    return sums, norms, firsts, places


def check(model, batch, layout, limit=1e-12, options=lambda model: {}, splits=None):
    world, experts = LAYOUTS[layout]
    clipping_norm = median_norm(model, batch)
    expected, norms = clipped_sum(model, batch, clipping_norm, **options(model))
    arguments = (model, batch, clipping_norm, options, splits or SPLITS[world])
    found = run_ranks(world, on_one_rank, *arguments, experts=experts)
    torch.testing.assert_close(torch.cat([each[1] for each in found]), norms, rtol=limit, atol=0.0)
    scale = max(float(total.abs().max()) for total in expected.values())
    factors = expert_factors(model)
    for sums, _, dense, shards in found:
        assert sums.keys() == expected.keys()
        assert bool(shards) == (experts > 1)
        for name, total in sums.items():
            if name in shards:
                part = part_of(expected[name], shards[name], factors.get(name))
            else:
                first = dense.get(name, 0)
                part = expected[name][first : first + len(total)]
            assert total.shape == part.shape
            assert not total.numel() or float((total - part).abs().max()) <= limit * scale, name
    for name in dense.keys() & expected.keys():
        assert sum(sums[name].numel() for sums, *_ in found) == expected[name].numel()
    assert any(name in dense for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = build(family)
    check(model, make_batch(model, 6, 5), "FSDP 2", tolerance(family))


@pytest.mark.parametrize("layout", ["FSDP 2, EP 2", "FSDP 4, EP 2"])
@pytest.mark.parametrize("family", FUSED)
def test_every_family_with_shared_experts(family, layout):
    model = build(family)
    check(model, make_batch(model, 6, 5), layout, tolerance(family))


@pytest.mark.parametrize("family", ["dpmoe-bert", "mixtral-tied", "mixtral-lora", "switch"])
def test_with_gradient_checkpointing(family):
    model = build(family)
    batch = make_batch(model, 6, 5)
    model.gradient_checkpointing_enable()
    model.train()
    check(model, batch, "FSDP 2" if family not in FUSED else "FSDP 4, EP 2")


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_ways_of_clipping_and_balancing(options):
    model = build("mixtral-lm")
    check(model, make_batch(model, 6, 5), "FSDP 4, EP 2", options=options)


@pytest.mark.parametrize("first", [slice(0, 2), slice(0, 6)], ids=["some", "all"])
def test_ranks_that_share_experts_and_have_no_samples_keep_step_with_the_others(first):
    none = slice(6, 6)
    splits = [first, slice(first.stop, 6), none, none]
    model = build("mixtral-lm")
    check(model, make_batch(model, 6, 5), "FSDP 4, EP 2", splits=splits)


def no_samples(ranks, model, batch):
    model = sharded(model, ranks)
    return clipped_sum(model, rows(batch, slice(0, 0)), 0.5), {
        name: parameter.shape for name, parameter in trained_here(model).items()
    }


def test_a_batch_that_is_empty_everywhere_sums_to_zero():
    model = build("mixtral-lm")
    for (sums, norms), shapes in run_ranks(2, no_samples, model, make_batch(model, 6, 5)):
        assert len(norms) == 0
        assert {name: total.shape for name, total in sums.items()} == shapes
        assert all(not total.any() for total in sums.values())


@pytest.mark.parametrize("bad", [0, 5])
def test_a_sample_that_is_not_finite_counts_for_nothing_on_any_rank(bad):
    model = build("mixtral-lm")
    batch = make_batch(model, 6, 5)
    # A token of its own, whose embedding is infinite. The other two ranks never see it.
    batch["input_ids"].clamp_(max=38)
    batch["input_ids"][bad, 2] = 39
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = torch.inf
    kept = [index for index in range(6) if index != bad]
    expected, _ = clipped_sum(model, rows(batch, kept), 0.5)
    arguments = (model, batch, 0.5, lambda model: {}, SPLITS[4])
    found = run_ranks(4, on_one_rank, *arguments, experts=2)
    norms = torch.cat([each[1] for each in found])
    assert [index for index in range(6) if norms[index].isinf()] == [bad]
    for sums, _, dense, shards in found:
        for name, total in sums.items():
            first = shards[name][0] if name in shards else dense[name]
            part = expected[name][first : first + len(total)]
            torch.testing.assert_close(total, part, rtol=1e-10, atol=1e-14)


# What a rank holds.

LAYERS = 6


def deep_model(tied):
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            pad_token_id=0,
            tie_word_embeddings=tied,
        )
    ).double()


def memory(ranks, model, batch, checkpointing):
    """The most numbers of dense parameters, and of their sums, that a rank ever had whole."""
    model = sharded(model, ranks)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shards = dense_shards(model)
    most = SimpleNamespace(gathered=0, formed=0)

    def look(*_):
        with torch._C.DisableTorchFunction():  # The engine watches who touches a parameter.
            wholes = [s.whole for s in shards.values() if s.whole.untyped_storage().size()]
            most.gathered = max(most.gathered, sum(whole.numel() for whole in wholes))

    add_sums, add_norms, summed = engine.add_sums, tape.Tape.add_norms, DenseShard.summed

    def adding(total, more):
        add_sums(total, more)
        formed = sum(part.numel() for name, part in total.items() if name in shards)
        most.formed = max(most.formed, formed)

    engine.add_sums = adding
    tape.Tape.add_norms = lambda *given: (look(), add_norms(*given))[1]
    DenseShard.summed = lambda *given: (look(), summed(*given))[1]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(look)
    sums, _ = clipped_sum(model, batch, 0.1)
    during = (most.gathered, most.formed)
    most.gathered = 0
    look()
    kept = sum(total.numel() for name, total in sums.items() if name in shards)
    own = sum(shard.held.untyped_storage().size() // 8 for shard in shards.values())
    registered = sum(p.to_local().numel() for n, p in model.named_parameters() if n in shards)
    return *during, most.gathered, kept, own, registered


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_no_rank_holds_more_than_its_share_and_the_blocks_at_work(tied, checkpointing):
    model = deep_model(tied)
    dense = {n: p.numel() for n, p in model.named_parameters() if ".experts." not in n}
    block = sum(size for name, size in dense.items() if ".layers.0." in name)
    root = sum(size for name, size in dense.items() if ".layers." not in name)
    table = dense["model.embed_tokens.weight"]
    share = -(-sum(dense.values()) // 4) + len(dense) * 16  # Rows are not cut.
    arguments = (model, make_batch(model, 2, 5), checkpointing)
    for gathered, formed, after, *held in run_ranks(4, memory, *arguments):
        # The block that computes, and the next one, which is on its way.
        assert block + root <= gathered <= 2 * block + root
        assert formed <= block + 2 * table
        assert after == 0
        assert all(size <= share for size in held)
    assert share + 2 * block + root < sum(dense.values())


# A rank that is gone.


def one_leaves(ranks, model, batch, where):
    """Rank 1 leaves at its first use of a block, rank 0 waits for it there."""
    model = sharded(model, ranks)
    layer = model.model.layers[1].mlp.gate
    if not ranks.first and where == "forward":
        layer.register_forward_pre_hook(leave)
    elif not ranks.first:
        tape.Tape.add_norms = leave
    try:
        clipped_sum(model, batch, 0.5)
    except (Left, PeerLost) as error:
        return type(error).__name__


class Left(Exception):
    """This rank has had enough."""


def leave(*_):
    raise Left


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_is_gone_is_missed_where_parameters_are_gathered(where):
    model = deep_model(tied=False)
    found = run_ranks(2, one_leaves, model, make_batch(model, 2, 5), where)
    assert found == ["PeerLost", "Left"]


# The whole model again.


def there_and_back(ranks, model):
    start = copy.deepcopy(model)
    model = sharded(model, ranks)
    gather_dense(model, keep=ranks.first)
    gather_experts(model, keep=ranks.first)
    if not ranks.first:
        return bool(dense_shards(model)) and bool(sharded_parameters(model))
    state, expected = model.state_dict(), start.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in start.modules()]
    names = [name for name, _ in start.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    batch = make_batch(start, 3, 5)
    return torch.equal(model(**batch).logits, start(**batch).logits)


@pytest.mark.parametrize("family", ["mixtral-tied", "gpt-oss-lm", "qwen3-classifier", "dpmoe-bert"])
def test_the_first_rank_gathers_the_model_as_it_was(family):
    assert run_ranks(2, there_and_back, build(family), experts=2) == [True, True]


def saved(ranks, model, folder):
    model = sharded(model, ranks)
    gather_dense(model, keep=ranks.first)
    if ranks.first:
        model.save_pretrained(folder)


def test_what_is_saved_is_the_model(tmp_path):
    model = build("mixtral-tied")
    run_ranks(2, saved, model, tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.architectures == ["MixtralForCausalLM"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


# What cannot be cut.

TWO = Ranks(world=2)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(NotShardable, match=r"Linear has no blocks.*shardDense"):
        shard_dense(nn.Linear(2, 3), TWO)


def test_a_parameter_that_is_one_number_is_refused_by_name():
    model = build("mixtral-lm")
    model.model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(NotShardable, match=r"'model\.scale'.*single number"):
        shard_dense(model, TWO)


def test_blocks_that_share_a_parameter_are_refused_by_name():
    model = build("mixtral-lm")
    one, other = model.model.layers
    other.input_layernorm.weight = one.input_layernorm.weight
    with pytest.raises(NotShardable, match=r"'model\.layers\.0\.input_layernorm\.weight'.*shared"):
        shard_dense(model, TWO)


def one_row_at_a_time(ranks, model, batch):
    with pytest.raises(engine.NotPerSample, match=r"pad_token_id.*shardDense"):
        clipped_sum(sharded(model, ranks), batch, 0.5)


def test_a_model_that_takes_one_row_at_a_time_is_refused():
    model = build("mixtral-classifier")
    batch = make_batch(model, 4, 5)
    model.config.pad_token_id = None
    run_ranks(2, one_row_at_a_time, model, batch)
