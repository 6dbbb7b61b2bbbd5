"""The trainer that the node tests put into containers: the real one, but for its steps.

Reading the plan, SIGTERM, progress and report are the trainer's own code. Its loop is replaced by
one without torch, whose model tells what a step does: it `sleeps` for a moment, or `lingers` for
longer than anybody waits, or `grows` until the run is killed.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

from dpmoe_trainer.__main__ import main
from dpmoe_trainer.contract import TrainingPlan
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import StopRequested
from dpmoe_trainer.journal import Journal
from dpmoe_trainer.progress import ProgressBoard

STEP_SECONDS = {"sleeps": 0.05, "grows": 0.05, "lingers": 600.0}
GROWTH = {"sleeps": 0, "grows": 8 << 20, "lingers": 0}
"""Bytes that a step takes and keeps."""


def train(
    plan: TrainingPlan,
    settings: Settings,
    board: ProgressBoard,
    stopping: Callable[[], bool],
    journal: Journal | None = None,
) -> SimpleNamespace:
    """Takes the plan's steps; the "model" is a file that tells how many rows the table has."""
    assert plan.model.path is not None
    assert plan.blocks[0].data.path is not None
    assert plan.output is not None
    assert plan.output.path is not None
    model = Path(plan.model.path).name
    rows = Path(plan.blocks[0].data.path).read_text().splitlines()
    kept = []
    board.enter("Training")
    for _ in range(plan.privacy.steps):
        if stopping():
            raise StopRequested
        board.count_draw()
        kept.append(b"\1" * GROWTH[model])
        time.sleep(STEP_SECONDS[model])
        board.count_update()
    folder = settings.resolve(plan.output.path, "output.path")
    folder.mkdir(parents=True)
    (folder / "model.txt").write_text(f"{len(rows)} rows")
    board.enter("Done")
    return SimpleNamespace(evaluation=None, output=plan.output.path, notice="")


def spent(sigma: float, rate: float, steps: int, delta: float, orders: Sequence[float]) -> float:
    """Stands for the trainer's accountant, whose ε is for people: no charge depends on it."""
    return steps * 1e-6


def provide(name: str, **content: object) -> None:
    """Make a module of that name importable that holds just this."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def be_a_rank() -> None:
    """Be the one rank of one of several pods: a supervisor would start the real trainer."""
    if int(os.environ.get("PET_NNODES", "1")) > 1:
        os.environ["RANK"] = os.environ["PET_NODE_RANK"]
        os.environ["WORLD_SIZE"] = os.environ["PET_NNODES"]


if __name__ == "__main__":
    be_a_rank()
    provide("dpmoe_trainer.train", train=train)
    provide("dpmoe_trainer.dp.accounting", spent=spent)
    sys.exit(main(sys.argv[1:]))
