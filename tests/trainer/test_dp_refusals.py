"""What the engine will not clip: every refusal names its culprit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForSequenceClassification,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dpmoe_trainer.dp import NotPerSample, UncoveredParameter, check_model, clipped_sum
from dpmoe_trainer.models import DPMoEBertConfig, DPMoEBertForSequenceClassification

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "num_labels": 2,
}


def bert(cls=DPMoEBertForSequenceClassification):
    torch.manual_seed(0)
    return cls(DPMoEBertConfig(**SHAPE, num_experts=3, moe_layers=[1]))


def mixtral(cls=MixtralForSequenceClassification, **settings):
    torch.manual_seed(0)
    config = SHAPE | {"num_key_value_heads": 2, "num_local_experts": 3}
    return cls(MixtralConfig(**config | {"bos_token_id": 1, "eos_token_id": 2} | settings))


def batch(samples=3, length=5, **more):
    ids = torch.randint(3, 40, (samples, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    labels = torch.arange(samples) % 2
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | more


class WithHeadForSequenceClassification(DPMoEBertForSequenceClassification):
    """A classifier with a head that the test gives it."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = self.head(output.logits)
        return output


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv1d(1, 1, 1)

    def forward(self, logits):
        return self.kernel(logits[:, None])[:, 0]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, logits):
        return logits + self.shift


class Normed(nn.Module):
    """Multiplies a parameter of another shape than the rows' width."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1))

    def forward(self, logits):
        return logits * self.scale


class Remembering(nn.Module):
    """Counts what it saw, as loss-free balancing counts the experts' tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, logits):
        with torch.no_grad():
            self.seen += logits.sum(0)
        return self.layer(logits)


class Borrowed(nn.Module):
    """Has one weight in two experts' places: for those there is no cross term."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, logits):
        return logits + F.linear(logits, self.weight[0, :2, :2])


class ExpertChoice(nn.Module):
    """Experts choose the batch's best tokens for them."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 3)

    def forward(self, hidden):
        scores = self.router(hidden.flatten(0, 1))
        best = scores.topk(4, dim=0).indices
        kept = torch.zeros_like(scores).scatter(0, best, 1.0)
        return hidden * (scores * kept).sum(1).view(*hidden.shape[:2], 1)


class Cached(nn.Module):
    """Uses a view of its weight that was taken before the engine could see it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))
        self.view = self.weight.view(2, 2)

    def forward(self, logits):
        return logits @ self.view + 0 * F.linear(logits, self.weight)


class Overwriting(nn.Module):
    """Changes its layer's input after the layer has read it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, logits):
        output = self.layer(logits)
        logits.mul_(2)
        return output


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, logits):
        rows = logits[:, None]
        return self.attention(rows, rows, rows)[0][:, 0]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (Convolution, "head.kernel.weight"),
        (Shifted, "head.shift"),
        (Normed, "head.scale"),
        (Cached, "head.weight"),
        (Attended, "head.attention.in_proj_weight"),
    ],
)
def test_a_parameter_without_a_rule_is_named(head, name):
    model = bert(WithHeadForSequenceClassification)
    model.head = head()
    with pytest.raises(UncoveredParameter, match=name):
        clipped_sum(model, batch(), 1.0)
    model.head.requires_grad_(False)
    clipped_sum(model, batch(), 1.0)


def test_a_changed_input_is_found():
    model = bert(WithHeadForSequenceClassification)
    model.head = Overwriting()
    with pytest.raises(NotPerSample, match="in place"):
        clipped_sum(model, batch(), 1.0)


def test_a_refusal_leaves_the_model_usable():
    model = bert(WithHeadForSequenceClassification).train()
    model.head = Convolution()
    before = model.config._experts_implementation
    with pytest.raises(UncoveredParameter):
        clipped_sum(model, batch(), 1.0)
    assert model.training
    assert model.config._experts_implementation == before
    model(**batch()).logits.sum().backward()
    assert model.head.kernel.weight.grad is not None


def test_a_parameter_that_is_not_used_is_named():
    model = bert()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UncoveredParameter, match=r"extra\.weight"):
        clipped_sum(model, batch(), 1.0)


def test_trained_layers_below_cached_hidden_states_are_named():
    model = bert()
    model.embeddings.requires_grad_(False)
    given = batch(hidden_states=torch.randn(3, 5, 16))
    del given["input_ids"]
    model.layers[0].requires_grad_(False)
    clipped_sum(model, given, 1.0)
    model.embeddings.requires_grad_(True)
    with pytest.raises(ValueError, match="embeddings are trained"):
        clipped_sum(model, given, 1.0)


def test_weights_shared_with_experts_are_named():
    model = bert(WithHeadForSequenceClassification)
    experts = model.layers[1].experts
    model.head = Borrowed(experts.up_proj)
    with pytest.raises(UncoveredParameter, match=r"experts\.up_proj.*__getitem__"):
        clipped_sum(model, batch(), 1.0)
    other = type(experts)(model.config)
    other.load_state_dict(experts.state_dict())
    other.up_proj = experts.up_proj
    model.layers[0] = type(model.layers[1])(model.config, layer_idx=0)
    model.layers[0].experts = other
    del model.head
    model.head = nn.Identity()
    with pytest.raises(UncoveredParameter, match=r"experts\.up_proj.*ExpertWeights.*cross term"):
        clipped_sum(model, batch(), 1.0)


