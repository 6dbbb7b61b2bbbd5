"""Pods as local processes, on both servers: what a kubelet would report, and no remains."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import pytest

Json = dict[str, Any]

IMAGES = {
    "shell": {"command": ["/bin/sh", "-c"], "env": {"FROM_IMAGE": "yes"}},
    "python": {"command": [sys.executable, "-c"]},
}
# The message that a kubelet gives a container that never ran, measured on a real node.
NEVER_RAN = {
    "exitCode": 137,
    "reason": "ContainerStatusUnknown",
    "message": "The container could not be located when the pod was terminated",
}


class Runner:
    """A runner as a process of its own, with its own node and folder."""

    def __init__(self, api: Any, http: Any, folder: Path) -> None:
        self.api, self.http = api, http
        self.node = f"local-{uuid.uuid4().hex[:8]}"
        self.volumes = folder / "volumes"
        self.images = folder / "images.json"
        self.images.write_text(json.dumps(IMAGES))
        self.errors = folder / "stderr"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        arguments = ["--kubeconfig", self.api.kubeconfig, "--images", self.images]
        arguments += ["--volumes", self.volumes, "--node", self.node, "--restart-backoff", "0.2"]
        arguments += ["--cpu", "8", "--gpus", "2"]
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpmoe_operator.local.runner", *map(str, arguments)],
                stderr=errors,
                env={**os.environ, "AWS_SECRET_ACCESS_KEY": "hush"},
            )
        since = time.time()
        self.http.eventually(f"/api/v1/nodes/{self.node}", lambda node: is_ready(node, since))
        return self

    def end(self, how: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(timeout=20)

    def claim(self, namespace: str, name: str) -> Path:
        return self.volumes / namespace / name


def is_ready(answer: Any, since: float) -> bool:
    if answer.status != 200:
        return False
    for condition in answer.body.get("status", {}).get("conditions", []):
        beat = datetime.fromisoformat(condition["lastHeartbeatTime"]).timestamp()
        if (condition["type"], condition["status"]) == ("Ready", "True") and beat >= since - 1:
            return True
    return False


@pytest.fixture(scope="module")
def runner(api: Any, http: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """One runner for all tests that do not hurt it."""
    started = Runner(api, http, tmp_path_factory.mktemp("runner")).start()
    yield started
    started.end()
    http("DELETE", f"/api/v1/nodes/{started.node}")


@pytest.fixture
def mortal(api: Any, http: Any, tmp_path: Path) -> Iterator[Runner]:
    """A runner of the test's own; the module's one never sees its pods, which name its node."""
    started = Runner(api, http, tmp_path).start()
    yield started
    assert started.process is not None
    if started.process.poll() is None:
        started.end()
    http("DELETE", f"/api/v1/nodes/{started.node}")


class Pods:
    """Creates pods in the test's namespace and reads what becomes of them."""

    def __init__(self, http: Any, namespace: str) -> None:
        self.http, self.namespace = http, namespace
        self.path = f"/api/v1/namespaces/{namespace}/pods"

    def create(
        self,
        script: str,
        name: str = "p",
        image: str = "shell",
        container: Json | None = None,
        **spec: Any,
    ) -> None:
        main = {"name": "main", "image": image, "args": [script], **(container or {})}
        self.http.create(
            self.path,
            {
                "metadata": {"name": name},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": 20,
                    "containers": [main],
                    **spec,
                },
            },
        )

    def until(self, holds: Callable[[Json], Any], name: str = "p") -> Json:
        answer = self.http.eventually(
            f"{self.path}/{name}", lambda each: each.status == 200 and holds(each.body)
        )
        body: Json = answer.body
        return body

    def ended(self, name: str = "p") -> Json:
        return self.until(lambda pod: phase(pod) in ("Succeeded", "Failed"), name)

    def running(self, name: str = "p") -> Json:
        """The pod once its process has said so itself."""
        return self.until(lambda pod: phase(pod) == "Running" and log(pod).startswith("up"), name)

    def delete(self, query: str = "", name: str = "p") -> Json:
        """Deletes the pod and returns its final object, as a watch shows it."""
        since = self.http.get(self.path)["metadata"]["resourceVersion"]
        self.http("DELETE", f"{self.path}/{name}{query}")
        self.http.eventually(f"{self.path}/{name}", lambda each: each.status == 404)
        events = self.http.watch(self.path, f"resourceVersion={since}&timeoutSeconds=1")
        final: Json
        (final,) = [
            each["object"]
            for each in events
            if each["type"] == "DELETED" and each["object"]["metadata"]["name"] == name
        ]
        return final


