"""From a job's manifest to its plan, or to the reason why there is none.

A plan pins everything that a run depends on and prices it before anything is spent. Whatever the
block's owner did not open, and whatever the numbers contradict, is refused here, with the field,
the value and the remedy.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from dpmoe_operator.api.base import SpecError
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.ledgerentry import (
    Charge,
    Granted,
    ObjectReference,
    Record,
)
from dpmoe_operator.api.privateblock import Dataset
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import (
    Refusal,
    check_access,
    checkpoint_claim,
    choose_blocks,
)
from dpmoe_operator.control.accounts import Standing
from dpmoe_operator.control.plan import training_plan
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.views import JobView
from dpmoe_operator.ledger.entry import MAX_RECORD_BYTES, size_of
from dpmoe_operator.privacy.calibration import CalibrationError
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_trainer.contract import TrainingPlan


@dataclass(frozen=True)
class Planned:
    """A job that may ask for budget.

    Attributes:
        job: the job.
        plan: what its pods will run.
        image: the trainer image.
        demand: by account, what the plan costs at each of the account's orders (10⁻⁹ ε).
        caps: by account, the most that the job's namespace may spend there, where it is capped.
        reservation: the record that grants it.
        utility: of an elastic job at this point, of its whole utility; 1 of every other.
        checkpoints: claim for the run's checkpoints; None where it is never restarted.
        others: the job's other points, if it is elastic, the better ones first.
    """

    job: JobView
    plan: TrainingPlan
    image: str
    demand: Mapping[str, tuple[int, ...]]
    caps: Mapping[str, str]
    reservation: Granted
    utility: str = "1"
    checkpoints: str | None = None
    others: tuple["Planned", ...] = ()

    @property
    def points(self) -> tuple["Planned", ...]:
        """All points of the job, this one first."""
        return self, *self.others

    @property
    def accounts(self) -> frozenset[str]:
        """All accounts that the job may be charged to, whichever point is granted."""
        return frozenset(name for point in self.points for name in point.demand)

    @property
    def weight(self) -> float:
        """The weight of the job at this point."""
        assert self.job.spec is not None
        return self.job.spec.weight * float(self.utility)

    def granted_as(self, digest: str | None) -> "Planned":
        """The point whose plan has that digest; the best one if none has."""
        return next((p for p in self.points if p.reservation.plan_digest == digest), self)


def plan_job(
    job: JobView,
    standings: Mapping[tuple[str, str], Standing],
    settings: Settings,
    granted: Collection[str] = (),
) -> Planned:
    """Plan and price a job, an elastic one at each of its points.

    A point that lacks blocks is left out as long as another has them: it wants more blocks than
    there are yet, or still are. Any other fault of a point is one of the job.

    Args:
        job: the job.
        standings: of all blocks.
        settings: image and folders that the platform team opened.
        granted: the accounts of its grant, if it has one.

    Raises:
        Refusal: the reason from the fixed list, and a message for the job's author.
    """
    if job.spec is None:
        raise Refusal(Reason.INVALID_SPEC, str(job.error))
    planned: dict[str, Planned] = {}
    lacking: Refusal | None = None
    for spec, utility in job.spec.points():
        try:
            point = _plan_point(job, spec, utility, standings, settings, granted)
        except Refusal as refusal:
            if refusal.reason not in (Reason.BLOCK_NOT_FOUND, Reason.BLOCK_RETIRED):
                raise
            lacking = lacking or refusal
        else:
            # Once blocks are granted, points that differ in their number have the same plan.
            planned.setdefault(point.reservation.plan_digest, point)
    if not planned:
        assert lacking is not None
        raise lacking
    best, *others = planned.values()
    return replace(best, others=tuple(others))


def _plan_point(
    job: JobView,
    spec: DPMoEJobSpec,
    utility: str,
    standings: Mapping[tuple[str, str], Standing],
    settings: Settings,
    granted: Collection[str],
) -> Planned:
    """Plan and price a job at one point, which `spec` states. Raises what `plan_job` raises."""
    try:
        chosen = choose_blocks(spec, job.meta.uid, standings, granted)
        access = check_access(job, chosen, settings)
        _check_blocks(spec, chosen)
        _check_devices(spec, settings.gpu_resource)
        claim = checkpoint_claim(spec, chosen, access)
        plan = training_plan(job, spec, chosen, claim)
    except SpecError as error:
        raise Refusal(Reason.INVALID_SPEC, f"{error}{_at_point(spec, utility)}") from error
    except CalibrationError as error:
        message = f"spec.privacy: {error}{_at_point(spec, utility)}"
        raise Refusal(Reason.INVALID_SPEC, message) from error
    amounts = _demand(plan, chosen)
    image = spec.image or settings.trainer_image
    reservation = _reservation(job, plan, amounts, image, settings)
    if spec.elastic is not None:
        reservation = reservation.model_copy(update={"utility": utility})
    _check_size(reservation)
    return Planned(
        job=job,
        plan=plan,
        image=image,
        demand=amounts,
        caps={
            block.account: grant.max_epsilon
            for block, grant in zip(plan.blocks, access, strict=True)
            if grant.max_epsilon is not None
        },
        reservation=reservation,
        utility=utility,
        checkpoints=claim,
    )


def _at_point(spec: DPMoEJobSpec, utility: str) -> str:
    """Which point of an elastic job an error is about."""
    if spec.elastic is None or utility == "1":
        return ""
    return (
        f" (at the point of spec.elastic with epsilon {spec.privacy.epsilon} and"
        f" {spec.blocks.most or 'all'} blocks)"
    )


def _demand(plan: TrainingPlan, chosen: Sequence[Standing]) -> dict[str, tuple[int, ...]]:
    privacy = plan.privacy
    mechanism = privacy.noise_multiplier, privacy.sampling_rate, privacy.steps
    # Blocks mostly have the same orders; one curve serves them all.
    curves = {orders: demand(*mechanism, orders) for orders in {each.orders for each in chosen}}
    return {
        block.account: curves[standing.orders]
        for block, standing in zip(plan.blocks, chosen, strict=True)
    }


def _reservation(
    job: JobView,
    plan: TrainingPlan,
    amounts: Mapping[str, tuple[int, ...]],
    image: str,
    settings: Settings,
) -> Granted:
    meta, privacy = job.meta, plan.privacy
    assert job.spec is not None
    return Granted(
        job=ObjectReference(namespace=meta.namespace, name=meta.name, uid=meta.uid),
        plan_digest=plan.digest(),
        epsilon=f"{privacy.epsilon:.9g}",
        delta=job.spec.privacy.delta,
        noise_multiplier=repr(privacy.noise_multiplier),
        sampling_rate=repr(privacy.sampling_rate),
        clipping_norm=repr(privacy.clipping_norm),
        steps=privacy.steps,
        image=image,
        reports_prove=image == settings.trainer_image,
        charges=[Charge(account=name, amounts=list(curve)) for name, curve in amounts.items()],
    )


def _check_size(reservation: Granted) -> None:
    """A grant commits in one record of the ledger, which must fit."""
    size = size_of(Record(granted=reservation))
    if size > MAX_RECORD_BYTES:
        blocks = len(reservation.charges)
        raise Refusal(
            Reason.INVALID_SPEC,
            f"spec.blocks: {blocks} blocks: make a ledger record of {size} bytes, must make at most"
            f" {MAX_RECORD_BYTES}; ask for at most about {blocks * MAX_RECORD_BYTES // size} such"
            " blocks, or have them declared with shorter names or fewer orders",
        )


class Planner:
    """Plans jobs, and remembers the plans of manifests that did not change since.

    A pure function with a memory: calibration takes milliseconds, rounds look at thousands of jobs.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[str, tuple[object, Planned | Refusal]] = {}

    def plan(
        self,
        job: JobView,
        standings: Mapping[tuple[str, str], Standing],
        granted: Collection[str] = (),
        digest: str | None = None,
    ) -> Planned:
        """As `plan_job`; the point of a job that was granted, by the digest of its plan.

        Raises:
            Refusal: as `plan_job`.
        """
        seen = _asked(job, standings)
        # A grant matters only where it decides which blocks are meant, or that one may be retired.
        selects = job.spec is not None and job.spec.blocks.names is None
        matters = selects or any(standing.retired is not None for standing in seen)
        key = (job.meta.generation, tuple(granted) if matters else (), _fingerprint(seen))
        known = self._known.get(job.meta.uid)
        if known is None or known[0] != key:
            known = (key, self._fresh(job, standings, granted))
            self._known[job.meta.uid] = known
        if isinstance(known[1], Refusal):
            raise known[1]
        return known[1].granted_as(digest)

    def forget_all_but(self, uids: Collection[str]) -> None:
        """Drop plans of jobs that are gone."""
        self._known = {uid: known for uid, known in self._known.items() if uid in uids}

    def _fresh(
        self,
        job: JobView,
        standings: Mapping[tuple[str, str], Standing],
        granted: Collection[str],
    ) -> Planned | Refusal:
        try:
            return plan_job(job, standings, self._settings, granted)
        except Refusal as refusal:
            return refusal


