"""A trainer without torch that keeps a journal, for tests of what the operator makes of it.

It takes a step a tenth of a second, and waits after a few as long as its checkpoint claim has a
file `hold`. A file `crash` there is taken by the rank that it names, which then ends at once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from dpmoe_trainer.contract import (
    Environment,
    ExitCode,
    Mechanism,
    Outcome,
    TrainingPlan,
    TrainingReport,
)
from dpmoe_trainer.environment import earlier_pods

ROOT = Path(os.environ[Environment.ROOT])
HOLD_STEP = 3


def place(path: str) -> Path:
    return ROOT / path.lstrip("/")


def main() -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    plan = TrainingPlan.model_validate_json(place(os.environ[Environment.PLAN]).read_text())
    rank, uid = int(os.environ["PET_NODE_RANK"]), os.environ[Environment.POD_UID]
    assert plan.checkpoint is not None
    folder = place(plan.checkpoint.path)
    claim = folder.parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "journal.json"
    state = {"attempts": [], "steps": 0}
    if journal.exists():
        state = json.loads(journal.read_text())
    elif rank == 0 and earlier_pods(os.environ):
        report(plan, Outcome.REFUSED, state)
        return ExitCode.JOURNAL_LOST
    while rank != 0:
        if stopped:
            return ExitCode.STOPPED
        crash(claim, rank)
        time.sleep(0.1)
    state["attempts"].append(uid)
    journal.write_text(json.dumps(state))
    while state["steps"] < plan.privacy.steps:
        if stopped:
            report(plan, Outcome.STOPPED, state)
            return ExitCode.STOPPED
        crash(claim, rank)
        if state["steps"] < HOLD_STEP or not (claim / "hold").exists():
            state["steps"] += 1
            journal.write_text(json.dumps(state))
        time.sleep(0.1)
    report(plan, Outcome.COMPLETED, state)
    return ExitCode.COMPLETED


def crash(claim: Path, rank: int) -> None:
    file = claim / "crash"
    if file.exists() and file.read_text() == str(rank):
        file.unlink()
        os._exit(ExitCode.CRASHED)


def report(plan: TrainingPlan, outcome: Outcome, state: dict[str, object]) -> None:
    privacy = plan.privacy
    message = TrainingReport(
        job=plan.job,
        plan_digest=plan.digest(),
        outcome=outcome,
        mechanism=Mechanism(
            noise_multiplier=privacy.noise_multiplier,
            sampling_rate=privacy.sampling_rate,
            clipping_norm=privacy.clipping_norm,
            steps=state["steps"],
        ),
        epsilon=0.0,
        attempts=tuple(state["attempts"]),
    ).to_json()
    place(os.environ[Environment.TERMINATION_LOG]).write_text(message)


sys.exit(main())
