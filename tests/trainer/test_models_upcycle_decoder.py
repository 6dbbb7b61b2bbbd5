"""Sparse upcycling of dense decoders: the same function, in a family that transformers knows."""

import pytest
import torch
from tests.trainer.test_models_upcycle import save
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
)

from dpmoe_trainer.dp import check_model
from dpmoe_trainer.models import UnusableModel, load_model, upcycle

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}

DENSE = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=ROPE, rms_norm_eps=1e-3)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=3)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=4, attention_bias=True)),
}
LANGUAGE = {
    "llama": MixtralForCausalLM,
    "mistral": MixtralForCausalLM,
    "qwen3": Qwen3MoeForCausalLM,
}
LAYERS = {"llama": [0, 1], "mistral": [1, 0], "qwen3": [1]}


@pytest.fixture(params=DENSE)
def family(request):
    return request.param


def dense(family, folder):
    torch.manual_seed(0)
    model = DENSE[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(model, folder)
    return model


def upcycled(folder, family, labels=None, **settings):
    return upcycle(
        folder, experts=4, top_k=2, layers=LAYERS[family], num_labels=labels, seed=0, **settings
    )


def tokens():
    return torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(1))


def test_equal_experts_compute_what_the_dense_model_did(family, tmp_path):
    expected = dense(family, tmp_path)(tokens()).logits
    model = upcycled(tmp_path, family, perturbation=0.0)
    assert type(model) is LANGUAGE[family]
    assert expected.std() > 0.1
    assert torch.allclose(model(tokens()).logits, expected, atol=1e-5)


def test_it_is_saved_and_loaded_as_any_checkpoint(family, tmp_path):
    dense(family, tmp_path / "dense")
    model = upcycled(tmp_path / "dense", family)
    save(model, tmp_path / "sparse")
    loaded = load_model(tmp_path / "sparse", None)
    assert type(loaded) is type(model)
    assert loaded.config.tie_word_embeddings == (family == "llama")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-6)


def test_experts_differ_a_little_and_come_from_the_seed(family, tmp_path):
    dense(family, tmp_path)
    one, same = upcycled(tmp_path, family), upcycled(tmp_path, family)
    experts = one.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        apart = (weight[0] - weight[1]).std() / weight.std()
        assert apart.item() == pytest.approx(0.01 * 2**0.5, rel=0.2)
    assert all(torch.equal(same.state_dict()[name], v) for name, v in one.state_dict().items())


def test_a_classifier_has_a_new_head(family, tmp_path):
    dense(family, tmp_path)
    model = upcycled(tmp_path, family, labels=3)
    assert isinstance(model, MixtralForSequenceClassification | Qwen3MoeForSequenceClassification)
    assert model(tokens()).logits.shape == (3, 3)
    assert float(model.score.weight.detach().std()) == pytest.approx(0.02, rel=0.4)


def test_it_can_be_clipped(family, tmp_path):
    dense(family, tmp_path)
    check_model(upcycled(tmp_path, family))


def test_a_mixtral_has_experts_in_every_layer(tmp_path):
    dense("llama", tmp_path)
    with pytest.raises(ValueError, match="as a whole only: choose all of 0 to 1"):
        upcycle(tmp_path, experts=2, top_k=1, layers=[1], num_labels=None, seed=0)


@pytest.mark.parametrize("field", ["mlp_bias", "attention_bias"])
def test_biases_that_the_sparse_family_lacks_are_refused(field, tmp_path):
    save(LlamaForCausalLM(LlamaConfig(**SHAPE, **{field: True})), tmp_path)
    with pytest.raises(UnusableModel, match=rf"config\.{field} is True"):
        upcycled(tmp_path, "llama")


def test_a_bert_needs_classes(tmp_path):
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    save(BertModel(BertConfig(**shape)), tmp_path)
    with pytest.raises(ValueError, match="num_labels is None"):
        upcycle(tmp_path, experts=2, top_k=1, layers=[1], num_labels=None, seed=0)
