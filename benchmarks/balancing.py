"""Does it keep experts balanced? An upcycled model with random routers, under each balancing.

MiniLM's upper layers become experts behind random routers, and learn a sentiment task under DP-SGD
with the trainer's own step. All runs have the same data, start, ε, σ, sampling and noise; only the
balancing differs. Loads and accuracies are measured on held-out sentences, so that measuring
releases nothing: how evenly each layer's tokens are spread over its experts, again and again during
training.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

if not __package__:
    # Run as a script: Python has put this folder first, where the package is not to be found.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.balancing_page import write_page
from benchmarks.common import Json, Quick, Recorder, Seed, note, report, seconds
from dpmoe_operator.privacy.calibration import noise_multiplier_for
from dpmoe_trainer.contract import DataFormat, DataPlan, OptimizerPlan
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.data.tables import read_table
from dpmoe_trainer.data.tokens import TableTokens
from dpmoe_trainer.dp.balancing import Balancing, ReleasedLoad, SequenceBalancing
from dpmoe_trainer.dp.noise import NoiseKey, add_noise
from dpmoe_trainer.dp.sampling import poisson_draw
from dpmoe_trainer.machine import keep_freed_memory
from dpmoe_trainer.methods.dp_sgd import Updater, sum_clipped
from dpmoe_trainer.models import (
    DPMoEBertForSequenceClassification,
    load_tokenizer,
    select_trainable,
    upcycle,
)

PACKAGES = ("torch", "transformers", "dp-accounting")
LAYERS, EXPERTS, TOP_K = (5,), 8, 2
TRAINED = ["*.experts.*_bias", "*.router.*", "classifier.*"]
EPSILON, DELTA = 8.0, 1e-5
CLIPPING_NORM = 3.0
LEARNING_RATE = 5e-3
MAX_TOKENS = 32
AT_ONCE = 64


@dataclass(frozen=True)
class Size:
    """How much is trained, and on what."""

    rows: int
    held_out: int
    expected_batch: float
    steps: int
    every: int


FULL = Size(rows=12_000, held_out=872, expected_batch=384.0, steps=40, every=5)
SMALL = Size(rows=1_200, held_out=200, expected_batch=128.0, steps=12, every=4)

Make = Callable[[DPMoEBertForSequenceClassification, Size], Balancing]

WAYS: dict[str, Make] = {
    "none": lambda model, size: Balancing(CLIPPING_NORM),
    "sequence": lambda model, size: SequenceBalancing(model, CLIPPING_NORM, 0.01),
    "released load, loss": lambda model, size: ReleasedLoad(
        model, CLIPPING_NORM, size.expected_batch, 0.01, through="loss"
    ),
    "released load, bias": lambda model, size: ReleasedLoad(
        model, CLIPPING_NORM, size.expected_batch, 0.05
    ),
}


@dataclass(frozen=True)
class Spread:
    """How tokens are spread over experts, of the layer that is worst off.

    Attributes:
        step: After how many steps.
        most: The largest expert's load over the mean.
        variation: The loads' standard deviation over the mean.
        entropy: The loads' entropy over that of even loads.
        accuracy: On the held-out rows.
        loss: Mean cross entropy there.
    """

    step: int
    most: float
    variation: float
    entropy: float
    accuracy: float
    loss: float


@torch.no_grad()
def look(model: DPMoEBertForSequenceClassification, rows: Rows, step: int) -> Spread:
    """Loads, accuracy and loss on rows that are not trained on."""
    model.eval()
    counts = {layer: torch.zeros(EXPERTS, dtype=torch.float64) for layer in LAYERS}
    mask = torch.empty(0)

    def count(layer: int, chosen_NK: Tensor) -> None:
        real_K = chosen_NK[mask.flatten().bool()].flatten()
        counts[layer] += torch.bincount(real_K, minlength=EXPERTS)

    handles = [
        model.layers[layer].router.register_forward_hook(
            lambda router, inputs, output, layer=layer: count(layer, output[2])
        )
        for layer in LAYERS
    ]
    correct, loss = 0, 0.0
    for batch in rows.physical_batches(range(len(rows)), AT_ONCE):
        mask = batch["attention_mask"]
        output = model(**batch)
        correct += int((output.logits.argmax(-1) == batch["labels"]).sum())
        loss += float(output.loss) * len(batch["labels"])
    for handle in handles:
        handle.remove()
    shares = [each / each.sum() for each in counts.values()]
    return Spread(
        step,
        max(float(share.max()) * EXPERTS for share in shares),
        max(float(share.std(correction=0)) * EXPERTS for share in shares),
        min(float(torch.special.entr(share).sum()) / math.log(EXPERTS) for share in shares),
        correct / len(rows),
        loss / len(rows),
    )


def build(folder: Path, seed: int) -> DPMoEBertForSequenceClassification:
    """The upcycled model, with fresh routers; the layers below train nothing."""
    model = upcycle(folder, EXPERTS, TOP_K, LAYERS, num_labels=2, seed=seed)
    assert isinstance(model, DPMoEBertForSequenceClassification)
    select_trainable(model, TRAINED)
    return model


def train(
    model: DPMoEBertForSequenceClassification,
    private: Rows,
    held_out: Rows,
    balancing: Balancing,
    size: Size,
    seed: int,
) -> list[Spread]:
    """The trainer's own step, watched from outside."""
    rate = size.expected_batch / len(private)
    sigma = noise_multiplier_for(EPSILON, DELTA, rate, size.steps)
    plan = OptimizerPlan(name="adamw", learning_rate=LEARNING_RATE, warmup_steps=5)
    updater = Updater(model, plan, size.steps, size.expected_batch, sigma * CLIPPING_NORM)
    key = NoiseKey(seed.to_bytes(32, "little"))  # A benchmark's key, and nobody's secret.
    seen = [look(model, held_out, 0)]
    for step in range(size.steps):
        sums = sum_clipped(
            model,
            private,
            ((int(row),) for row in poisson_draw(len(private), rate, key, step)),
            balancing.gradient_norm,
            AT_ONCE,
            loads=balancing.loads,
            balancing=balancing.loss,
        )
        noised = add_noise(sums, sigma, CLIPPING_NORM, key, step)
        balancing.take(noised)
        updater.update(noised)
        if (step + 1) % size.every == 0:
            seen.append(look(model, held_out, step + 1))
    return seen


