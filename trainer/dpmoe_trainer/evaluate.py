"""Scores the trained model on the plan's evaluation set: the one set whose scores may be told.

Its owner declared it public or held out for this. Nothing is ever scored on the private rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpmoe_trainer.contract import Evaluation
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.dp.losses import IGNORED


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, physical_batch: int) -> Evaluation:
    """The accuracy, beside what always naming the largest class would get.

    A language model is scored token by token, each by the tokens before it.
    """
    model.eval()
    correct, loss, classes = 0, 0.0, 0
    counts: Tensor | None = None
    by_token = False
    for batch in rows.physical_batches(range(len(rows)), physical_batch):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        by_token = labels.dim() == 2
        if by_token:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        counted = labels != IGNORED
        logits, labels = logits[counted].float(), labels[counted]
        correct += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        classes += len(labels)
        found = torch.bincount(labels, minlength=logits.shape[-1])
        counts = found if counts is None else counts + found
    assert counts is not None, "a table that was read has rows"
    # Rows of one token each predict nothing.
    scored = max(classes, 1)
    return Evaluation(
        examples=len(rows),
        accuracy=correct / scored,
        majority_share=int(counts.max()) / scored,
        perplexity=_perplexity(loss / scored) if by_token else None,
    )


def _perplexity(loss: float) -> float | None:
    """None for a model that is so far off that it has none that can be written."""
    return math.exp(loss) if loss < 700 else None