@pytest.fixture
def pods(http: Any, namespace: str) -> Pods:
    return Pods(http, namespace)


def phase(pod: Json) -> str | None:
    value: str | None = pod["status"].get("phase")
    return value


def main_status(pod: Json) -> Json:
    status: Json
    (status,) = pod["status"]["containerStatuses"]
    return status


def terminated(pod: Json) -> Json:
    end: Json = main_status(pod)["state"]["terminated"]
    return end


def waiting(pod: Json) -> Json:
    statuses = pod["status"].get("containerStatuses") or [{"state": {}}]
    state: Json = statuses[0]["state"].get("waiting", {})
    return state


def log(pod: Json) -> str:
    path = pod["metadata"].get("annotations", {}).get("local.dpmoe.dev/log-file")
    return Path(path).read_text() if path and Path(path).exists() else ""


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() != b""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_exit_code_log_and_termination_message(
    api: Any, runner: Runner, pods: Pods, kubectl: Any
) -> None:
    pods.create("echo out; echo err >&2; echo last words > $DPMOE_ROOT/dev/termination-log; exit 7")
    pod = pods.ended()
    assert phase(pod) == "Failed"
    assert log(pod) == "out\nerr\n"
    if api.name == "embedded":
        # A real API server would ask the node's kubelet, and the runner is none.
        assert kubectl("logs", "-n", pods.namespace, "p").stdout == "out\nerr\n"
    end = terminated(pod)
    assert (end["exitCode"], end["reason"], end["message"]) == (7, "Error", "last words\n")
    assert end["startedAt"] <= end["finishedAt"]
    status = main_status(pod)
    assert (status["imageID"], status["restartCount"]) == ("local-process", 0)
    assert status["containerID"].startswith("local-process://")
    assert pod["spec"]["nodeName"] == runner.node
    assert pod["status"]["podIP"] == "127.0.0.1"
    assert "emulated node: local processes, no isolation" in runner.errors.read_text()


def test_success_by_the_last_lines_of_the_log(runner: Runner, pods: Pods) -> None:
    policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    pods.create("echo fine", name="good", container=policy)
    pods.create("echo broken; exit 1", name="bad", container=policy)
    good, bad = pods.ended("good"), pods.ended("bad")
    assert (phase(good), terminated(good)["reason"]) == ("Succeeded", "Completed")
    assert not terminated(good).get("message")
    assert terminated(bad)["message"] == "broken\n"


def test_a_signal_is_an_exit_code(runner: Runner, pods: Pods) -> None:
    pods.create("kill -s SEGV $$$$")
    assert terminated(pods.ended())["exitCode"] == 128 + signal.SIGSEGV


