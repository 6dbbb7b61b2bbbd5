"""Rank 0 reads the model; the others get what they hold from there, and all prove it together."""

import copy

import pytest
import torch
from peft import PeftModel
from tests.trainer.families import build
from tests.trainer.processes import CPU, run_ranks
from tests.trainer.test_parallel_sums import LAYOUTS

from dpmoe_trainer.dp import NotPerSample
from dpmoe_trainer.dp.balancing import Balancing, ReleasedLoad, SequenceBalancing
from dpmoe_trainer.dp.clipping import FLAT, Automatic, PerGroup
from dpmoe_trainer.methods.check import check_ranks
from dpmoe_trainer.models.lora import add_lora
from dpmoe_trainer.parallel.company import Company
from dpmoe_trainer.parallel.dispatch import Journey
from dpmoe_trainer.parallel.hand_out import outline
from dpmoe_trainer.parallel.shards import NotShardable, sharded_parameters
from dpmoe_trainer.parallel.spread import gather, spread

DENSE = {"FSDP 2": (2, 1), "FSDP 2, EP 2": (2, 2)}
BALANCING = {
    "none": lambda model: Balancing(1.0),
    "sequence": lambda model: SequenceBalancing(model, 1.0, 0.5),
    "loads": lambda model: ReleasedLoad(model, 1.0, 6.0, 0.1, "loss"),
}


def outlined(model):
    """What a rank builds that reads no model: shapes alone, trained in the same places."""
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        made = add_lora(outline(type(base), base.config), rank=2, alpha=4.0)
    else:
        made = outline(type(model), model.config)
        for parameter, like in zip(made.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(like.requires_grad)
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    return made.to(next(model.parameters()).dtype)


def everything(model):
    """All parameters and buffers, those that no checkpoint has included."""
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def spread_and_gathered(ranks, model, dense):
    """What each rank holds of all, and which parameters it trains, after it was cut and joined."""
    model = copy.deepcopy(model) if ranks.first else outlined(model)
    spread(model, ranks, dense, CPU)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    gather(model, keep=True)
    return everything(model), trained


@pytest.mark.parametrize("layout", [*LAYOUTS, *DENSE])
@pytest.mark.parametrize("family", ["mixtral-tied", "dpmoe-bert", "gpt-oss-lm"])
def test_every_rank_has_what_rank_0_read(family, layout):
    model = build(family)
    world, experts = (LAYOUTS | DENSE)[layout]
    whole = everything(model)
    for found, _ in run_ranks(world, spread_and_gathered, model, layout in DENSE, experts=experts):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize("layout", ["DP 2", "DP 2 x EP 2"])
def test_adapters_are_handed_out_and_nothing_else_is_trained(layout):
    model = build("mixtral-lora")
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    world, experts = LAYOUTS[layout]
    for found, trained in run_ranks(world, spread_and_gathered, model, False, experts=experts):
        assert trained == own
        assert all(torch.equal(found[name], value) for name, value in everything(model).items())


def still_tied(ranks, model):
    model = copy.deepcopy(model) if ranks.first else outlined(model)
    spread(model, ranks, False, CPU)
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_tables_stay_one():
    assert run_ranks(2, still_tied, build("mixtral-tied"), experts=2) == [True, True]


def held(ranks, model):
    model = copy.deepcopy(model) if ranks.first else outlined(model)
    spread(model, ranks, False, CPU)
    return sum(dict(model.named_parameters())[name].numel() for name in sharded_parameters(model))


def test_no_rank_keeps_more_than_its_experts():
    model = build("mixtral-lm")
    whole = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert run_ranks(4, held, model, experts=4) == [whole / 4] * 4


def refused(ranks, model, other):
    with pytest.raises(NotShardable, match="MixtralForCausalLM differently") as refusal:
        spread(model if ranks.first else other, ranks, False, CPU)
    return str(refusal.value)


def test_ranks_that_build_different_models_share_nothing():
    run_ranks(2, refused, build("mixtral-lm"), build("mixtral-lm", torch.float32), experts=2)


def proves(ranks, model, clipping, balancing, dense=False):
    spread(model, ranks, dense, CPU)
    check_ranks(model, ranks, clipping, BALANCING[balancing](model))


@pytest.mark.parametrize("layout", [*LAYOUTS, *DENSE])
def test_ranks_prove_themselves(layout):
    world, experts = (LAYOUTS | DENSE)[layout]
    model = build("mixtral-classifier", torch.float32)
    run_ranks(world, proves, model, FLAT, "none", layout in DENSE, experts=experts)


@pytest.mark.parametrize("clipping", [PerGroup(), Automatic()], ids=["per group", "automatic"])
@pytest.mark.parametrize("balancing", [*BALANCING])
def test_ranks_prove_what_the_plan_asks_for(clipping, balancing):
    run_ranks(2, proves, build("mixtral-lm"), clipping, balancing, experts=2)


def fails(ranks, model, mutant):
    mutant()
    spread(model, ranks, False, CPU)
    with pytest.raises(NotPerSample, match="ranks' sum"):
        check_ranks(model, ranks, FLAT, Balancing(1.0))


def cannot_be_moved(ranks, model):
    for layer in model.model.layers[1:]:
        gate = layer.mlp.gate
        bias = gate.e_score_correction_bias
        del gate.e_score_correction_bias
        gate.e_score_correction_bias = torch.nn.Parameter(bias, requires_grad=False)
    spread(model, ranks, True, CPU)
    with pytest.raises(NotPerSample, match="shardDense to false"):
        ReleasedLoad(model, 1.0, 6.0, 0.1, "bias")


def test_biases_that_ranks_hold_rows_of_are_not_moved():
    run_ranks(2, cannot_be_moved, build("deepseek-v3-lm"))


def norms_of_one_rank():
    """The others' part of a sample's norm is missing."""

    def gathered(company, own, elsewhere):
        total = torch.zeros_like(elsewhere)
        total[company.own] = own + elsewhere[company.own]
        return total

    Company.gathered = gathered


def rows_of_another_sample():
    """Rows that arrive are taken for those of other samples."""
    real = Journey.of.__func__

    def of(cls, segments, shard, company):
        journey = real(cls, segments, shard, company)
        sample = journey.segments.sample
        sample.copy_(sample.flip(0))
        return journey

    Journey.of = classmethod(of)


@pytest.mark.parametrize("mutant", [norms_of_one_rank, rows_of_another_sample])
def test_ranks_that_clip_wrongly_refuse_to_train(mutant):
    run_ranks(2, fails, build("mixtral-lm"), mutant, experts=2)
