"""A tiny model, a tiny private table, and the trainer run on them."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, save_mixtral, sentences, tokenizer_of, write_rows
from tests.trainer.runs import PlanMaker, Trainer
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def fast_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of(WORDS)


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder, WORDS)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tokenizer_of(WORDS)
    torch.manual_seed(0)
    config = BertConfig(
        **SHAPE, vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_plan(tmp_path: Path, tiny_mixtral: Path) -> PlanMaker:
    """A plan that completes, on a private table of 24 rows and a public one of 9."""
    private = write_rows(tmp_path / "private.jsonl", sentences(24))
    public = write_rows(tmp_path / "public.jsonl", sentences(9))

    def data(path: Path) -> dict[str, Any]:
        return {
            "path": str(path),
            "format": "jsonl",
            "textColumn": "text",
            "labelColumn": "label",
        }

    def make(**changes: Any) -> dict[str, Any]:
        plan: dict[str, Any] = {
            "version": 1,
            "job": {"namespace": "team", "name": "tiny", "uid": "u-1"},
            "blocks": [
                {
                    "namespace": "owner",
                    "name": "block",
                    "account": "account",
                    "units": 24,
                    "unit": {"kind": "example"},
                    "data": data(private),
                }
            ],
            "privacy": {
                "epsilon": 20.0,
                "delta": 1e-5,
                "noiseMultiplier": 1.0,
                "samplingRate": 0.5,
                "steps": 3,
                "clippingNorm": 1.0,
                "expectedBatch": 12.0,
                "orders": [2, 3, 4, 6, 8, 16, 32],
            },
            "model": {"path": str(tiny_mixtral), "labels": 2},
            "training": {
                "optimizer": {"name": "sgd", "learningRate": 0.1},
                "maxTokens": 16,
                "physicalBatch": 4,
            },
            "evaluation": {"data": data(public)},
        }
        for path, value in changes.items():
            *parents, last = path.split("__")
            target: Any = plan
            for parent in parents:
                target = target[int(parent) if parent.isdigit() else parent]
            target[last] = value
        return plan

    return make


@pytest.fixture
def trainer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Trainer]:
    """The trainer's command; afterwards the process is as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    disabled = logging.root.manager.disable
    for name in [name for name in os.environ if name.startswith("DPMOE_")]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield Trainer(tmp_path, capfd)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.disable(disabled)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
