"""What is launched of a job with checkpoints or with several pods."""

from dataclasses import replace
from typing import Any

from tests.builders import SETTINGS, TEAM, Object, block
from tests.launch.test_manifests import container_of, launch, mounts_of, pod_of, volumes_of

from dpmoe_operator.launch.launching import Launch, workload_name
from dpmoe_operator.launch.manifests import (
    build_job,
    build_owned,
    build_pod_group,
    build_start_mark,
    needs_gang,
)
from dpmoe_trainer.contract import ExitCode, TrainingPlan

ACCESS = [
    {
        "namespace": TEAM,
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
        "checkpoints": {"claimName": "saved"},
    }
]


def saved(settings: Any = SETTINGS, **spec: Any) -> Launch:
    """A launch of a job that keeps checkpoints."""
    return launch(block(access=ACCESS), settings=settings, **spec)


def variables_of(launched: Launch) -> Object:
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container_of(launched)["env"]}


def test_failed_pods_are_replaced_once_they_have_ended() -> None:
    spec = build_job(saved(retries=7))["spec"]
    assert spec["suspend"] is True
    assert "backoffLimit" not in spec
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (7, 0)
    assert spec["podReplacementPolicy"] == "Failed"
    assert build_job(saved())["spec"]["backoffLimitPerIndex"] == 3
    assert build_job(saved(retries=0))["spec"]["backoffLimitPerIndex"] == 0


def test_ends_that_would_repeat_end_the_job_and_disruptions_do_not_count() -> None:
    final, disrupted, others = build_job(saved())["spec"]["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob"
    assert final["onExitCodes"] == {
        "containerName": "trainer",
        "operator": "In",
        "values": [3, 4, 5, 6, 7, 8, 9],
    }
    assert not {ExitCode.CRASHED, ExitCode.PEER_LOST, ExitCode.HUNG, ExitCode.STOPPED} & {
        *final["onExitCodes"]["values"]
    }
    assert disrupted == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    # Whom an eviction hits, and those that it ends with it: one that stops has all of them stop.
    assert others == {
        "action": "Ignore",
        "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [10, 143]},
    }


def test_pods_know_of_those_before_them() -> None:
    variables = variables_of(saved())
    prefix = "metadata.annotations['batch.kubernetes.io/job-index"
    assert variables["DPMOE_FAILURES"]["fieldRef"]["fieldPath"] == f"{prefix}-failure-count']"
    ignored = variables["DPMOE_DISRUPTIONS"]["fieldRef"]["fieldPath"]
    assert ignored == f"{prefix}-ignored-failure-count']"
    mark = build_start_mark(saved().job, "vault")
    assert variables["DPMOE_RESUMED"]["configMapKeyRef"] == {
        "name": mark["metadata"]["name"],
        "key": next(iter(mark["data"])),
        "optional": True,
    }
    assert "DPMOE_FAILURES" not in variables_of(launch())


def test_checkpoints_are_below_a_mount_that_can_be_written() -> None:
    launched = saved()
    plan = TrainingPlan.model_validate_json(launched.plan_json)
    mount = mounts_of(launched)["checkpoints"]
    assert plan.checkpoint is not None
    assert plan.checkpoint.path == f"{mount['mountPath']}/{TEAM}/uid-1"
    assert "readOnly" not in mount
    assert volumes_of(launched)["checkpoints"] == {"persistentVolumeClaim": {"claimName": "saved"}}
    assert "checkpoints" not in volumes_of(launch())


def test_all_ranks_are_told_where_they_meet() -> None:
    launched = saved(parallelism={"workers": 3, "gpusPerWorker": 2})
    spec, name = build_job(launched)["spec"], workload_name(launched.job)
    assert (spec["completions"], spec["parallelism"]) == (3, 3)
    variables = variables_of(launched)
    assert (variables["PET_NNODES"], variables["PET_NPROC_PER_NODE"]) == ("3", "2")
    assert variables["PET_MASTER_ADDR"] == f"{name}-0.{name}"


def test_job_of_several_pods_is_done_with_rank_0() -> None:
    spec = build_job(launch(parallelism={"workers": 2}))["spec"]
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert "successPolicy" not in build_job(launch())["spec"]


def test_gang_where_the_server_has_them() -> None:
    gangs = replace(SETTINGS, gangs=True)
    launched = saved(gangs, parallelism={"workers": 3})
    assert needs_gang(launched)
    group = build_pod_group(launched)
    assert group["spec"] == {"schedulingPolicy": {"gang": {"minCount": 3}}}
    assert pod_of(launched)["schedulingGroup"] == {"podGroupName": group["metadata"]["name"]}
    assert build_owned(launched)[-1] == group
    for other in (saved(parallelism={"workers": 3}), saved(gangs)):
        assert "schedulingGroup" not in pod_of(other)
        assert "PodGroup" not in [m["kind"] for m in build_owned(other)]


def test_platform_sets_variables_and_grace_but_never_the_operators_own() -> None:
    env = (("NCCL_DEBUG", "WARN"), ("DPMOE_PLAN", "/elsewhere"))
    launched = saved(replace(SETTINGS, trainer_env=env, grace_seconds=300))
    assert pod_of(launched)["terminationGracePeriodSeconds"] == 300
    variables = variables_of(launched)
    assert variables["NCCL_DEBUG"] == "WARN"
    assert variables["DPMOE_PLAN"] == "/dpmoe/plan/plan.json"
    assert pod_of(saved())["terminationGracePeriodSeconds"] == 60
