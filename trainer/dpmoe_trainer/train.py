"""The training loop: one plan in, one trained model and its scores out.

Read top to bottom, this is the whole run. What holds:

- Whatever can be refused from the plan alone is refused before the model is read, and what the
  model or the output forbids before any data is.
- The loop runs the plan's mechanism, the plan's number of times. A step counts as spent from before
  its sample is drawn. A restart goes on from a checkpoint, and draws what was drawn after it again.
- Nothing computed on private rows leaves the loop but the noised sum's effect on the model: no
  loss, no norm, no expert's load, no size of a sample is printed, logged, served or kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os import environ
from pathlib import Path

from dpmoe_trainer.contract import BlockPlan, DataPlan, Evaluation, TrainingPlan
from dpmoe_trainer.data.once import read_once
from dpmoe_trainer.data.rows import Lower, Rows
from dpmoe_trainer.data.tables import Table, read_table
from dpmoe_trainer.data.tokens import TableTokens
from dpmoe_trainer.data.units import Units, digests, load_units
from dpmoe_trainer.dp.noise import add_noise
from dpmoe_trainer.dp.sampling import poisson_draw
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import BadData, StopRequested
from dpmoe_trainer.evaluate import evaluate
from dpmoe_trainer.journal import Journal
from dpmoe_trainer.machine import memory
from dpmoe_trainer.methods.dp_sgd import Updater, sum_clipped
from dpmoe_trainer.models.lora import merged
from dpmoe_trainer.output import open_target
from dpmoe_trainer.parallel.ranks import Ranks, meet, part
from dpmoe_trainer.parallel.spread import gather
from dpmoe_trainer.peers import Peers
from dpmoe_trainer.precision import computing
from dpmoe_trainer.prepare import LoadedModel, check_mechanism, device_of, load, repeat_exactly
from dpmoe_trainer.progress import ProgressBoard
from dpmoe_trainer.resume import Run
from dpmoe_trainer.state import State

CACHE_SHARE = 4
"""Tokens, or the outputs of frozen layers, may fill one part in so many of the memory."""


@dataclass(frozen=True)
class Trained:
    """What a run that took all its steps has to show.

    Attributes:
        evaluation: scores on the releasable evaluation set, if the plan names one.
        output: where the model lies, as the plan calls it; None if it was not to be kept.
        notice: what people should know of how it went, without a private value.
    """

    evaluation: Evaluation | None
    output: str | None
    notice: str = ""


def train(
    plan: TrainingPlan,
    settings: Settings,
    board: ProgressBoard,
    stopping: Callable[[], bool],
    journal: Journal | None = None,
) -> Trained:
    """Runs the plan to its end.

    Args:
        plan: what to run.
        settings: where its files are.
        board: counts the steps, for the report and for whoever watches.
        stopping: tells whether the run was asked to stop.
        journal: this attempt's, if the plan has a checkpoint and this is rank 0.

    Raises:
        Refusal: the plan, the model or the data is not what it must be; this attempt drew no step.
        StopRequested: it was asked to stop, and did before its last step.
        SavingFailed: all steps were taken, and the model could not be kept.
        CheckpointFailed: what a restart needs could not be kept.
        PeerLost: another rank is gone, or another attempt has begun.
    """
    privacy, training = plan.privacy, plan.training
    board.enter("Loading")
    check_mechanism(plan)
    device = device_of(settings)
    if plan.checkpoint is not None:
        repeat_exactly(device)
    ranks = meet(plan.parallel, device, environ, _waiting(board, stopping))
    run = Run(plan, settings, board, stopping, journal, ranks.peers)

    target = open_target(plan.output, settings, again=run.saving) if ranks.first else None
    loaded = load(plan, settings, device, ranks)
    model, here, balancing = loaded.model, loaded.here, loaded.balancing
    if target is not None:
        target.check_room(loaded.size)
    run.stop_if_asked()

    vocabulary = loaded.model.config.vocab_size
    table, units, rows = read_once(
        lambda beat: _private_table(plan, settings, vocabulary, ranks, beat), ranks, board.beat
    )
    require_same_rows(ranks.peers, rows)
    cache_bytes = memory() // (CACHE_SHARE * plan.parallel.processes)
    private_rows = _rows(table, loaded, training.max_tokens, loaded.lower, cache_bytes)
    public_rows = None
    if plan.evaluation is not None:
        public_table = read_once(
            lambda beat: _evaluation_table(plan, settings, vocabulary, beat), ranks, board.beat
        )
        public_rows = _rows(public_table, loaded, training.max_tokens)

    noise = privacy.noise_multiplier * privacy.clipping_norm
    updater = Updater(model, training.optimizer, privacy.steps, privacy.expected_batch, noise)
    first = run.resume(State(updater, balancing, here.parts, here.factors), rows)
    board.enter("Training")
    for step in range(first, privacy.steps):
        run.draw(step)
        drawn = poisson_draw(len(units), privacy.sampling_rate, run.key, step)
        with computing(training.precision, device):
            clipped = sum_clipped(
                model,
                private_rows,
                (units[index] for index in drawn),
                balancing.gradient_norm,
                training.physical_batch,
                clipping=loaded.clipping,
                loads=balancing.loads,
                balancing=balancing.loss,
                ranks=ranks,
            )
        noised = add_noise(
            clipped,
            privacy.noise_multiplier,
            privacy.clipping_norm,
            run.key,
            step,
            first_experts=here.first_experts,
            offsets=here.offsets,
            factors=here.factors,
        )
        balancing.take(noised)
        updater.update(noised)
        board.count_update()
        run.keep(step + 1)

    evaluation = None
    if public_rows is not None:
        board.enter("Evaluating")
        with computing(training.precision, device):
            evaluation = evaluate(model, public_rows, training.physical_batch, ranks, board.beat)

    if plan.output is not None or settings.output is not None:
        board.enter("Saving")
        run.begin_saving()
        gather(model, keep=ranks.first)
    if target is not None:
        target.save(lambda folder: _write(loaded, folder), loaded.size)
    output = target.name if target is not None else None
    run.complete(evaluation, output)
    board.enter("Done")
    part(ranks)
    return Trained(evaluation, output, run.notice)


def require_same_rows(ranks: Peers, rows: list[str]) -> None:
    """Refuses pods that read different tables: a row that ranks of two draw counts twice.

    Raises:
        BadData: the digests of a rank's rows are not those of rank 0; on all ranks.
    """
    if ranks.any_of(ranks.from_first(rows) != rows):
        raise BadData(
            "blocks: the ranks read different rows from the blocks' tables, so one row could be "
            "drawn twice; have all pods read one volume, and do not change it while a job runs"
        )


def _waiting(board: ProgressBoard, stopping: Callable[[], bool]) -> Callable[[], None]:
    """What a rank does while others start; it may leave alone, since none computes with it yet."""

    def wait() -> None:
        board.beat()
        if stopping():
            raise StopRequested("stopped on request, while it waited for the other ranks")

    return wait


def _private_table(
    plan: TrainingPlan, settings: Settings, vocabulary: int, ranks: Ranks, beat: Callable[[], None]
) -> tuple[Table, Units, list[str]]:
    """All blocks' rows, their units, and digests of both where ranks or attempts compare them."""
    blocks = _blocks(plan, settings)
    table, units = load_units(blocks, plan.model.labels, vocabulary, beat)
    compared = plan.checkpoint is not None or not ranks.alone
    return table, units, digests(table, units, beat) if compared else []


