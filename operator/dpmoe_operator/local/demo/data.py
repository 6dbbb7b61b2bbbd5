"""Lays out the demo's volumes: private sentences, public evaluation sentences, the model."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from dpmoe_operator.local.demo.downloads import fetch_model, fetch_sentences

UNITS_PER_BLOCK = 4800
SEED = 20210714


def prepare_volumes(volumes: Path, downloads: Path) -> None:
    """Fill the claims `sentences`, `models` and `results` of namespace `reviews`.

    The sentences are shuffled once with a fixed seed: two blocks of 4,800, and the rest, about a
    thousand, as the public evaluation set. A sentence's label is the sign of its mean rating.
    """
    claims = volumes / "reviews"
    sentences = claims / "sentences"
    sentences.mkdir(parents=True, exist_ok=True)
    (claims / "results").mkdir(exist_ok=True)
    rows = [(int(rating > 0), text) for rating, text in fetch_sentences(downloads)]
    random.Random(SEED).shuffle(rows)
    private, public = rows[: 2 * UNITS_PER_BLOCK], rows[2 * UNITS_PER_BLOCK :]
    _write(
        sentences / "train.jsonl",
        (
            {"text": text, "label": label, "part": str(1 + i // UNITS_PER_BLOCK)}
            for i, (label, text) in enumerate(private)
        ),
    )
    _write(
        sentences / "evaluation.jsonl", ({"text": text, "label": label} for label, text in public)
    )
    fetch_model(downloads, claims / "models" / "minilm")


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
