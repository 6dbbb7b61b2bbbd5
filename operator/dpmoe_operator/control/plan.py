"""The TrainingPlan of a job: everything that its run depends on, pinned."""

from collections.abc import Sequence
from decimal import Decimal

from dpmoe_operator.api.base import SpecError
from dpmoe_operator.api.dpmoejob import Checkpoint, DPMoEJobSpec, Parallelism
from dpmoe_operator.api.ledgerentry import MAX_STEPS
from dpmoe_operator.api.privateblock import Table
from dpmoe_operator.api.training import Task
from dpmoe_operator.control.accounts import Standing
from dpmoe_operator.control.recipe import clipping_plan, model_plan, training_settings
from dpmoe_operator.control.views import JobView
from dpmoe_operator.launch import paths
from dpmoe_operator.privacy.calibration import epsilon_for, noise_multiplier_for
from dpmoe_trainer.contract import (
    BlockPlan,
    CheckpointPlan,
    DataFormat,
    DataPlan,
    EvaluationPlan,
    JobReference,
    OutputPlan,
    ParallelPlan,
    PartitionPlan,
    PrivacyPlan,
    TrainingPlan,
    UnitPlan,
)

MAX_EPSILON = Decimal(1000)
"""Beyond this ε says nothing about privacy; a manifest that asks it is a mistake."""

TOLERANCE = 1e-3
"""Relative slack between a stated ε and the ε of a stated σ: both were written by hand."""


def training_plan(
    job: JobView, spec: DPMoEJobSpec, chosen: Sequence[Standing], checkpoints: str | None
) -> TrainingPlan:
    """The plan of a job at one of its points.

    Args:
        job: the job.
        spec: of the job, at the point.
        chosen: its blocks.
        checkpoints: claim for its checkpoints, if its blocks open one.

    Raises:
        SpecError: the numbers contradict each other.
        CalibrationError: no noise gives that privacy.
    """
    output = spec.output
    return TrainingPlan(
        job=JobReference(namespace=job.meta.namespace, name=job.meta.name, uid=job.meta.uid),
        blocks=tuple(_block_plan(standing, spec.training.task) for standing in chosen),
        privacy=_privacy_plan(spec, chosen),
        model=model_plan(spec, chosen[0].spec.dataset),
        training=training_settings(spec),
        parallel=_parallel_plan(spec.parallelism),
        checkpoint=_checkpoint_plan(job, spec, checkpoints),
        evaluation=_evaluation_plan(chosen, spec.training.task),
        output=OutputPlan(path=paths.output(job.meta.namespace, output.claim), uri=None)
        if output.claim is not None
        else OutputPlan(path=None, uri=output.uri),
    )


def _parallel_plan(asked: Parallelism) -> ParallelPlan:
    return ParallelPlan(
        workers=asked.workers,
        processes=asked.processes,
        expert_parallel=asked.expert_parallel,
        shard_dense=asked.shard_dense,
        timeout_seconds=asked.timeout_seconds,
    )


def _checkpoint_plan(job: JobView, spec: DPMoEJobSpec, claim: str | None) -> CheckpointPlan | None:
    if claim is None:
        return None
    return CheckpointPlan(
        path=paths.checkpoints(job.meta.namespace, job.meta.uid, claim),
        every_steps=(spec.checkpoint or Checkpoint()).every_steps,
    )


def _block_plan(standing: Standing, task: Task) -> BlockPlan:
    meta, spec = standing.block.meta, standing.spec
    assert standing.account_name is not None
    return BlockPlan(
        namespace=meta.namespace,
        name=meta.name,
        account=standing.account_name,
        units=spec.dataset.units,
        unit=UnitPlan(kind=spec.unit.kind, column=spec.unit.column),
        data=_data_plan(spec.dataset, task),
    )


def _data_plan(table: Table, task: Task) -> DataPlan:
    hub = table.hugging_face
    return DataPlan(
        path=paths.table(table),
        hugging_face=hub.id if hub else None,
        revision=hub.revision if hub else None,
        split=hub.split if hub else None,
        format=DataFormat(table.format) if table.format else None,
        text_column=table.text_column,
        tokens_column=table.tokens_column,
        label_column=table.label_column if task == "classification" else None,
        partition=PartitionPlan(column=table.partition.column, values=tuple(table.partition.values))
        if table.partition
        else None,
    )


def _evaluation_plan(chosen: Sequence[Standing], task: Task) -> EvaluationPlan | None:
    """The first releasable evaluation set that an owner named, and that the task can use."""
    for standing in chosen:
        table = standing.spec.evaluation
        if table is not None and (task != "classification" or table.label_column is not None):
            return EvaluationPlan(data=_data_plan(table, task))
    return None


def _privacy_plan(spec: DPMoEJobSpec, chosen: Sequence[Standing]) -> PrivacyPlan:
    """Pin σ, q and the steps, from what the job states and the blocks' public sizes."""
    units = sum(standing.spec.dataset.units for standing in chosen)
    batch = spec.training.logical_batch
    if batch > units:
        raise SpecError(
            "spec.training.logicalBatch",
            batch,
            f"must be at most {units}, the privacy units of the blocks together",
        )
    rate = batch / units
    steps = spec.training.steps or -(-(spec.training.epochs or 1) * units // batch)
    if steps > MAX_STEPS:
        raise SpecError(
            "spec.training.epochs",
            spec.training.epochs,
            f"makes {steps} steps, must make at most {MAX_STEPS}; ask for fewer epochs or a larger"
            " logicalBatch",
        )
    epsilon, noise_multiplier = _calibrated(spec, rate, steps)
    return PrivacyPlan(
        epsilon=epsilon,
        delta=float(spec.privacy.delta),
        noise_multiplier=noise_multiplier,
        sampling_rate=rate,
        steps=steps,
        clipping_norm=float(spec.privacy.clipping_norm),
        expected_batch=float(batch),
        orders=tuple(float(order) for order in chosen[0].orders),
        clipping=clipping_plan(spec),
    )


def _calibrated(spec: DPMoEJobSpec, rate: float, steps: int) -> tuple[float, float]:
    """(ε, σ) of the run: the one that is stated, and the other calibrated to it."""
    privacy = spec.privacy
    delta = float(privacy.delta)
    if privacy.epsilon is not None and Decimal(privacy.epsilon) > MAX_EPSILON:
        raise SpecError("spec.privacy.epsilon", privacy.epsilon, f"must be at most {MAX_EPSILON}")
    if privacy.noise_multiplier is None:
        assert privacy.epsilon is not None
        noise = noise_multiplier_for(float(privacy.epsilon), delta, rate, steps)
        return float(privacy.epsilon), noise
    noise = float(privacy.noise_multiplier)
    epsilon = epsilon_for(noise, delta, rate, steps)
    if epsilon > MAX_EPSILON:
        raise SpecError(
            "spec.privacy.noiseMultiplier",
            privacy.noise_multiplier,
            f"costs epsilon {epsilon:.4g} at delta {privacy.delta}; must cost at most"
            f" {MAX_EPSILON}",
        )
    if privacy.epsilon is not None and epsilon > float(privacy.epsilon) * (1 + TOLERANCE):
        raise SpecError(
            "spec.privacy.noiseMultiplier",
            privacy.noise_multiplier,
            f"contradicts epsilon {privacy.epsilon}: with sampling rate {rate:.4g} and {steps}"
            f" steps it costs epsilon {epsilon:.4g}; state one of the two",
        )
    return epsilon, noise
