"""Sparse upcycling: what the new model computes, and that it is an ordinary checkpoint."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from dpmoe_trainer.models import (
    DPMoEBertForSequenceClassification,
    UnusableModel,
    load_model,
    select_trainable,
    upcycle,
)


def save(model, folder):
    model.save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save(model, tmp_path_factory.mktemp("dense"))


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1], [5]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def upcycled(dense, seed=0, layers=(0, 2), **settings):
    return upcycle(dense, experts=4, top_k=2, layers=layers, num_labels=3, seed=seed, **settings)


def test_equal_experts_compute_what_the_dense_model_did(dense, tokens):
    model = upcycled(dense, perturbation=0.0).double()
    model.set_experts_implementation("eager")
    bert = BertModel.from_pretrained(dense, add_pooling_layer=False).double().eval()
    mask = tokens["attention_mask"][..., None]
    hidden = bert(**tokens).last_hidden_state
    with torch.no_grad():
        expected = model.classifier((hidden * mask).sum(1) / mask.sum(1))
        assert torch.allclose(model(**tokens).logits, expected, rtol=0, atol=1e-12)
        assert expected.std() > 1e-3


def test_the_perturbation_makes_experts_differ_a_little(dense):
    exact, perturbed = upcycled(dense, perturbation=0.0), upcycled(dense)
    for name in ("up_proj", "down_proj"):
        before = getattr(exact.layers[0].experts, name).detach()
        change = getattr(perturbed.layers[0].experts, name).detach() - before
        assert float(change.std() / before.std()) == pytest.approx(0.01, rel=0.1)
        assert not torch.equal(change[0], change[1])


def test_router_and_head_start_small_and_from_the_seed(dense):
    model = upcycled(dense, seed=3)
    routers = torch.cat([model.layers[index].router.weight.flatten() for index in (0, 2)])
    assert float(routers.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not model.classifier.bias.any()
    same, other = upcycled(dense, seed=3).state_dict(), upcycled(dense, seed=4).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.classifier.weight, other["classifier.weight"])


def test_only_the_chosen_layers_have_experts_and_dropout_is_off(dense):
    model = upcycled(dense, layers=[1])
    assert [hasattr(layer, "experts") for layer in model.layers] == [False, True, False]
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert not any(dropouts)


def test_it_is_saved_and_loaded_as_any_checkpoint(dense, tokens, tmp_path):
    model = upcycled(dense)
    folder = save(model, tmp_path)
    assert not list(folder.glob("*.bin"))
    assert AutoConfig.from_pretrained(folder).moe_layers == [0, 2]
    automatic = AutoModelForSequenceClassification.from_pretrained(folder)
    for loaded in (automatic, load_model(folder, 3)):
        assert isinstance(loaded, DPMoEBertForSequenceClassification)
        weights = loaded.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], v) for name, v in model.state_dict().items())
        assert torch.allclose(loaded(**tokens).logits, model(**tokens).logits, atol=1e-6)


def test_every_experts_implementation_agrees(dense, tokens):
    model = upcycled(dense)
    outputs = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        outputs.append(model(**tokens).logits)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "first"),
    [(["layers.2.*", "classifier.*"], 2), (["layers.0.experts.*"], 0), (["classifier.*"], 3)],
)
def test_the_lower_part_and_the_rest_make_the_whole(dense, tokens, patterns, first):
    model = upcycled(dense)
    select_trainable(model, patterns)
    assert model.first_trainable_layer == first
    hidden = model.lower(**tokens)
    assert not hidden.requires_grad
    rest = model(hidden_states=hidden, attention_mask=tokens["attention_mask"])
    assert torch.allclose(rest.logits, model(**tokens).logits, atol=1e-6)
    halved = model(hidden_states=hidden.half(), attention_mask=tokens["attention_mask"])
    assert halved.logits.dtype == torch.float32


def test_trained_embeddings_leave_no_frozen_part(dense, tokens):
    model = upcycled(dense)
    select_trainable(model, ["embeddings.LayerNorm.*"])
    with pytest.raises(ValueError, match="embeddings are trained"):
        model.lower(**tokens)


def test_the_forward_takes_tokens_or_hidden_states(dense, tokens):
    model = upcycled(dense)
    with pytest.raises(ValueError, match="exactly one"):
        model(attention_mask=tokens["attention_mask"])
    with pytest.raises(ValueError, match="exactly one"):
        model(**tokens, hidden_states=torch.zeros(4, 7, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k is 5 of 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"layers": [3]}, "layers are"),
        ({"layers": [-1]}, "layers are"),
        ({"layers": [1, 1]}, "distinct"),
        ({"layers": []}, "layers are"),
        ({"num_labels": 1}, "num_labels is 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(dense, settings, message):
    fitting = {"experts": 4, "top_k": 2, "layers": [1], "num_labels": 2, "seed": 0}
    with pytest.raises(ValueError, match=message):
        upcycle(dense, **fitting | settings)


def test_other_models_are_refused(tmp_path):
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    with pytest.raises(UnusableModel, match="'gpt2'"):
        upcycled(save(GPT2Model(config), tmp_path))
    decoder = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        is_decoder=True,
    )
    with pytest.raises(UnusableModel, match="is_decoder True"):
        upcycled(save(BertModel(decoder), tmp_path))
