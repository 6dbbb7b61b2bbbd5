"""What may be loaded as a model, and what is refused, by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from dpmoe_trainer.models import UnusableModel, load_model, load_tokenizer, select_trainable

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save(model, folder, **tokens):
    torch.manual_seed(0)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"[UNK]": 0, "</s>": 1, "good": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", **{"eos_token": "</s>"} | tokens
    ).save_pretrained(folder)
    return folder


def mixtral(cls=MixtralForSequenceClassification, **settings):
    torch.manual_seed(0)
    config = MixtralConfig(
        **SHAPE,
        num_key_value_heads=2,
        num_local_experts=3,
        bos_token_id=None,
        eos_token_id=1,
        **settings,
    )
    return cls(config)


@pytest.fixture
def folder(tmp_path):
    return save(mixtral(), tmp_path)


def test_a_mixture_of_experts_is_loaded(folder):
    model = load_model(folder, 2)
    assert isinstance(model, MixtralForSequenceClassification)
    assert not model.training
    original = mixtral().state_dict()
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in original.items())
    assert model.dtype == torch.float32


def test_an_encoder_and_decoder_is_loaded(tmp_path):
    config = SwitchTransformersConfig(
        vocab_size=3,
        d_model=16,
        d_ff=16,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )
    original = SwitchTransformersForConditionalGeneration(config)
    model = load_model(save(original, tmp_path, pad_token="[UNK]"), None)
    assert isinstance(model, SwitchTransformersForConditionalGeneration)
    assert model.lm_head.weight is model.shared.weight
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in original.state_dict().items())


def test_a_checkpoint_without_a_head_gets_one_for_the_labels(tmp_path):
    save(mixtral(MixtralForCausalLM), tmp_path)
    model = load_model(str(tmp_path), 5)
    assert model.score.weight.shape == (5, 16)
    assert isinstance(load_model(tmp_path, None), MixtralForCausalLM)


def test_models_that_have_no_padding_token_pad_with_their_end_token(folder):
    assert load_tokenizer(folder).pad_token == "</s>"
    assert load_model(folder, 2).config.pad_token_id == 1


def test_a_tokenizer_without_either_token_is_refused(tmp_path):
    save(mixtral(), tmp_path, eos_token=None)
    with pytest.raises(UnusableModel, match="neither a padding nor an end token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_pickled_weights_are_refused_by_name(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnusableModel, match=rf"only pickled ones \({name}\)"):
        load_model(folder, 2)


def test_a_pickle_beside_safetensors_is_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(folder, 2)


def test_weights_that_cannot_be_read_are_named_with_the_reason(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(UnusableModel, match=r"model\.safetensors cannot be read \(Too many levels"):
        load_model(folder, 2)


def test_an_index_must_point_to_safetensors_of_the_folder(folder):
    for shard in ("../other.safetensors", "pytorch_model.bin"):
        index = {"weight_map": {"score.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UnusableModel, match="points to"):
            load_model(folder, 2)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_models_with_code_of_their_own_are_refused(folder, name):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UnusableModel, match=f"{name} has auto_map"):
        load_model(folder, 2)


def test_code_in_the_folder_is_refused(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    with pytest.raises(UnusableModel, match=r"custom_generate/generate\.py"):
        load_model(folder, 2)


def test_adapters_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnusableModel, match="adapter"):
        load_model(folder, 2)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"no config\.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights in safetensors, none"),
    ],
)
def test_missing_files_are_named(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(UnusableModel, match=message):
        load_model(folder, 2)


def test_dense_models_are_refused(tmp_path):
    save(BertForSequenceClassification(BertConfig(**SHAPE)), tmp_path, pad_token="[UNK]")
    with pytest.raises(UnusableModel, match="'bert' has no experts"):
        load_model(tmp_path, 2)


def test_checkpoints_that_lack_experts_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    dropped = [name for name in weights if "layers.1" in name and "experts" in name]
    assert dropped
    for name in dropped:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"layers\.1.*experts.*missing"):
        load_model(folder, 2)


def test_unknown_models_are_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UnusableModel, match=r"cannot read config\.json"):
        load_model(folder, 2)
    (folder / "config.json").write_text("{")
    with pytest.raises(UnusableModel, match="not JSON"):
        load_model(folder, 2)


def test_a_hub_model_needs_its_revision():
    with pytest.raises(UnusableModel, match="revision"):
        load_model("some-team/some-model", 2)


def test_a_hub_model_that_is_neither_cached_nor_reachable_is_refused(monkeypatch):
    def unreachable(repo_id, *, revision, allow_patterns):
        assert (repo_id, revision) == ("some-team/some-model", "abc")
        assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in allow_patterns)
        raise OSError("no route")

    monkeypatch.setattr("dpmoe_trainer.models.load.snapshot_download", unreachable)
    with pytest.raises(UnusableModel, match="neither cached nor reachable: no route"):
        load_model("some-team/some-model", 2, revision="abc")


def test_a_fetched_hub_model_is_inspected_as_any_folder(monkeypatch, folder):
    monkeypatch.setattr(
        "dpmoe_trainer.models.load.snapshot_download", lambda *args, **kwargs: str(folder)
    )
    load_model("some-team/some-model", 2, revision="abc")
    (folder / "modeling.py").write_text("")
    with pytest.raises(UnusableModel, match=r"modeling\.py"):
        load_model("some-team/some-model", 2, revision="abc")


def test_patterns_choose_what_is_trained():
    model = mixtral()
    trained = select_trainable(model, ["model.layers.1.mlp.*", "score.*"])
    assert trained == [
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "score.weight",
    ]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert select_trainable(model, ["*.gate.weight"]) == [
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    ]


def test_a_pattern_that_matches_nothing_is_named_and_nothing_changes():
    model = mixtral()
    with pytest.raises(ValueError, match=r"'layers\.9\.\*'"):
        select_trainable(model, ["score.*", "layers.9.*"])
    with pytest.raises(ValueError, match="no patterns"):
        select_trainable(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())
