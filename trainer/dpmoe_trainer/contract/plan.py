"""The plan as a whole: where it runs, what it keeps, where the model goes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpmoe_trainer.contract.base import Contract, JobReference, PathString
from dpmoe_trainer.contract.data import BlockPlan, DataPlan
from dpmoe_trainer.contract.model import ModelPlan
from dpmoe_trainer.contract.privacy import PrivacyPlan
from dpmoe_trainer.contract.training import TrainingSettings


class EvaluationPlan(Contract):
    """A set whose scores the owner declared releasable: public, or held out for that purpose."""

    data: DataPlan
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000


class ParallelPlan(Contract):
    """The processes of a run and how they share it; static, since all end where one is lost.

    With a checkpoint they then start again; without one, the run is over.

    The world has `workers` × `processes` ranks. Each computes samples of its own; `expert_parallel`
    ranks in a row hold all experts of a layer between them, and the world is a multiple of that.

    Attributes:
        workers: pods.
        processes: ranks of each pod, one a GPU.
        expert_parallel: ranks that share the experts.
        shard_dense: whether also what is no expert is sharded over the ranks (FSDP).
        timeout_seconds: a rank that makes no progress for so long is taken for lost.
    """

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    expert_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    shard_dense: bool = False
    timeout_seconds: Annotated[int, Field(ge=5, le=86_400)] = 600

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.workers * self.processes

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.world % self.expert_parallel:
            raise ValueError(
                f"expertParallel must divide the {self.world} ranks (workers × processes), "
                f"{self.expert_parallel} does not"
            )
        return self


class CheckpointPlan(Contract):
    """Where the run keeps what it needs to go on after a restart: a folder of its own.

    The folder holds the run's secret key, so it lies beside the data. At the end all but its small
    journal is destroyed, which tells a late restart that the run is over.

    Attributes:
        path: the folder, on a volume that all ranks share.
        every_steps: steps between two checkpoints.
    """

    path: PathString
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 10


class OutputPlan(Contract):
    """Where the trained model goes: a folder of an opened volume, or an opened URI."""

    path: PathString | None = None
    uri: PathString | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.path is None) == (self.uri is None):
            raise ValueError("exactly one of path and uri must be set")
        return self


class TrainingPlan(Contract):
    """Everything that a run may depend on, written before it starts."""

    version: Literal[1] = 1
    job: JobReference
    blocks: Annotated[tuple[BlockPlan, ...], Field(min_length=1, max_length=256)]
    privacy: PrivacyPlan
    model: ModelPlan
    training: TrainingSettings
    parallel: ParallelPlan = ParallelPlan()
    checkpoint: CheckpointPlan | None = None
    evaluation: EvaluationPlan | None = None
    output: OutputPlan | None = None

    def run_digest(self) -> str:
        """Names the run whatever its ranks: what a checkpoint must have been made by.

        The same run may go on with other ranks, so `parallel` is left out.
        """
        return self.model_copy(update={"parallel": ParallelPlan()}).digest()

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        tables = [block.data for block in self.blocks]
        tables += [self.evaluation.data] if self.evaluation is not None else []
        if any((table.label_column is None) != (self.model.labels is None) for table in tables):
            raise ValueError(
                "labelColumn must be set in every table where model.labels is, and only there"
            )
        return self
