"""In bfloat16 a sample contributes no more than in float32: its norm is that of what is summed."""

import copy
import math

import pytest
import torch
from tests.trainer.families import FAMILIES, build, make_batch, rows
from tests.trainer.oracle import size
from tests.trainer.processes import run_ranks
from tests.trainer.test_parallel_dense import sharded
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dpmoe_trainer.dp import NotPerSample, check_bound, check_model, clipped_sum
from dpmoe_trainer.dp.balancing import ReleasedLoad
from dpmoe_trainer.dp.clipping import Automatic, PerGroup
from dpmoe_trainer.dp.rules import experts, linear
from dpmoe_trainer.dp.uses import wide
from dpmoe_trainer.errors import BadPlan
from dpmoe_trainer.models import select_trainable
from dpmoe_trainer.parallel.dense import dense_shards
from dpmoe_trainer.parallel.shards import shard_experts, sharded_parameters
from dpmoe_trainer.parallel.sums import counted_once, sum_over_ranks
from dpmoe_trainer.precision import computing, require_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FUSED = ["dpmoe-bert", "mixtral-lm", "gpt-oss-lm", "deepseek-v3-lm"]

CLIP = 1e-3
"""Below every norm here, so that all samples are clipped."""

ROUNDING = 1e-4


def half():
    return computing("bfloat16", CPU)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("trained", ["*", "*.experts.*"])
@pytest.mark.parametrize("family", FUSED)
def test_a_sample_contributes_at_most_the_clipping_norm(family, trained, checkpointed):
    model = build(family, torch.float32)
    select_trainable(model, [trained])
    if checkpointed:
        model.activation_checkpointing_enable()
    for seed in range(4):
        with half():
            sums, norms = clipped_sum(model, make_batch(model, 1, 9, seed), CLIP)
        assert norms > CLIP
        assert all(total.dtype == torch.float32 for total in sums.values())
        assert CLIP * (1 - ROUNDING) <= size(sums) <= CLIP * (1 + ROUNDING)


def squares_of_one_sample(ranks, model, batch, dense):
    """This rank's part of the squared norm of what one sample of rank 0 contributes."""
    if dense:
        model = sharded(model, ranks)
    else:
        model = copy.deepcopy(model)
        shard_experts(model, ranks)
    products = []
    inner = experts._products

    def note(x_SI, *rest):
        products.append(x_SI.dtype)
        return inner(x_SI, *rest)

    experts._products = note
    sizes = []
    shards, held = sharded_parameters(model), dense_shards(model)
    for index in range(len(batch["labels"])):
        mine = rows(batch, slice(index, index + 1 if ranks.first else index))
        with half():
            sums, _ = clipped_sum(model, mine, CLIP)
        sums = counted_once(sum_over_ranks(sums, shards, ranks, held), shards, ranks, held)
        sizes.append(size(sums) ** 2)
    return sizes, set(products)


@pytest.mark.parametrize("dense", [False, True], ids=["EP 2", "FSDP 2, EP 2"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["mixtral-lm", "gpt-oss-lm"])
def test_so_does_one_whose_experts_are_on_two_ranks(family, checkpointed, dense):
    model = build(family, torch.float32)
    batch = make_batch(model, 3, 9)
    if checkpointed:
        model.activation_checkpointing_enable()
    found = run_ranks(2, squares_of_one_sample, model, batch, dense, experts=2)
    for parts in zip(*(sizes for sizes, _ in found), strict=True):
        assert all(part > 0 for part in parts)
        assert CLIP * (1 - ROUNDING) <= math.sqrt(sum(parts)) <= CLIP * (1 + ROUNDING)
    assert all(products == {torch.bfloat16} for _, products in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_proves_its_bound_on_every_family(family):
    model = build(family, torch.float32)
    check_model(model)
    with half():
        check_bound(model)


WAYS = {"per group": {"clipping": PerGroup()}, "automatic": {"clipping": Automatic()}}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_engine_proves_the_bound_of_every_way_of_clipping(options):
    with half():
        check_bound(build("mixtral-lm", torch.float32), **options)


def test_loads_are_no_part_of_the_bound():
    model = build("dpmoe-bert", torch.float32)
    released = ReleasedLoad(model, 1.0, 8.0, 0.1, load_share=0.9)
    with half():
        check_bound(model, loads=released.loads)


def towards_zero(tensor):
    """In bfloat16 and wide again, where rounding would not cancel."""
    kept = wide(tensor).contiguous().view(torch.int32) & ~0xFFFF
    return kept.view(torch.float32)


@pytest.mark.parametrize("use", [linear.LinearWeight, experts.ExpertWeights])
def test_norms_of_other_numbers_than_those_summed_are_found(use, monkeypatch):
    norms = use.squared_norms

    def of_rounded(self):
        exact, self.gradient = self.gradient, towards_zero(self.gradient)
        found = norms(self)
        self.gradient = exact
        return found

    monkeypatch.setattr(use, "squared_norms", of_rounded)
    # In float32, since in bfloat16 most gradients are rounded already.
    model = build("mixtral-lm", torch.float32)
    words = r"has 1\.00\d+ times the clipping norm.*training\.precision"
    with pytest.raises(NotPerSample, match=words):
        check_bound(model)


def test_a_gradient_that_is_no_number_is_refused():
    model = build("mixtral-lm", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with half(), pytest.raises(NotPerSample, match=r"nan times.*training\.precision"):
        check_bound(model)


def test_a_model_that_could_not_be_scored_is_found(monkeypatch):
    """The engine does not run a model's own experts, but scoring does."""

    def own(*_):
        raise RuntimeError("expected two matrices of one type")

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "own", own)
    model = build("mixtral-lm", torch.float32)
    model.config._experts_implementation = "own"
    with half(), pytest.raises(RuntimeError, match="of one type"):
        check_bound(model)


def test_a_weight_that_was_updated_counts_at_once():
    """No cast of it is kept, which is what autocast does for trained weights."""
    layer = nn.Linear(3, 2, bias=False)
    with half(), torch.no_grad():
        assert layer(torch.ones(1, 3)).any()
        layer.weight.zero_()
        assert not layer(torch.ones(1, 3)).any()


@pytest.mark.parametrize("precision", [None, "float32"])
def test_float32_is_float32_whatever_the_caller_does(precision):
    layer = nn.Linear(3, 2)
    with torch.autocast("cpu", torch.bfloat16), computing(precision, CPU):
        assert layer(torch.ones(1, 3)).dtype == torch.float32


def test_a_gpu_that_only_imitates_bfloat16_is_refused(monkeypatch):
    asked = []

    def is_supported(including_emulation):
        asked.append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(BadPlan, match=r"training\.precision: bfloat16.*Tesla T4.*float32"):
        require_precision("bfloat16", GPU)
    assert asked == [False]
    require_precision(None, GPU)
    require_precision("bfloat16", CPU)
