"""Loads mixture-of-experts models and their tokenizers, from folders or pinned hub revisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dpmoe_trainer.models.checkpoint import UnusableModel, inspect_folder, require_complete

# No pickles and no code are ever fetched.
_FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model")


def load_model(
    source: str | Path,
    num_labels: int | None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Loads a mixture of experts.

    Args:
        source: A folder with a model's files, or a hub id together with `revision`.
        num_labels: Classes of a sequence classifier; None for a language model, causal or with
            encoder and decoder.
        revision: The hub commit to use.
        dtype: What the parameters are kept in.

    Returns:
        The model, in evaluation mode. A head that the checkpoint lacks is freshly initialised.

    Raises:
        UnusableModel: The model is refused; the message names why.
    """
    folder = resolve(source, revision)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UnusableModel(f"{folder}: transformers cannot read config.json: {error}") from error
    if num_labels is None and getattr(config, "is_encoder_decoder", False):
        factory = AutoModelForSeq2SeqLM
    elif num_labels is None:
        factory = AutoModelForCausalLM
    else:
        factory = AutoModelForSequenceClassification
        config.num_labels = num_labels
        config.problem_type = "single_label_classification"
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = load_tokenizer(folder).pad_token_id
    _require_experts(folder, factory, config)
    model, loading = factory.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    require_complete(folder, loading, new=("classifier.", "score."))
    return model.eval()


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """Loads the tokenizer of a model; one without a padding token pads with its end token.

    Raises:
        UnusableModel: The model is refused, or the tokenizer has neither token.
    """
    folder = resolve(source, revision)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UnusableModel(
                f"{folder}: the tokenizer has neither a padding nor an end token: name one in "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The inspected folder of a model; a hub id is fetched into the local cache first.

    Raises:
        UnusableModel: The folder is refused, or the id cannot be fetched, or has no revision.
    """
    folder = Path(source)
    if folder.exists() or folder.is_absolute() or str(source).startswith("."):
        return inspect_folder(folder)
    if revision is None:
        raise UnusableModel(
            f"{source} is no folder here: give a folder, or for a hub model its revision (commit)"
        )
    try:
        fetched = snapshot_download(str(source), revision=revision, allow_patterns=list(_FETCHED))
    except Exception as error:
        raise UnusableModel(
            f"{source} at revision {revision} is neither cached nor reachable: {error}"
        ) from error
    return inspect_folder(Path(fetched))


def _require_experts(folder: Path, factory: Any, config: Any) -> None:
    """Builds the model without its weights and looks for experts."""
    try:
        with torch.device("meta"):
            skeleton = factory.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UnusableModel(
            f"{folder}: model_type {config.model_type!r} has no such model in transformers: {error}"
        ) from error
    if not any(name.split(".")[-1] == "experts" for name, _ in skeleton.named_modules()):
        raise UnusableModel(
            f"{folder}: model_type {config.model_type!r} has no experts module, so it is no "
            "mixture of experts: use one, or make one with dpmoe_trainer.models.upcycle"
        )