def test_environment_and_volumes_come_from_the_api(
    runner: Runner, pods: Pods, http: Any, namespace: str
) -> None:
    core = f"/api/v1/namespaces/{namespace}"
    http.create(f"{core}/configmaps", {"metadata": {"name": "plan"}, "data": {"plan.json": "{}"}})
    http.create(f"{core}/secrets", {"metadata": {"name": "s"}, "stringData": {"key": "value"}})
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    http.create(f"{core}/persistentvolumeclaims", claim)
    data = runner.claim(namespace, "data")
    data.mkdir(parents=True)
    (data / "rows").write_text("private rows")
    container = {
        "env": [
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        ],
        "volumeMounts": [
            {"name": "plan", "mountPath": "/dpmoe/plan"},
            {"name": "data", "mountPath": "/data"},
            {"name": "scratch", "mountPath": "/tmp"},
        ],
        "workingDir": "/folder",
    }
    volumes = [
        {"name": "plan", "configMap": {"name": "plan"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "scratch", "emptyDir": {}},
    ]
    script = (
        "cat $DPMOE_ROOT/dpmoe/plan/plan.json $DPMOE_ROOT/data/rows; echo; "
        "echo result > $DPMOE_ROOT/data/out; touch $DPMOE_ROOT/tmp/x; pwd; echo; env"
    )
    pods.create(script, container=container, volumes=volumes)
    pod = pods.ended()
    assert phase(pod) == "Succeeded", log(pod)
    files, cwd, _, *environment = log(pod).splitlines()
    variables = dict(line.partition("=")[::2] for line in environment)
    assert files == "{}private rows"
    assert cwd == variables["DPMOE_ROOT"] + "/folder"
    assert (variables["NAME"], variables["KEY"]) == ("p", "value")
    assert variables["FROM_IMAGE"] == "yes"
    assert variables["HOME"].startswith(variables["DPMOE_ROOT"])
    assert "hush" not in log(pod)
    assert (data / "out").read_text() == "result\n"
    pods.delete()
    assert (data / "out").read_text() == "result\n"
    assert not Path(variables["DPMOE_ROOT"]).exists()


def test_a_missing_object_is_waited_for(
    runner: Runner, pods: Pods, http: Any, namespace: str
) -> None:
    volumes = [{"name": "plan", "configMap": {"name": "late"}}]
    mounts = {"volumeMounts": [{"name": "plan", "mountPath": "/plan"}]}
    pods.create("cat $DPMOE_ROOT/plan/x", container=mounts, volumes=volumes)
    pod = pods.until(lambda each: waiting(each).get("reason") == "CreateContainerConfigError")
    assert 'configmap "late" not found' in waiting(pod)["message"]
    late = {"metadata": {"name": "late"}, "data": {"x": "there"}}
    http.create(f"/api/v1/namespaces/{namespace}/configmaps", late)
    assert log(pods.ended()) == "there"


def test_deletion_gives_the_process_its_time(runner: Runner, pods: Pods) -> None:
    pods.create("trap 'echo saved; exit 0' TERM; echo up; while :; do sleep 0.05; done")
    pods.running()
    final = pods.delete()
    assert (phase(final), terminated(final)["exitCode"]) == ("Succeeded", 0)
    assert "containerID" in main_status(final)


def test_deletion_kills_after_the_grace_period(runner: Runner, pods: Pods) -> None:
    script = "trap '' TERM; echo up $$$$; while :; do sleep 0.05; done"
    pods.create(script, terminationGracePeriodSeconds=1)
    pid = int(log(pods.running()).split()[1])
    final = pods.delete()
    assert (phase(final), terminated(final)["exitCode"]) == ("Failed", 137)
    assert terminated(final)["startedAt"]
    assert gone(pid)


def test_a_forced_deletion_kills_at_once(runner: Runner, pods: Pods) -> None:
    pods.create("trap '' TERM; echo up $$$$; while :; do sleep 0.05; done")
    pid = int(log(pods.running()).split()[1])
    pods.delete("?gracePeriodSeconds=0")
    assert gone(pid)


def test_children_end_with_the_container(runner: Runner, pods: Pods) -> None:
    pods.create("sleep 600 & echo up $!; setsid sleep 600 & echo $!; sleep 0.1; exit 0")
    pids = [int(word) for word in log(pods.ended()).split()[1:]]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_an_unknown_image_never_starts(runner: Runner, pods: Pods) -> None:
    pods.create("touch /nowhere", image="registry.example/other:1")
    pod = pods.until(lambda each: waiting(each).get("reason") == "ImagePullBackOff")
    assert phase(pod) == "Pending"
    assert "not in the image table" in waiting(pod)["message"]
    assert "local.dpmoe.dev/log-file" not in pod["metadata"].get("annotations", {})
    final = pods.delete()
    assert phase(final) == "Failed"
    assert {
        key: value for key, value in terminated(final).items() if value is not None
    } == NEVER_RAN
    assert "containerID" not in main_status(final)


def test_a_program_that_is_missing_is_a_start_error(runner: Runner, pods: Pods) -> None:
    pods.create("", container={"command": ["/no/such/program"], "args": []})
    end = terminated(pods.ended())
    assert (end["exitCode"], end["reason"]) == (128, "StartError")
    assert "/no/such/program" in end["message"]


def test_on_failure_restarts_with_the_same_scratch(runner: Runner, pods: Pods) -> None:
    container = {"volumeMounts": [{"name": "scratch", "mountPath": "/s"}]}
    script = "cd $DPMOE_ROOT/s; echo x >> runs; [ $(wc -l < runs) = 3 ]"
    volumes = [{"name": "scratch", "emptyDir": {}}]
    pods.create(script, container=container, volumes=volumes, restartPolicy="OnFailure")
    pod = pods.ended()
    assert (phase(pod), main_status(pod)["restartCount"]) == ("Succeeded", 2)
    assert main_status(pod)["lastState"]["terminated"]["exitCode"] == 1


def test_init_containers_run_first_and_in_order(runner: Runner, pods: Pods) -> None:
    init = [
        {"name": name, "image": "shell", "args": [f"sleep 0.1; echo {name}"]} for name in ("a", "b")
    ]
    pods.create("echo main", initContainers=init)
    pod = pods.ended()
    assert phase(pod) == "Succeeded"
    assert log(pod) == "a\nb\nmain\n"
    ends = [each["state"]["terminated"] for each in pod["status"]["initContainerStatuses"]]
    assert [end["exitCode"] for end in ends] == [0, 0]


def test_after_a_failed_init_container_nothing_runs(runner: Runner, pods: Pods) -> None:
    pods.create("echo main", initContainers=[{"name": "a", "image": "shell", "args": ["exit 3"]}])
    pod = pods.ended()
    assert phase(pod) == "Failed"
    assert main_status(pod)["state"] == {"waiting": {"reason": "PodInitializing"}}
    assert "containerID" not in main_status(pod)
    assert log(pod) == ""


def test_several_containers_are_refused(runner: Runner, pods: Pods) -> None:
    containers = [{"name": name, "image": "shell", "args": ["true"]} for name in ("a", "b")]
    pods.create("", containers=containers)
    pod = pods.until(lambda each: waiting(each).get("reason") == "CreateContainerConfigError")
    assert "one container a pod" in waiting(pod)["message"]


def test_the_pods_own_deadline(runner: Runner, pods: Pods) -> None:
    pods.create("echo up; sleep 600", activeDeadlineSeconds=1)
    pod = pods.ended()
    assert (phase(pod), pod["status"]["reason"]) == ("Failed", "DeadlineExceeded")
    assert terminated(pod)["exitCode"] == 143


def test_pods_wait_for_room(runner: Runner, pods: Pods) -> None:
    both = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    pods.create("echo up; sleep 600", name="holder", container=both)
    pods.running("holder")
    pods.create("true", name="waiter", container=both)
    pods.create("true", name="never", nodeSelector={"zone": "moon"})

    def unscheduled(pod: Json) -> list[str]:
        conditions = pod["status"].get("conditions") or []
        return [each["message"] for each in conditions if each.get("reason") == "Unschedulable"]

    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    assert unscheduled(pods.until(unscheduled, "waiter")) == [message]
    assert "affinity/selector" in unscheduled(pods.until(unscheduled, "never"))[0]
    pods.delete("?gracePeriodSeconds=0", name="holder")
    assert phase(pods.ended("waiter")) == "Succeeded"


INDEXED_JOB = {
    "metadata": {"name": "job"},
    "spec": {
        "completionMode": "Indexed",
        "completions": 2,
        "parallelism": 2,
        "backoffLimit": 0,
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "containers": [
                    {
                        "name": "trainer",
                        "image": "shell",
                        "args": [
                            "echo $PET_NODE_RANK $PET_MASTER_ADDR $PET_MASTER_PORT "
                            "$DPMOE_PROGRESS_PORT; sleep 0.5"
                        ],
                        "env": [
                            {"name": "PET_MASTER_ADDR", "value": "job-0.job"},
                            {"name": "PET_MASTER_PORT", "value": "29500"},
                            {"name": "DPMOE_PROGRESS_PORT", "value": "8475"},
                            {
                                "name": "PET_NODE_RANK",
                                "valueFrom": {
                                    "fieldRef": {
                                        "fieldPath": "metadata.annotations"
                                        "['batch.kubernetes.io/job-completion-index']"
                                    }
                                },
                            },
                        ],
                    }
                ],
            }
        },
    },
}


