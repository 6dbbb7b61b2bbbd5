"""The trainer's figures as a page of the documentation."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Row, machine
from benchmarks.page import heading, targets

_NOTES = """\
A ratio's unit is the same model's step in transformers (`grouped_mm` experts, fused AdamW) in the
same process; all ways take turns, and medians are compared. *Clock* is elapsed time, which other
work on the machine lengthens; *processor* is the process's own time. Both sides run with
`keep_freed_memory`, which the trainer sets and which helps both; *as they come* is without it for
both sides, in a process of its own.

Memory is the most that three steps add to imports and weights, each way in a process of its own.
*Two physical batches* is the low-memory mode, with `training.physicalBatch` set to half of what
goes through the model at once otherwise.

On processors with AVX-512 that are not Intel's, torch's products of matrices in float32 run at half
speed, and the engine's are compiled kernels of its own (`docs/design/kernels.md`). Plain training
and the library have torch's. *With torch's own products* is our step without those kernels.

Opacus cannot clip fused experts, so it runs on the same weights taken apart into linear layers.
fastDP is not published as a package, and was not run. Its repository's state of May 2025 (3d5cc56)
was measured once on the first shape, taken apart too, with norms frozen: 5.6 times the plain step.

Noise is ChaCha20 under a key of its own for each (parameter, expert, step), in double precision.
There is no faster mode that is not secure: this one costs no more than torch's own generator.
"""

_NO_GPU = "No GPU was at hand: the same table in bfloat16 (`--device cuda`) was not measured."


def write_page(
    path: Path,
    rows: Sequence[Row],
    packages: Sequence[str],
    seed: int,
    load: float,
    versions: dict[str, str],
) -> None:
    """Writes the page.

    Args:
        path: where.
        rows: the figures.
        packages: whose versions matter.
        seed: of the run.
        load: the machine's load average when the run began.
        versions: of what is no package.
    """
    head = heading(
        "Trainer: the price of privacy",
        "python benchmarks/trainer.py",
        packages=packages,
        seed=seed,
        load=load,
        versions=versions,
    )
    no_gpu = [] if machine()["gpu"] else [_NO_GPU, ""]
    path.write_text("\n".join([*head, _NOTES, *no_gpu, *targets(rows)]))
