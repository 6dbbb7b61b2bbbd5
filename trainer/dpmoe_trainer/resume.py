"""A run over all its attempts: asked before each draw, and told after each update.

Every call here is made by all ranks, in the same order; rank 0 alone writes the journal, has the
key's file and decides, and the others hear of it. A plan without a checkpoint has none of it: the
key lives and dies with the process.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dpmoe_trainer.checkpoint import (
    clear,
    lacking_room,
    names,
    newest_whole,
    read_checkpoint,
    write_checkpoint,
)
from dpmoe_trainer.contract import Evaluation, TrainingPlan
from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import (
    BadCheckpoint,
    BadPlan,
    ChangedData,
    CheckpointFailed,
    PeerLost,
    StopRequested,
)
from dpmoe_trainer.journal import Journal
from dpmoe_trainer.output import target_of
from dpmoe_trainer.peers import Peers
from dpmoe_trainer.progress import ProgressBoard
from dpmoe_trainer.secret import destroy_key, open_key
from dpmoe_trainer.state import State

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Found:
    """What an attempt goes on with.

    Attributes:
        secret: the run's key.
        attempt: the attempt's number; 0 without a checkpoint.
        drawn: steps drawn by all attempts.
        checkpoint: the name of the newest whole checkpoint, if there is any.
        step: steps that it has taken.
        notice: what people should know of it.
    """

    secret: bytes = field(repr=False)
    attempt: int = 0
    drawn: int = 0
    checkpoint: str | None = None
    step: int = 0
    notice: str = ""


class Run:
    """One attempt of a run, on one rank.

    Args:
        plan: the run's plan.
        settings: where its files are.
        board: counts the steps.
        stopping: whether this process was asked to stop.
        journal: the attempt's journal; None on other ranks than 0, and without a checkpoint.
        ranks: the run's ranks.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        settings: Settings,
        board: ProgressBoard,
        stopping: Callable[[], bool],
        journal: Journal | None,
        ranks: Peers,
    ) -> None:
        assert ranks.world == plan.parallel.world, "a process for each of the plan's ranks"
        self.ranks = ranks
        self.notice = ""
        """What people should know of how the run went on; empty if nothing."""
        self._steps = plan.privacy.steps
        self._digest = plan.run_digest()
        self._board = board
        self._stopping = stopping
        self._journal = journal
        self._every, self._folder = 0, Path()
        if plan.checkpoint is not None:
            self._every = plan.checkpoint.every_steps
            self._folder = settings.resolve(plan.checkpoint.path, "checkpoint.path")
        self._attempt = 0
        self._kept = 0
        self._key: NoiseKey | None = None
        self._state: State | None = None

    @property
    def key(self) -> NoiseKey:
        """The run's secret key, the same on all ranks and in all attempts."""
        assert self._key is not None, "the run was resumed"
        return self._key

    @property
    def saving(self) -> bool:
        """Whether an attempt had begun to save the model, as far as rank 0 knows."""
        return self._journal is not None and self._journal.history.saving

    def stop_if_asked(self) -> None:
        """Ends all ranks before the first step, if any of them was asked to stop."""
        self._board.beat()
        if self.ranks.any_of(self._stopping()):
            raise self._stop()

    def resume(self, state: State, rows: Sequence[str]) -> int:
        """Brings the state to the newest checkpoint, and returns the first step to draw.

        Args:
            state: this rank's.
            rows: digests of the private rows, as `data.units.digests` gives them.

        Raises:
            ChangedData: earlier steps were drawn from other rows.
            BadPlan: the volume has no room for the run's checkpoints.
            JournalLost: the key is missing that earlier steps were drawn with.
            BadCheckpoint: there are checkpoints, and none is whole or fits.
        """
        self._state = state
        size = state.size()
        found = self._at_first(lambda: self._find(size, rows))
        self._key = NoiseKey(found.secret)
        self._attempt, self.notice = found.attempt, found.notice
        if found.checkpoint is not None:
            path = self._folder / found.checkpoint
            wanted = {tensor: state.part_of(tensor) for tensor in names(path)}
            state.restore(read_checkpoint(path, wanted), found.step)
        self._kept = found.step
        self._board.resume(found.step, found.drawn)
        if self.notice and self.ranks.first:
            print(self.notice, file=sys.stderr)
        return found.step

    def _find(self, size: int, rows: Sequence[str]) -> _Found:
        """Rank 0's part of it."""
        journal = self._journal
        if journal is None:
            return _Found(NoiseKey().secret)
        try:
            secret = open_key(journal)
            _require_same_rows(journal, NoiseKey(secret).derive("rows", *rows).hex())
            # The model may be seen: of a step drawn again, there would be two results.
            only = self._steps if journal.history.saving else None
            newest = newest_whole(self._folder, self._digest, only)
            path, step, faults = newest or (None, 0, [])
            journal.check_newest()
            clear(self._folder, keep=path)
        except OSError as error:
            raise CheckpointFailed(
                f"checkpoint.path: {self._folder} cannot be used ({error.strerror}); check the "
                f"volume, and the run can go on"
            ) from error
        drawn = journal.history.drawn
        if step > drawn:
            raise BadCheckpoint(
                f"checkpoint.path: {path} is of step {step}, and the journal tells of {drawn} "
                f"steps; apply the job anew, with a folder of its own"
            )
        problem = lacking_room(self._folder, size)
        if problem is not None:
            raise CheckpointFailed(problem) if drawn else BadPlan(problem)
        notice = f"{'; '.join(faults)}: went on from step {step}" if faults else ""
        return _Found(secret, journal.attempt, drawn, path.name if path else None, step, notice)

    def draw(self, step: int) -> None:
        """Has step `step`, from 0, counted as drawn; to be called before its sample is drawn.

        Raises:
            StopRequested: a rank was asked to stop; the state was kept.
            PeerLost: a newer attempt has begun, or rank 0 ended.
            CheckpointFailed: the journal cannot be written.
        """
        if self.ranks.any_of(self._stopping()):
            self._keep(step)
            raise self._stop()
        journal = self._journal
        if self._every:
            self._at_first(lambda: journal.draw(step + 1) if journal is not None else None)
        if step >= self._board.drawn:
            self._board.count_draw()

    def keep(self, step: int) -> None:
        """Writes a checkpoint after `step` steps, if it is time for one.

        Raises:
            CheckpointFailed: it could not be written.
        """
        if self._every and (step % self._every == 0 or step == self._steps):
            self._keep(step)

    def begin_saving(self) -> None:
        """Journals that the model at the run's target may be its own from here on."""
        journal = self._journal
        self._at_first(lambda: journal.begin_saving() if journal is not None else None)

    def complete(self, evaluation: Evaluation | None, output: str | None) -> None:
        """Journals that the run is over, and destroys its key and its checkpoints."""
        journal = self._journal

        def end() -> None:
            if journal is not None:
                scores = evaluation.model_dump(mode="json") if evaluation is not None else None
                journal.complete({"evaluation": scores, "output": output})
                destroy(self._folder)

        self._at_first(end)

    def _keep(self, step: int) -> None:
        if not self._every or step == self._kept:
            return
        assert self._state is not None, "the run was resumed"
        self._board.beat()
        journal, state = self._journal, self._state
        self._at_first(lambda: journal.check_newest() if journal is not None else None)
        write_checkpoint(
            self._folder,
            step,
            self._digest,
            state.tensors(),
            state.parts(),
            self.ranks,
            self._attempt,
        )
        self._kept = step
        self._board.beat()

    def _stop(self) -> StopRequested:
        if not self._every:
            return StopRequested()
        return StopRequested("stopped on request; the run can go on from its last checkpoint")

    def _at_first(self, act: Callable[[], Value]) -> Value:
        """What rank 0 gets from `act`, on all ranks; where it fails, all of them end."""
        value: Value | None = None
        problem: Exception | None = None
        if self.ranks.first:
            try:
                value = act()
            except Exception as error:
                problem = error
        value, failed = self.ranks.from_first((value, problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise PeerLost("rank 0 ended the run; its report says why")
        return value


def _require_same_rows(journal: Journal, mark: str) -> None:
    """Journals the mark of the rows, or holds them to the one that steps were drawn under.

    The mark is a hash under the run's key: whoever reads the journal can test no guess of a row.
    """
    drawn = journal.history.drawn
    if not drawn:
        journal.name_rows(mark)
    elif journal.history.rows != mark:
        raise ChangedData(
            f"blocks: the blocks' tables do not have the rows any more that the {drawn} steps of "
            f"this run were drawn from, and a step drawn again from others would be a second "
            f"release under the same noise; apply the job anew, and leave tables as they are while "
            f"a job runs"
        )


def completed_before(
    plan: TrainingPlan, settings: Settings, journal: Journal
) -> tuple[Evaluation | None, str | None]:
    """What the report of a run said that its journal tells to be complete.

    Raises:
        BadCheckpoint: its model is not where it was saved.
        CheckpointFailed: its key or checkpoints are still there and cannot be removed.
    """
    assert journal.history.completed is not None, "asked for only where the run is complete"
    scores, output = (journal.history.completed.get(field) for field in ("evaluation", "output"))
    destroy(journal.folder)
    target = target_of(plan.output, settings)
    if target is not None and not target.holds_model():
        raise BadCheckpoint(
            f"checkpoint.path: by its journal in {journal.folder} the run is complete and saved "
            f"its model to {output!r}, and {target.name!r} holds none; look for it, or apply the "
            f"job anew, which pays its privacy again"
        )
    return (Evaluation.model_validate(scores) if scores is not None else None), output


def destroy(folder: Path) -> None:
    """Destroys a run's key and checkpoints; its journal stays, for whoever starts it once more.

    Raises:
        CheckpointFailed: they cannot be removed.
    """
    try:
        destroy_key(folder)
        clear(folder)
    except OSError as error:
        raise CheckpointFailed(
            f"checkpoint.path: the run is complete and its key in {folder} cannot be destroyed "
            f"({error.strerror}); remove that folder"
        ) from error
