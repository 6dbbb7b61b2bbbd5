"""A BERT encoder with mixture-of-experts layers, for sequence classification.

The layers named in `config.moe_layers` have E experts and a top-k router in place of their
feed-forward network; the others are transformers' own BERT layers. Hidden states are mean-pooled
over a sequence's real tokens. Everything computes in the model's own dtype, routing is top-k per
token without capacity, and no loss couples samples, so that a sample's gradient is its own.

Registered with transformers' `AutoConfig` and `AutoModelForSequenceClassification`, saved and
loaded as any checkpoint.

Shapes: B samples, T tokens, N = B·T, D hidden, F feed-forward, E experts, K of them for a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, initialization
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertLayer,
    BertPreTrainedModel,
)


class DPMoEBertConfig(BertConfig):
    """BERT's configuration, and which layers have how many experts.

    Attributes:
        num_experts: E, experts of each mixture-of-experts layer.
        num_experts_per_tok: K, experts that compute a token.
        moe_layers: Indices of the layers with experts.
    """

    model_type = "dpmoe_bert"

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    tie_word_embeddings: bool = False


class DPMoEBertRouter(nn.Module):
    """Scores the experts for each token and weighs the K best with a softmax over their scores.

    `selection_bias` is added to the scores where the best are chosen, and nowhere else: raising an
    expert's sends more tokens there, without a gradient (Wang et al. 2024, "Auxiliary-loss-free
    load balancing strategy for mixture-of-experts", arXiv 2408.15664). It is zero unless balancing
    moves it, and part of the model.
    """

    selection_bias: Tensor

    def __init__(self, config: DPMoEBertConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def forward(self, tokens_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns all scores, [N, E], and the chosen experts' weights and places, both [N, K]."""
        scores_NE = F.linear(tokens_ND, self.weight)
        experts_NK = (scores_NE + self.selection_bias).topk(self.top_k, dim=-1).indices
        return scores_NE, scores_NE.gather(1, experts_NK).softmax(dim=-1), experts_NK


@use_experts_implementation(has_gate=False, has_bias=True)
class DPMoEBertExperts(nn.Module):
    """E copies of BERT's feed-forward network, in fused weights."""

    def __init__(self, config: DPMoEBertConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, inner))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Plain reference: [N, D] tokens through their experts, one expert after another."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            inner = F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            outer = F.linear(
                self.act_fn(inner), self.down_proj[expert], self.down_proj_bias[expert]
            )
            weighted = outer * top_k_weights[token, choice, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output


class DPMoEBertLayer(GradientCheckpointingLayer):
    """BERT's layer with experts in place of its feed-forward network."""

    def __init__(self, config: DPMoEBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_idx=layer_idx)
        self.router = DPMoEBertRouter(config)
        self.experts = DPMoEBertExperts(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        tokens_ND = attended.reshape(-1, attended.shape[-1])
        _, weights_NK, experts_NK = self.router(tokens_ND)
        mixed = self.experts(tokens_ND, experts_NK, weights_NK).view_as(attended)
        return self.LayerNorm(mixed + attended)


class DPMoEBertForSequenceClassification(BertPreTrainedModel):
    """Embeddings, layers, mean pooling and a linear classifier.

    Where the lower layers are frozen, `lower` computes them once and `forward(hidden_states=…)`
    goes on from there, as often as training needs.
    """

    config: DPMoEBertConfig
    config_class = DPMoEBertConfig
    base_model_prefix = "encoder"
    _no_split_modules = ("BertEmbeddings", "BertLayer", "DPMoEBertLayer")

    def __init__(self, config: DPMoEBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.embeddings = BertEmbeddings(config)
        moe_layers = set(config.moe_layers or ())
        self.layers = nn.ModuleList(
            (DPMoEBertLayer if index in moe_layers else BertLayer)(config, layer_idx=index)
            for index in range(config.num_hidden_layers)
        )
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DPMoEBertRouter):
            initialization.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, DPMoEBertExperts):
            for weight in (module.up_proj, module.down_proj):
                initialization.normal_(weight, mean=0.0, std=std)
            for bias in (module.up_proj_bias, module.down_proj_bias):
                initialization.zeros_(bias)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    @property
    def first_trainable_layer(self) -> int:
        """The lowest layer with a trained parameter; the number of layers if none has one.

        Raises:
            ValueError: The embeddings are trained, so no part below any layer is frozen.
        """
        if any(parameter.requires_grad for parameter in self.embeddings.parameters()):
            raise ValueError("the embeddings are trained: freeze them to have a frozen lower part")
        for index, layer in enumerate(self.layers):
            if any(parameter.requires_grad for parameter in layer.parameters()):
                return index
        return len(self.layers)

    @property
    def lower_has_experts(self) -> bool:
        """Whether the frozen part holds layers of experts."""
        return any(layer < self.first_trainable_layer for layer in self.config.moe_layers or ())

    @torch.no_grad()
    def lower(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Runs the frozen part: embeddings and the layers below `first_trainable_layer`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], one for a real token.
            token_type_ids: [B, T], all zero by default.

        Returns:
            [B, T, D] hidden states for `forward(hidden_states=…)`.
        """
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        return self._run(hidden, attention_mask, 0, self.first_trainable_layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classifies a batch.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], one for a real token; all ones by default.
            token_type_ids: [B, T], all zero by default.
            labels: [B] classes; then the output has their mean cross entropy.
            hidden_states: [B, T, D] from `lower`, in place of `input_ids`.
            **kwargs: Ignored, such as `return_dict`.

        Raises:
            ValueError: Not exactly one of `input_ids` and `hidden_states` is given.
        """
        if (input_ids is None) == (hidden_states is None):
            raise ValueError("give exactly one of input_ids and hidden_states")
        if hidden_states is None:
            start = 0
            hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        else:
            start = self.first_trainable_layer
            hidden = hidden_states.to(self.dtype)
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        hidden = self._run(hidden, attention_mask, start, len(self.layers))
        logits = self.classifier(_mean_over_tokens(hidden, attention_mask))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _run(self, hidden: Tensor, attention_mask: Tensor, start: int, stop: int) -> Tensor:
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask
        )
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, mask)
        return hidden


def _mean_over_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    mask_BT1 = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)


AutoConfig.register(DPMoEBertConfig.model_type, DPMoEBertConfig)
AutoModelForSequenceClassification.register(DPMoEBertConfig, DPMoEBertForSequenceClassification)