def _blocks(plan: TrainingPlan, settings: Settings) -> tuple[BlockPlan, ...]:
    return tuple(
        block.model_copy(update={"data": _located(block.data, f"blocks[{index}].data", settings)})
        for index, block in enumerate(plan.blocks)
    )


def _evaluation_table(
    plan: TrainingPlan, settings: Settings, vocabulary: int, beat: Callable[[], None]
) -> Table:
    assert plan.evaluation is not None, "asked for only where the plan evaluates"
    data = _located(plan.evaluation.data, "evaluation.data", settings)
    limit = plan.evaluation.max_examples
    return read_table(
        data, "evaluation.data", plan.model.labels, limit=limit, vocabulary=vocabulary, beat=beat
    )


def _located(data: DataPlan, field: str, settings: Settings) -> DataPlan:
    """The same table with its path below the run's root."""
    if data.path is None:
        return data
    path = settings.resolve(data.path, f"{field}.path").absolute()
    return data.model_copy(update={"path": str(path)})


def _rows(
    table: Table,
    loaded: LoadedModel,
    max_tokens: int,
    lower: Lower | None = None,
    cache_bytes: int = 0,
) -> Rows:
    padding = loaded.tokenizer.pad_token_id
    tokens = TableTokens(table.content, loaded.tokenizer, max_tokens, padding)
    return Rows(tokens, table.labels, padding, loaded.device, lower, cache_bytes)


def _write(loaded: LoadedModel, folder: Path) -> None:
    merged(loaded.model).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
