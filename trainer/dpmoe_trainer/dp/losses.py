"""Each sample's own loss, from a batch's logits.

A model's loss is a mean over the batch, whose divisor may depend on the other samples (their
number, their lengths, a given `num_items_in_batch`). Here a sample's loss is what the model's loss
is on that sample alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.dp.uses import wide

IGNORED = -100
"""The label of a token that does not count."""


def per_sample_losses(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's loss.

    Args:
        model: A transformers model, whose class says which loss it has.
        logits: What it returned for the batch.
        labels: [B] or [B, 1] classes, or [B, T] tokens with -100 where none counts.

    Returns:
        [B] losses: the cross entropy of the class, or the mean cross entropy of the sample's own
        counted tokens (zero if none counts): the next ones, or those that a decoder writes.

    Raises:
        NotPerSample: The model has another loss.
    """
    kind = getattr(model, "loss_type", None)
    if kind == "ForSequenceClassification":
        return _classification(model, logits, labels)
    if kind == "ForCausalLM":
        # As transformers does it: in float32, and the last token predicts nothing.
        return _mean_over_tokens(logits.float(), F.pad(labels[:, 1:], (0, 1), value=IGNORED))
    if kind == "ForConditionalGeneration" and getattr(model.config, "is_encoder_decoder", False):
        return _mean_over_tokens(wide(logits), labels)
    raise NotPerSample(
        f"{type(model).__name__} has the loss {kind!r}: use a model for sequence classification, "
        "for causal language modelling or with encoder and decoder"
    )


def _classification(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    problem = getattr(model.config, "problem_type", None)
    if problem not in (None, "single_label_classification") or logits.shape[-1] < 2:
        raise NotPerSample(
            f"config.problem_type is {problem!r} with {logits.shape[-1]} labels: only single-label "
            "classification with two or more labels is supported"
        )
    return F.cross_entropy(logits, labels.view(-1), ignore_index=IGNORED, reduction="none")


def _mean_over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    token_losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    counted = (targets != IGNORED).sum(1)
    return token_losses.sum(1) / counted.clamp_min(1)
