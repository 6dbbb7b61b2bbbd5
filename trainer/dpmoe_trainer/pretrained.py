"""The pretrained model that a plan names: read, made a mixture, and set to train what it says."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpmoe_trainer.contract import ModelPlan, TrainingPlan
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.models import load_model, load_tokenizer, select_trainable, upcycle
from dpmoe_trainer.models.load import resolve
from dpmoe_trainer.models.lora import add_lora


def read(plan: TrainingPlan, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plan's model and its tokenizer, as a run begins with them.

    Raises:
        UnusableModel: it is refused; the message names why.
        ValueError: it does not fit the plan.
    """
    # What is fresh in the model (router, head) comes from the plan, so a plan names its start.
    # Noise and sampling have a secret key of their own.
    # By the run, since it may go on with other ranks.
    seed = int(plan.run_digest()[:8], 16)
    torch.manual_seed(seed)
    model, tokenizer = _load(plan.model, settings, seed)
    _check_sizes(model, tokenizer, plan.training.max_tokens)
    return model, tokenizer


def trainable(model: PreTrainedModel, plan: ModelPlan) -> PreTrainedModel:
    """The model with exactly those parameters trainable that the plan means."""
    if plan.lora is None:
        select_trainable(model, plan.trainable or ("*",))
        return model
    lora = plan.lora
    return add_lora(model, lora.rank, lora.alpha, lora.attention, lora.experts)


def _load(
    plan: ModelPlan, settings: Settings, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if plan.path is not None:
        source = str(settings.resolve(plan.path, "model.path").absolute())
    else:
        assert plan.hugging_face is not None, "the contract sets exactly one of the two"
        source = plan.hugging_face
    folder = resolve(source, plan.revision)
    tokenizer = load_tokenizer(folder)
    if plan.upcycle is None:
        return load_model(folder, plan.labels), tokenizer
    return (
        upcycle(
            folder,
            experts=plan.upcycle.experts,
            top_k=plan.upcycle.top_k,
            layers=plan.upcycle.layers,
            num_labels=plan.labels,
            seed=seed,
        ),
        tokenizer,
    )


def _check_sizes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """A row must not be able to break the run by its length or its words."""
    positions = getattr(model.config, "max_position_embeddings", max_tokens)
    if max_tokens > positions:
        raise ValueError(
            f"it takes {positions} tokens at most, and training.maxTokens is {max_tokens}: lower it"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"its tokenizer has {len(tokenizer)} tokens and its vocabulary "
            f"{model.config.vocab_size}: use the tokenizer that belongs to it"
        )
