"""Scores the trained model on the plan's evaluation set: the one set whose scores may be told.

Its owner declared it public or held out for this. Nothing is ever scored on the private rows.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dpmoe_trainer.contract import Evaluation
from dpmoe_trainer.data.rows import Batch, Rows
from dpmoe_trainer.dp.engine import in_lockstep, predict
from dpmoe_trainer.dp.losses import IGNORED
from dpmoe_trainer.dp.sampling import lockstep_batches
from dpmoe_trainer.parallel.collectives import sum_in_place
from dpmoe_trainer.parallel.ranks import ALONE, Ranks


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    rows: Rows,
    physical_batch: int,
    ranks: Ranks = ALONE,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The accuracy, beside what always naming the largest class would get.

    A language model is scored token by token, each by the tokens before it. All ranks score a part
    of the rows each, and get the same scores. `beat` is called for every batch.
    """
    # Correct answers, and the sum of losses; then how often each class is right.
    scores = torch.zeros(2, dtype=torch.float64, device=model.device)
    classes = model.config.vocab_size if rows.learn_tokens else model.config.num_labels
    counts = torch.zeros(classes, dtype=torch.long, device=model.device)
    units = ((row,) for row in range(len(rows)))
    for group in lockstep_batches(units, ranks.world, physical_batch, rows.sizes):
        for batch in rows.batches(group.of(ranks.rank)):
            beat()
            if batch is None and not in_lockstep(model):
                continue
            given = rows.empty() if batch is None else batch
            logits, labels = _scored(predict(model, given), given, model)
            scores[0] += (logits.argmax(-1) == labels).sum()
            scores[1] += F.cross_entropy(logits, labels, reduction="sum")
            counts += torch.bincount(labels, minlength=classes)
    if not ranks.alone:
        sum_in_place(scores)
        sum_in_place(counts)
    correct, loss = scores.tolist()
    # Rows of one token each predict nothing.
    scored = max(int(counts.sum()), 1)
    return Evaluation(
        examples=len(rows),
        accuracy=correct / scored,
        majority_share=int(counts.max()) / scored,
        perplexity=_perplexity(loss / scored) if rows.learn_tokens else None,
    )


def _scored(logits: Tensor, batch: Batch, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """What counts of a batch: the logits, [N, classes], and the right answers, [N]."""
    labels = batch["labels"]
    if labels.dim() == 2 and getattr(model.config, "is_encoder_decoder", False):
        # A decoder reads the labels shifted already, so that each place predicts its own.
        logits, labels = logits.flatten(0, 1), labels.flatten()
    elif labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]


def _perplexity(loss: float) -> float | None:
    """None for a model that is so far off that it has none that can be written."""
    return math.exp(loss) if loss < 700 else None