def test_an_indexed_job_completes_and_its_pods_can_meet(
    runner: Runner, pods: Pods, http: Any, namespace: str
) -> None:
    jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    http.create(jobs, INDEXED_JOB)
    job = http.eventually(f"{jobs}/job", lambda each: each.body["status"].get("succeeded") == 2)
    assert job.body["status"]["completedIndexes"] == "0,1"
    members = http.get(pods.path)["items"]
    ranks, addresses, meetings, progress = zip(
        *(log(member).split() for member in members), strict=True
    )
    assert sorted(ranks) == ["0", "1"]
    assert set(addresses) == {"127.0.0.1"}
    assert len(set(meetings)) == 1
    assert len(set(progress)) == 2
    published = [
        member["metadata"]["annotations"]["local.dpmoe.dev/progress-port"] for member in members
    ]
    assert sorted(published) == sorted(progress)


def test_a_killed_runner_leaves_no_process_and_its_successor_says_so(
    mortal: Runner, pods: Pods
) -> None:
    pods.create("echo up $$$$; setsid sleep 600 & echo $!; wait", nodeName=mortal.node)
    pids = [int(word) for word in log(pods.running()).split()[1:]]
    pods.create("true", name="unstarted", image="later", nodeName=mortal.node)
    pods.until(lambda each: waiting(each), "unstarted")
    mortal.end(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)
    mortal.images.write_text(json.dumps(IMAGES | {"later": IMAGES["shell"]}))
    mortal.start()
    pod = pods.ended()
    assert (phase(pod), pod["status"]["reason"]) == ("Failed", "ProcessLost")
    assert (terminated(pod)["exitCode"], terminated(pod)["reason"]) == (137, "ProcessLost")
    assert phase(pods.ended("unstarted")) == "Succeeded"


def test_a_stopped_runner_stops_its_pods_and_says_so(mortal: Runner, pods: Pods, http: Any) -> None:
    pods.create(
        "trap 'exit 4' TERM; echo up $$$$; while :; do sleep 0.05; done", nodeName=mortal.node
    )
    pid = int(log(pods.running()).split()[1])
    mortal.end()
    assert mortal.process is not None
    assert mortal.process.returncode == 0
    assert gone(pid)
    pod = pods.ended()
    assert (phase(pod), pod["status"]["reason"]) == ("Failed", "Terminated")
    assert terminated(pod)["exitCode"] == 4
    (ready,) = http.get(f"/api/v1/nodes/{mortal.node}")["status"]["conditions"]
    assert ready["status"] == "False"


def test_a_folder_has_one_runner(mortal: Runner, api: Any) -> None:
    arguments = ["--kubeconfig", api.kubeconfig, "--images", mortal.images]
    arguments += ["--volumes", mortal.volumes, "--node", "other"]
    second = subprocess.run(
        [sys.executable, "-m", "dpmoe_operator.local.runner", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert "another runner uses" in second.stderr
