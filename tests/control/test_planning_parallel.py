"""Planning of ranks and checkpoints: what a plan says of them, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
from tests.builders import SETTINGS, TEAM, Object, block, job, snapshot

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.planning import Planned, plan_job
from dpmoe_operator.control.views import JobView
from dpmoe_trainer.contract import CheckpointPlan, ParallelPlan

OPENED: list[Object] = [
    {
        "namespace": TEAM,
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
        "checkpoints": {"claimName": "saved"},
    }
]
"""What a block opens that jobs may keep checkpoints for."""

ELSEWHERE = [OPENED[0] | {"checkpoints": {"claimName": "elsewhere"}}]


def plan(asked: Object, *blocks: Object, settings: Any = SETTINGS) -> Planned:
    return plan_job(JobView.of(asked), standings(snapshot(blocks)), settings)


def refusal(asked: Object, *blocks: Object, settings: Any = SETTINGS) -> tuple[Reason, str]:
    with pytest.raises(Refusal) as refused:
        plan(asked, *blocks, settings=settings)
    return refused.value.reason, refused.value.message


REFUSED: dict[str, tuple[Object, list[Object], str]] = {
    "checkpoints that the second block does not open": (
        job(blocks={"names": ["one", "two"]}, checkpoint={}),
        [block("one", access=OPENED), block("two")],
        "spec.checkpoint: needs a claim for checkpoints that all blocks open: block two opens none,"
        " the first block saved; leave spec.checkpoint out",
    ),
    "a queue without checkpoints": (
        job(placement={"queueName": "gpus"}),
        [block()],
        "spec.placement.queueName: needs a claim for checkpoints that all blocks open: block",
    ),
    "retries without checkpoints": (
        job(retries=1),
        [block()],
        "spec.retries: needs a claim for checkpoints that all blocks open: block reviews",
    ),
    "another claim": (
        job(blocks={"names": ["one", "two"]}, checkpoint={}),
        [block("one", access=OPENED), block("two", access=ELSEWHERE)],
        "block two opens elsewhere, the first block saved",
    ),
}


@pytest.mark.parametrize(("asked", "blocks", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_checkpoints_names_the_block_without(
    asked: Object, blocks: list[Object], words: str
) -> None:
    reason, message = refusal(asked, *blocks)
    assert reason is Reason.BLOCK_NOT_SHARED
    assert words in message


@pytest.mark.parametrize("spec", [{"retries": 0}, {}])
def test_what_needs_none_is_granted_without(spec: Object) -> None:
    assert plan(job(**spec), block()).plan.checkpoint is None


def test_experts_must_divide_the_ranks() -> None:
    view = JobView.of(job(parallelism={"workers": 2, "gpusPerWorker": 3, "expertParallel": 4}))
    assert view.spec is None
    assert "must divide the job's 6 ranks: workers 2 times 3" in str(view.error)


def test_plan_states_ranks_and_checkpoints() -> None:
    asked = job(
        uid="u1",
        parallelism={
            "workers": 3,
            "gpusPerWorker": 2,
            "expertParallel": 6,
            "shardDense": True,
            "timeoutSeconds": 60,
        },
        checkpoint={"everySteps": 5},
    )
    planned = plan(asked, block(access=OPENED))
    assert planned.plan.parallel == ParallelPlan(
        workers=3, processes=2, expert_parallel=6, shard_dense=True, timeout_seconds=60
    )
    assert planned.checkpoints == "saved"
    assert planned.plan.checkpoint == CheckpointPlan(
        path="/dpmoe/checkpoints/saved/team-a/u1", every_steps=5
    )


def test_job_keeps_checkpoints_only_where_all_blocks_open_the_same_claim() -> None:
    asked = job(blocks={"names": ["one", "two"]})
    saved = plan(asked, block("one", access=OPENED), block("two", access=OPENED))
    assert saved.plan.checkpoint is not None
    assert saved.plan.checkpoint.every_steps == 10
    for second in (block("two", access=ELSEWHERE), block("two")):
        planned = plan(asked, block("one", access=OPENED), second)
        assert (planned.plan.checkpoint, planned.checkpoints) == (None, None)


def test_slices_of_a_gpu_make_no_world() -> None:
    sliced = replace(SETTINGS, gpu_resource="nvidia.com/mig-3g.40gb")
    one, two = ({"gpusPerWorker": 1}, {"workers": 2, "gpusPerWorker": 1})
    assert plan(job(parallelism=one), block(), settings=sliced).plan.parallel.world == 1
    reason, words = refusal(job(parallelism=two), block(), settings=sliced)
    assert reason is Reason.INVALID_SPEC
    assert "nvidia.com/mig-3g.40gb" in words