def read(folder: Path, name: str, text: str, model: Path, lower: object, limit: int) -> Rows:
    """The first rows of a table."""
    plan = DataPlan(
        path=str(folder / name), format=DataFormat.TSV, text_column=text, label_column="label"
    )
    table = read_table(plan, name, 2, limit=limit)
    tokenizer = load_tokenizer(model)
    padding = tokenizer.pad_token_id
    tokens = TableTokens(table.content, tokenizer, MAX_TOKENS, padding)
    cache = 2 << 30
    return Rows(tokens, table.labels, padding, torch.device("cpu"), lower, cache)  # type: ignore[arg-type]


def main(
    model: Annotated[Path, typer.Option(help="Folder of a dense BERT with six layers.")],
    data: Annotated[Path, typer.Option(help="Folder with SST-2's train.tsv and dev.tsv.")],
    quick: Quick = False,
    json: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    seed: Seed = 0,
    ways: Annotated[list[str] | None, typer.Option(help="Only these ways.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Train under each balancing, and see what becomes of the loads."""
    load = os.getloadavg()[0]
    torch.set_num_threads(threads)
    keep_freed_memory()
    size = SMALL if quick else FULL
    lower = build(model, seed).lower
    private = read(data, "train.tsv", "sentence", model, lower, size.rows)
    held_out = read(data, "dev.tsv", "content", model, lower, size.held_out)
    recorder = Recorder()
    seen: dict[str, Sequence[Spread]] = {}
    for way in ways or WAYS:
        start = build(model, seed)
        with seconds() as elapsed:
            seen[way] = train(start, private, held_out, WAYS[way](start, size), size, seed)
        note(f"{way}: {elapsed():.0f} s")
        _add(recorder.at(way), seen[way])
    _compare(recorder, seen)
    report(recorder.rows, packages=PACKAGES, seed=seed, quick=quick, load=load, path=json)
    if markdown is not None:
        write_page(markdown, seen, _setting(size), PACKAGES, seed, load)


def _setting(size: Size) -> str:
    rate = size.expected_batch / size.rows
    sigma = noise_multiplier_for(EPSILON, DELTA, rate, size.steps)
    return (
        f"MiniLM's last layer of six as {EXPERTS} experts (top-{TOP_K}) behind a random router; "
        f"trained are {', '.join(f'`{pattern}`' for pattern in TRAINED)}. "
        f"{size.rows:,} sentences of SST-2, "
        f"{size.steps} steps of DP-AdamW, expected batch {size.expected_batch:g}, C = "
        f"{CLIPPING_NORM:g}, learning rate {LEARNING_RATE:g}; ε = {EPSILON:g} at δ = {DELTA:g}, so "
        f"σ = {sigma:.3f}, for every way alike. Loads, accuracy and loss are those of "
        f"{size.held_out:,} held-out sentences. {TOP_K} of {EXPERTS} experts: the busiest can have "
        f"{EXPERTS / TOP_K:g} times the mean. Strengths are the defaults of jobs: 0.01 of a loss, "
        "0.05 a step of a bias; the loads' share of C² is 0.02."
    )


def _add(recorder: Recorder, seen: Sequence[Spread]) -> None:
    first, last = seen[0], seen[-1]
    beside = {"peer_name": "before training"}
    recorder.add("largest load over the mean", last.most, "×", peer=first.most, **beside)
    recorder.add("variation of the loads", last.variation, "", peer=first.variation, **beside)
    recorder.add(
        "entropy of the loads",
        100 * last.entropy,
        "%",
        better="higher",
        peer=100 * first.entropy,
        **beside,
    )
    recorder.add("held-out accuracy", 100 * last.accuracy, "%", better="higher")
    recorder.add("held-out loss", last.loss, "nats")


def _compare(recorder: Recorder, seen: dict[str, Sequence[Spread]]) -> None:
    """What was promised: balanced where nothing else is, at no accuracy's cost."""
    ours, none = seen.get("released load, bias"), seen.get("none")
    if ours is None or none is None:
        return
    recorder.at("released load, bias").add(
        "largest load over the mean, with none's",
        ours[-1].most,
        "×",
        target=1.5,
        peer=none[-1].most,
        peer_name="none",
    )


if __name__ == "__main__":
    typer.run(main)
