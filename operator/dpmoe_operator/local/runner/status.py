"""What a kubelet would write into a pod's status, as pure functions of what happened."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from dpmoe_operator.kube.client import Object
from dpmoe_operator.local.runner.sources import LOCAL_ADDRESS

LOG_FILE = "local.dpmoe.dev/log-file"
"""Annotation: the file with all that the pod's containers printed. Written before any starts."""

PROGRESS_PORT = "local.dpmoe.dev/progress-port"
"""Annotation: the port on the node's address where the pod serves its progress."""

IMAGE_ID = "local-process"
KILLED = 137
START_ERROR = 128


@dataclass
class ContainerRecord:
    """What has become of one container so far.

    Attributes:
        name: the container's name.
        image: its image, as the pod names it.
        state: the `state` of its status.
        last_state: the `lastState`: how the run before the current one ended.
        runs: how often its process was started.
    """

    name: str
    image: str
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last_state: Object = field(default_factory=dict)
    runs: int = 0

    def wait(self, reason: str, message: str = "") -> None:
        """It can't run yet, or not now."""
        if "terminated" in self.state:
            self.last_state = self.state
        self.state = {"waiting": {"reason": reason} | ({"message": message} if message else {})}

    def run(self) -> None:
        """Its process has been started."""
        self.runs += 1
        self.state = {"running": {"startedAt": timestamp()}}

    def fail_to_start(self, message: str) -> None:
        """Its program could not be started at all."""
        self.runs += 1
        self.end(START_ERROR, message, "StartError")

    def end(self, exit_code: int, message: str, reason: str | None = None) -> None:
        """Its process has ended."""
        started = self.state.get("running", {}).get("startedAt", "1970-01-01T00:00:00Z")
        self.state = {
            "terminated": {
                "exitCode": exit_code,
                "reason": reason or ("Completed" if exit_code == 0 else "Error"),
                "startedAt": started,
                "finishedAt": timestamp(),
                "containerID": self.container_id,
            }
            | ({"message": message} if message else {})
        }

    def close(self) -> None:
        """The pod has ended, and with it whatever this container still waited for.

        Of one that never ran, a kubelet says the following, without any time or id.
        """
        if self.runs and "waiting" in self.state:
            self.state, self.last_state = self.last_state, {}
        elif not self.runs:
            self.state = {
                "terminated": {
                    "exitCode": KILLED,
                    "reason": "ContainerStatusUnknown",
                    "message": "The container could not be located when the pod was terminated",
                }
            }

    @property
    def container_id(self) -> str:
        """Names the last run; empty as long as there was none."""
        return f"{IMAGE_ID}://{self.name}-{self.runs}" if self.runs else ""

    @property
    def exit_code(self) -> int | None:
        """How the last run ended; `None` before."""
        code = self.state.get("terminated", {}).get("exitCode")
        return None if code is None else int(code)

    def status(self, ready_after_success: bool = False) -> Object:
        """The entry of `containerStatuses`; an init container is ready after its success."""
        running = "running" in self.state
        status: Object = {
            "name": self.name,
            "image": self.image,
            "imageID": IMAGE_ID if self.runs else "",
            "state": self.state,
            "lastState": self.last_state,
            "ready": self.exit_code == 0 if ready_after_success else running,
            "started": running,
            "restartCount": max(0, self.runs - 1),
        }
        return status | ({"containerID": self.container_id} if self.runs else {})


def build_status(
    pod: Object,
    phase: str,
    containers: list[ContainerRecord],
    init_containers: list[ContainerRecord],
    *,
    reason: str | None = None,
    message: str | None = None,
) -> Object:
    """The pod's status, for a merge patch.

    Args:
        pod: the pod as last seen; conditions that others wrote are kept.
        phase: Pending, Running, Succeeded or Failed.
        containers: what has become of its containers.
        init_containers: what has become of its init containers.
        reason: why the whole pod is in this phase, where its containers do not say it.
        message: the same for people.
    """
    old = pod.get("status") or {}
    address = {"ip": LOCAL_ADDRESS}
    status: Object = {
        "phase": phase,
        "conditions": _conditions(old, phase, containers, init_containers),
        "startTime": old.get("startTime") or timestamp(),
        "hostIP": LOCAL_ADDRESS,
        "hostIPs": [address],
        "podIP": LOCAL_ADDRESS,
        "podIPs": [address],
        "containerStatuses": [record.status() for record in containers],
    }
    if init_containers:
        status["initContainerStatuses"] = [record.status(True) for record in init_containers]
    if reason is not None:
        status |= {"reason": reason, "message": message or ""}
    return status


def build_lost_status(pod: Object, message: str) -> Object:
    """The status of a pod of whose process only one thing is known: that it is gone."""
    known = (pod.get("status") or {}).get("containerStatuses") or []
    by_name = {status["name"]: status for status in known}
    statuses = []
    for container in pod["spec"]["containers"]:
        fresh = ContainerRecord(container["name"], container.get("image") or "").status()
        status = by_name.get(container["name"], fresh)
        if "terminated" not in status["state"]:
            ended = {"exitCode": KILLED, "reason": "ProcessLost", "finishedAt": timestamp()}
            started = status["state"].get("running", {}).get("startedAt", timestamp())
            # The earlier runner may have died just before it could say that it started a process.
            lost = {
                "containerID": status.get("containerID") or f"{IMAGE_ID}://lost",
                "state": {"terminated": ended | {"startedAt": started}},
                "ready": False,
                "started": False,
            }
            status = status | lost
        statuses.append(status)
    return {
        "phase": "Failed",
        "reason": "ProcessLost",
        "message": message,
        "conditions": _conditions(pod.get("status") or {}, "Failed", [], []),
        "containerStatuses": statuses,
    }


def timestamp() -> str:
    """Now, as the API writes times."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _conditions(
    old: Object,
    phase: str,
    containers: list[ContainerRecord],
    init_containers: list[ContainerRecord],
) -> list[Object]:
    initialized = all(record.exit_code == 0 for record in init_containers)
    ready = bool(containers) and all("running" in record.state for record in containers)
    wanted: dict[str, tuple[bool, str | None]] = {
        "PodScheduled": (True, None),
        "Initialized": (initialized, None if initialized else "ContainersNotInitialized"),
        "ContainersReady": (ready, _unready_reason(phase, ready)),
        "Ready": (ready, _unready_reason(phase, ready)),
    }
    before = {condition["type"]: condition for condition in old.get("conditions") or []}
    for type_, (holds, reason) in wanted.items():
        status = "True" if holds else "False"
        known = before.get(type_, {})
        changed = known.get("status") != status
        before[type_] = {
            "type": type_,
            "status": status,
            "lastTransitionTime": timestamp() if changed else known.get("lastTransitionTime"),
            **({"reason": reason} if reason else {}),
        }
    return list(before.values())


def _unready_reason(phase: str, ready: bool) -> str | None:
    if ready:
        return None
    return {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "ContainersNotReady")
