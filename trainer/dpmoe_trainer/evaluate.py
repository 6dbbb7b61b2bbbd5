"""Scores the trained model on the plan's evaluation set: the one set whose scores may be told.

Its owner declared it public or held out for this. Nothing is ever scored on the private rows.
"""

import torch
from torch import nn

from dpmoe_trainer.contract import Evaluation
from dpmoe_trainer.data.rows import Rows


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, physical_batch: int) -> Evaluation:
    """The accuracy, beside what always naming the largest class would get."""
    model.eval()
    correct = 0
    counts: torch.Tensor | None = None
    for batch in rows.physical_batches(range(len(rows)), physical_batch):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        correct += int((logits.argmax(-1) == labels).sum())
        counted = torch.bincount(labels, minlength=logits.shape[-1])
        counts = counted if counts is None else counts + counted
    assert counts is not None, "a table that was read has rows"
    return Evaluation(
        examples=len(rows),
        accuracy=correct / len(rows),
        majority_share=int(counts.max()) / len(rows),
    )
