"""Tiny real things that tests of trainer and cluster share: rows, a tokenizer, a mixture."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MixtralConfig,
    MixtralForSequenceClassification,
    MixtralPreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "is"]
"""All words that the tiny tokenizers know."""


def sentences(count: int) -> list[dict[str, Any]]:
    """Rows of two classes that one word tells apart, of different lengths."""
    return [
        {
            "text": " ".join(["the film was", ["bad", "good"][row % 2], "a plot " * (row % 3)]),
            "label": row % 2,
            "user": f"user{row % 5}",
        }
        for row in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def save_mixtral(
    folder: Path,
    words: list[str],
    kind: type[MixtralPreTrainedModel] = MixtralForSequenceClassification,
) -> None:
    """Save a Mixtral of two layers and four experts, with its tokenizer."""
    tokenizer = tokenizer_of(words)
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