def test_a_buffer_that_remembers_data_is_named():
    model = bert(WithHeadForSequenceClassification)
    model.head = Remembering()
    with pytest.raises(NotPerSample, match=r"changed buffer 'head\.seen'"):
        clipped_sum(model, batch(), 1.0)


def test_experts_that_choose_their_tokens_are_named():
    model = bert()
    model.config.router_type = "expert-choice"
    with pytest.raises(NotPerSample, match=r"config\.router_type is 'expert-choice'"):
        clipped_sum(model, batch(), 1.0)
    model = bert()
    choice = ExpertChoice()
    model.choice = choice
    model.embeddings.register_forward_hook(lambda module, inputs, output: choice(output))
    with pytest.raises(NotPerSample, match=r"chooses among all tokens.*expert choice"):
        check_model(model)


def test_a_divisor_from_the_batch_is_refused():
    given = batch(num_items_in_batch=torch.tensor(12))
    with pytest.raises(NotPerSample, match="num_items_in_batch"):
        clipped_sum(bert(), given, 1.0)


def test_half_precision_that_overflows_is_refused():
    with pytest.raises(NotPerSample, match="float16"):
        clipped_sum(bert().half(), batch(), 1.0)
    with torch.autocast("cpu", torch.float16), pytest.raises(NotPerSample, match="float16"):
        clipped_sum(bert(), batch(), 1.0)


def test_the_batch_balancing_loss_is_refused():
    with pytest.raises(NotPerSample, match="output_router_logits"):
        clipped_sum(mixtral(output_router_logits=True), batch(), 1.0)


def test_batch_normalisation_is_refused():
    model = bert(WithHeadForSequenceClassification)
    model.head = nn.BatchNorm1d(2)
    with pytest.raises(NotPerSample, match="'head' is a BatchNorm1d"):
        clipped_sum(model, batch(), 1.0)


def test_a_capacity_for_the_whole_batch_is_refused_by_its_family():
    config = NllbMoeConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_experts=2,
    )
    with pytest.raises(NotPerSample, match=r"'nllb-moe'.*capacity counts the tokens of the whole"):
        clipped_sum(NllbMoeForConditionalGeneration(config), batch(), 1.0)


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_depend_on_the_batch_are_refused(setting):
    model = bert()
    model.embeddings.word_embeddings = nn.Embedding(40, 16, **setting)
    with pytest.raises(UncoveredParameter, match=r"word_embeddings.*max_norm or scale_grad"):
        clipped_sum(model, batch(), 1.0)


def test_other_losses_are_refused():
    model = mixtral()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(NotPerSample, match="multi_label_classification"):
        clipped_sum(model, batch(), 1.0)
    model.loss_type = "ForMaskedLM"
    with pytest.raises(NotPerSample, match="ForMaskedLM"):
        clipped_sum(model, batch(), 1.0)


def test_a_model_without_trained_parameters_is_refused():
    model = bert().requires_grad_(False)
    with pytest.raises(NotPerSample, match="no parameter"):
        clipped_sum(model, batch(), 1.0)


def test_batches_must_have_labels_and_one_row_a_sample():
    given = batch()
    del given["labels"]
    with pytest.raises(NotPerSample, match="labels"):
        clipped_sum(bert(), given, 1.0)
    with pytest.raises(NotPerSample, match="token_type_ids has not as many rows"):
        clipped_sum(bert(), batch(token_type_ids=torch.zeros(1, 5, dtype=torch.long)), 1.0)


class MixingForSequenceClassification(DPMoEBertForSequenceClassification):
    """Subtracts the batch's mean logit: every sample's loss then hangs on the others."""

    def forward(self, **inputs):
        labels = inputs.pop("labels", None)
        output = super().forward(**inputs)
        output.logits = output.logits - output.logits.mean(0)
        output.loss = None if labels is None else F.cross_entropy(output.logits, labels)
        return output


class TransposedForSequenceClassification(DPMoEBertForSequenceClassification):
    """Gives its classifier rows of another order than the samples'."""

    def forward(self, **inputs):
        labels = inputs.pop("labels", None)
        ids = inputs["input_ids"]
        hidden = self.embeddings(input_ids=ids).transpose(0, 1)
        logits = self.classifier(hidden.reshape(ids.shape[0], ids.shape[1], -1)).mean(1)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "cls", [MixingForSequenceClassification, TransposedForSequenceClassification]
)
def test_the_check_finds_models_that_couple_or_mix_samples(cls):
    model = bert(cls)
    with torch.no_grad():
        model.classifier.weight.mul_(10)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(NotPerSample, match="couples or mixes"):
        check_model(model)
    honest = bert().requires_grad_(False)
    honest.classifier.requires_grad_(True)
    check_model(honest)