def _asked(job: JobView, standings: Mapping[tuple[str, str], Standing]) -> list[Standing]:
    """All blocks that a job's plan may depend on."""
    if job.spec is None:
        return []
    wanted = job.spec.blocks
    if wanted.names is not None:
        keys = [(wanted.namespace, name) for name in wanted.names]
    else:
        keys = [key for key in standings if key[0] == wanted.namespace]
    return [standings[key] for key in keys if key in standings]


def _fingerprint(seen: Sequence[Standing]) -> frozenset[tuple[str, int, object]]:
    """Versions of blocks."""
    return frozenset(
        (
            standing.block.meta.uid,
            standing.block.meta.generation,
            (standing.refusal, standing.retired, *standing.block.meta.labels.items()),
        )
        for standing in seen
    )


def _check_blocks(spec: DPMoEJobSpec, chosen: Sequence[Standing]) -> None:
    """Refuse blocks that cannot be trained on together, and numbers that contradict the blocks."""
    first = chosen[0].spec
    for standing in chosen:
        name, other = standing.block.meta.name, standing.spec
        if spec.training.task == "classification":
            _check_labels(name, other.dataset, first.dataset)
        if other.unit.kind != first.unit.kind:
            raise SpecError(
                "spec.blocks", name, f"protects {other.unit.kind}s, not {first.unit.kind}s"
            )
        if Decimal(spec.privacy.delta) * other.dataset.units >= 1:
            raise SpecError(
                "spec.privacy.delta",
                spec.privacy.delta,
                f"must be below 1/N = 1/{other.dataset.units}, the units of block {name}: at 1/N"
                " one may be published whole",
            )


def _check_labels(name: str, dataset: Dataset, first: Dataset) -> None:
    """Refuse a block without classes, or with others than the first one's."""
    if dataset.label_column is None:
        raise SpecError(
            "spec.training.task",
            "classification",
            f"must be language-modelling, or block {name} left out: it names no labelColumn",
        )
    if dataset.labels != first.labels:
        raise SpecError("spec.blocks", name, f"has {dataset.labels} labels, not {first.labels}")


def _check_devices(spec: DPMoEJobSpec, gpu_resource: str) -> None:
    """Refuse what NCCL cannot do."""
    parallelism = spec.parallelism
    if "/mig-" in gpu_resource and parallelism.gpus_per_worker and parallelism.world > 1:
        raise SpecError(
            "spec.parallelism",
            f"workers {parallelism.workers}, gpusPerWorker {parallelism.gpus_per_worker}",
            f"must be one GPU in all: the cluster's GPUs are slices ({gpu_resource}), which cannot"
            " talk to each other",
        )
