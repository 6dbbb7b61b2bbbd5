"""LoRA: what is trained, that it computes what peft does, and that it merges into a plain model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.trainer.families import build, make_batch
from torch import nn

from dpmoe_trainer.dp import NotPerSample, clipped_sum
from dpmoe_trainer.models.lora import add_lora, merged


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_attention_and_experts_get_adapters_and_the_rest_is_frozen():
    model = add_lora(build("mixtral-lm"), rank=2, alpha=4.0)
    names = trained(model)
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert sum("self_attn" in name for name in names) == 2 * 2 * 4
    # Two weights of the experts, two factors each, in two layers.
    assert sum("mlp.experts" in name for name in names) == 2 * 2 * 2


def test_each_part_may_be_left_out():
    attention = add_lora(build("mixtral-lm"), 2, 4.0, experts=False)
    experts = add_lora(build("mixtral-lm"), 2, 4.0, attention=False)
    assert trained(attention)
    assert trained(experts)
    assert not any("experts" in name for name in trained(attention))
    assert not any("attn" in name for name in trained(experts))


def test_a_classifiers_head_is_trained_too():
    names = trained(add_lora(build("mixtral-classifier"), rank=2, alpha=4.0))
    assert any("score" in name for name in names)


@pytest.mark.parametrize(("rank", "attention", "experts"), [(0, True, True), (2, False, False)])
def test_adapters_of_nothing_are_refused(rank, attention, experts):
    with pytest.raises(ValueError, match=r"rank is 0|nothing to adapt"):
        add_lora(build("mixtral-lm"), rank, 4.0, attention, experts)


@pytest.mark.parametrize("family", ["mixtral-lm", "gpt-oss-lm", "switch"])
def test_merging_gives_an_ordinary_checkpoint(family, tmp_path):
    model = add_lora(build(family, torch.float32), rank=2, alpha=4.0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    batch = make_batch(model, 3, 6)
    logits = model(**batch).logits
    plain = merged(model)
    assert type(plain) is type(build(family))
    assert not any("lora" in name for name in plain.state_dict())
    assert torch.allclose(plain(**batch).logits, logits, atol=1e-4)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.allclose(again(**batch).logits, logits, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral-lora", "switch-lora"])
def test_merged_adapters_are_not_trained(family):
    model = build(family)
    model.merge_adapter()
    with pytest.raises(NotPerSample, match="merged"):
        clipped_sum(model, make_batch(model, 2, 4), 1.0)


def test_experts_of_a_layer_are_adapted_alike():
    model = get_peft_model(build("switch"), LoraConfig(target_modules=r".*expert_0\.w[io]"))
    with pytest.raises(NotPerSample, match="some have none"):
        clipped_sum(model, make_batch(model, 2, 4), 1.0)


def test_a_router_is_not_adapted():
    model = get_peft_model(build("mixtral-lm"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(NotPerSample, match="all-linear takes routers"):
        clipped_sum(model, make_batch(model, 2, 4), 1.0)


def test_the_model_is_left_as_it_was():
    model = build("mixtral-lora")
    batch = make_batch(model, 3, 5)
    before = model(**batch).logits
    clipped_sum(model, batch, 1.0)
    assert torch.equal(model(**batch).logits, before)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not any(name.startswith("_dpmoe") for name in vars(module))
    assert isinstance(model, nn.Module)
