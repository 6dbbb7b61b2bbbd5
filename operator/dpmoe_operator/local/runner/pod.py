"""One pod's life on this node, from binding to deletion, as a kubelet would lead it.

What holds:

- Nothing starts before the pod's annotations say where its log will be. So a pod without them never
  started anything, and an annotated pod that a new runner finds unfinished counts as lost.
- A pod's final status is written before its deletion is completed: whoever watches sees how it
  ended. A container that never ran has no container id in it.
- When this is over, however it ends, no process of the pod is left.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dpmoe_operator.kube.client import KubeClient, Object
from dpmoe_operator.kube.errors import ApiError, Conflict, Invalid, NotFound
from dpmoe_operator.kube.resources import PODS
from dpmoe_operator.local.runner import guardian
from dpmoe_operator.local.runner.environment import (
    MASTER_ADDRESS,
    MASTER_PORT,
    Place,
    build,
    declared,
)
from dpmoe_operator.local.runner.images import Image
from dpmoe_operator.local.runner.node import has_ended
from dpmoe_operator.local.runner.ports import Ports
from dpmoe_operator.local.runner.process import Process, Processes
from dpmoe_operator.local.runner.sources import NotReady, Sources, read_sources
from dpmoe_operator.local.runner.status import (
    LOG_FILE,
    PROGRESS_PORT,
    ContainerRecord,
    build_lost_status,
    build_status,
)
from dpmoe_operator.local.runner.stopping import Stop, first
from dpmoe_operator.local.runner.volumes import PodFolder

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 300.0
_CLOSING_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Machine:
    """What all pods of the node share.

    Attributes:
        client: the API.
        images: which program stands for which image.
        processes: starts processes.
        ports: hands out ports.
        pods: the folder with a folder for each pod.
        claims: the folder with a folder for each namespace's claims.
        restart_backoff_seconds: how long a container that failed waits before it is started again;
            doubles from time to time.
    """

    client: KubeClient
    images: Mapping[str, Image]
    processes: Processes
    ports: Ports
    pods: Path
    claims: Path
    restart_backoff_seconds: float


class PodWorker:
    """Runs one pod. `run` is its life; the other methods tell it what has happened outside."""

    def __init__(self, machine: Machine, pod: Object):
        metadata, spec = pod["metadata"], pod["spec"]
        self.machine = machine
        self.pod = pod
        self.uid = str(metadata["uid"])
        self.namespace = str(metadata["namespace"])
        self.name = str(metadata["name"])
        self.folder = PodFolder(machine.pods / self.uid, machine.claims / self.namespace)
        self._init = [_record(each) for each in spec.get("initContainers") or []]
        self._main = [_record(each) for each in spec["containers"]]
        if self._init:
            self._main[0].wait("PodInitializing")
        self._stop = Stop()
        self._deleting = asyncio.Event()
        self._vanished = asyncio.Event()
        self._closing = asyncio.Event()

    def observe(self, pod: Object) -> None:
        """The pod has changed."""
        self.pod = pod
        metadata = pod["metadata"]
        if "deletionTimestamp" in metadata:
            self._stop.ask(float(metadata.get("deletionGracePeriodSeconds", 30)))
            self._deleting.set()

    def vanish(self) -> None:
        """The pod is no more."""
        self._stop.ask(0)
        self._vanished.set()

    def close(self) -> None:
        """The runner stops."""
        grace = min(self._grace_seconds(), _CLOSING_GRACE_SECONDS)
        self._stop.ask(grace, "Terminated", "the local runner was stopped")
        self._closing.set()

    async def run(self) -> None:
        """Lives until the pod is gone or the runner stops."""
        try:
            self.observe(self.pod)
            if not has_ended(self.pod):
                await self._live()
            await self._await_deletion()
        except _PodGone:
            self.folder.remove()
        except Exception:
            logger.exception("pod %s/%s: the runner failed", self.namespace, self.name)
            with contextlib.suppress(_PodGone):
                await self._write_lost("the local runner failed, its log says why")
        finally:
            self._stop.cancel()

    async def _live(self) -> None:
        annotations = self.pod["metadata"].get("annotations") or {}
        if LOG_FILE in annotations:
            await asyncio.to_thread(guardian.kill_marked, pod=self.uid)
            self.folder.remove_temporary()
            await self._write_lost("the local runner was started again, and the process is gone")
            return
        deadline = self._arm_deadline()
        try:
            self.folder.create()
            await self._write_status()
            await self._run_containers()
            await self._write_end()
        finally:
            if deadline is not None:
                deadline.cancel()
            self.machine.ports.release(self.uid)
            self.folder.remove_temporary()

    async def _run_containers(self) -> None:
        """Runs the init containers and then the container, each to its end."""
        spec = self.pod["spec"]
        if problem := _unsupported(spec):
            self._main[0].wait("CreateContainerConfigError", problem)
            await self._write_status()
            await self._stop.asked.wait()
            return
        containers = [*(spec.get("initContainers") or []), *spec["containers"]]
        for container, record in zip(containers, [*self._init, *self._main], strict=True):
            await self._run_to_end(container, record)
            if record.exit_code != 0:
                return

    async def _run_to_end(self, container: Object, record: ContainerRecord) -> None:
        """Starts the container, and starts it again as often as its pod's policy says."""
        delay = self.machine.restart_backoff_seconds
        while not self._stop.asked.is_set():
            process = await self._start(container, record)
            if process is not None:
                await self._see_to_end(container, record, process)
            if record.exit_code is None or not self._restarts(record):
                return
            message = f"back-off {delay:g}s restarting failed container={record.name}"
            record.wait("CrashLoopBackOff", message)
            await self._write_status()
            await self._pause(delay)
            delay = min(2 * delay, _MAX_BACKOFF_SECONDS)

    def _restarts(self, record: ContainerRecord) -> bool:
        policy = self.pod["spec"].get("restartPolicy", "Always")
        if record in self._init and record.exit_code == 0:
            return False
        return policy == "Always" or (policy == "OnFailure" and record.exit_code != 0)

    async def _start(self, container: Object, record: ContainerRecord) -> Process | None:
        """Starts the container's process as soon as all it needs is there.

        Returns:
            The process; `None` where it can't be started or the pod had to stop before.
        """
        image = self.machine.images.get(record.image)
        if image is None:
            await self._refuse_image(record.image, record)
            return None
        while not self._stop.asked.is_set():
            try:
                argv, env, directory = await self._assemble(container, image)
            except (ApiError, NotReady, ValueError, OSError) as problem:
                record.wait("CreateContainerConfigError", str(problem))
                await self._write_status()
                await self._pause(_RETRY_SECONDS)
                continue
            if self._stop.asked.is_set():
                return None
            try:
                return await self.machine.processes.start(
                    argv, env, pod=self.uid, directory=directory, log=self.folder.log
                )
            except OSError as error:
                record.fail_to_start(f"{argv[0]}: {error.strerror}")
                return None
        return None

    async def _refuse_image(self, image: str, record: ContainerRecord) -> None:
        known = ", ".join(sorted(self.machine.images)) or "nothing"
        message = f'image "{image}" is not in the image table of the local runner; it has {known}'
        record.wait("ErrImagePull", message)
        await self._write_status()
        await self._pause(_RETRY_SECONDS)
        record.wait("ImagePullBackOff", f'Back-off pulling image "{image}": {message}')
        await self._write_status()
        await self._stop.asked.wait()

    async def _assemble(
        self, container: Object, image: Image
    ) -> tuple[list[str], dict[str, str], Path]:
        """Lays out all that the process needs: its arguments, environment and directory."""
        sources = await read_sources(self.machine.client, self.pod)
        place = self._place(container, sources)
        env = build(container, image, sources, place)
        root = self.folder.lay_out(container, sources, env)
        directory = root / (container.get("workingDir") or "").lstrip("/")
        _make_folders(directory, Path(env["HOME"]))
        await self._announce(place)
        return image.argv(container, env), env, directory

    def _place(self, container: Object, sources: Sources) -> Place:
        """The root, the temporary folder and the ports of the container's process."""
        ports, variables = self.machine.ports, declared(container, sources)
        master_port = None
        if MASTER_ADDRESS in variables or MASTER_PORT in variables:
            meeting = f"{self.namespace}/{variables.get(MASTER_ADDRESS, self.uid)}"
            master_port = ports.hold(meeting, self.uid)
        return Place(
            root=self.folder.root(container["name"]),
            temporary=self.folder.temporary,
            progress_port=ports.hold(f"progress of {self.uid}", self.uid),
            master_port=master_port,
        )

    async def _announce(self, place: Place) -> None:
        """Says where the log and the progress will be, before anything starts."""
        annotations = {LOG_FILE: str(self.folder.log), PROGRESS_PORT: str(place.progress_port)}
        if annotations.items() <= (self.pod["metadata"].get("annotations") or {}).items():
            return
        await self._patch({"metadata": {"annotations": annotations}})

    async def _see_to_end(
        self, container: Object, record: ContainerRecord, process: Process
    ) -> None:
        """Stands by a process until it has ended, and stops it when the pod has to stop."""
        record.run()
        try:
            await self._write_status()
            await first(process.wait(), self._stop.asked.wait())
            if self._stop.asked.is_set():
                process.terminate()
            await first(process.wait(), self._stop.expired.wait())
        finally:
            await process.kill_all()
        code = await process.wait()
        message = self.folder.termination_message(container, code != 0, process.log_start)
        record.end(code, message)

    async def _write_end(self) -> None:
        """Writes the final status."""
        initialised = all(record.exit_code == 0 for record in self._init)
        for record in self._main if initialised else []:
            record.close()
        await self._write_status(ended=True)

    async def _write_lost(self, message: str) -> None:
        await self._patch({"status": build_lost_status(self.pod, message)}, "status")

    async def _write_status(self, ended: bool = False) -> None:
        reason, message = self._stop.reason, self._stop.message
        succeeded = all(record.exit_code == 0 for record in self._main)
        phase = "Running" if any(record.runs for record in self._main) else "Pending"
        if ended:
            phase = "Succeeded" if succeeded and reason != "DeadlineExceeded" else "Failed"
        tell = {"reason": reason, "message": message} if phase == "Failed" and reason else {}
        status = build_status(self.pod, phase, self._main, self._init, **tell)
        await self._patch({"status": status}, "status")

    async def _patch(self, body: Object, subresource: str | None = None) -> None:
        """Patches this very pod, as often as it takes; it is the runner that is asked for it."""
        body = {**body, "metadata": {"uid": self.uid, **body.get("metadata", {})}}
        while True:
            try:
                pod = await self.machine.client.patch(
                    PODS, self.namespace, self.name, body, subresource
                )
            except NotFound as error:
                raise _PodGone from error
            except ApiError as error:
                # A patch that names another uid than the object's is invalid.
                if isinstance(error, Invalid) and await self._is_replaced():
                    raise _PodGone from error
                logger.warning("pod %s/%s: %s", self.namespace, self.name, error)
                if self._closing.is_set():
                    return
            else:
                self.observe(pod)
                return
            await first(asyncio.sleep(_RETRY_SECONDS), self._vanished.wait())
            if self._vanished.is_set():
                raise _PodGone

    async def _is_replaced(self) -> bool:
        try:
            pod = await self.machine.client.get(PODS, self.namespace, self.name)
        except NotFound:
            return True
        except ApiError:
            return False
        return bool(pod["metadata"]["uid"] != self.uid)

    async def _await_deletion(self) -> None:
        """Completes the pod's deletion once somebody has asked for it."""
        await first(self._deleting.wait(), self._vanished.wait(), self._closing.wait())
        while self._deleting.is_set() and not self._vanished.is_set():
            try:
                await self.machine.client.delete(
                    PODS, self.namespace, self.name, precondition_uid=self.uid, grace_seconds=0
                )
                break
            except (NotFound, Conflict):
                break
            except ApiError as error:
                logger.warning("pod %s/%s: %s", self.namespace, self.name, error)
                if self._closing.is_set():
                    return
                await self._pause(_RETRY_SECONDS)
        # A finalizer may still hold it.
        await first(self._vanished.wait(), self._closing.wait())
        if self._vanished.is_set():
            self.folder.remove()

    def _arm_deadline(self) -> asyncio.TimerHandle | None:
        seconds = self.pod["spec"].get("activeDeadlineSeconds")
        if seconds is None:
            return None
        started = (self.pod.get("status") or {}).get("startTime")
        passed = 0.0
        if started is not None:
            passed = (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds()
        return asyncio.get_running_loop().call_later(
            max(0.0, float(seconds) - passed),
            self._stop.ask,
            self._grace_seconds(),
            "DeadlineExceeded",
            "Pod was active on the node longer than the specified deadline",
        )

    def _grace_seconds(self) -> float:
        return float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))

    async def _pause(self, seconds: float) -> None:
        """Sleeps, but not when the pod has to stop."""
        await first(asyncio.sleep(seconds), self._stop.asked.wait())


class _PodGone(Exception):
    """The pod was deleted behind the runner's back."""


def _record(container: Object) -> ContainerRecord:
    return ContainerRecord(str(container["name"]), str(container.get("image") or ""))


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def _unsupported(spec: Object) -> str | None:
    if len(spec["containers"]) > 1:
        return f"the local runner runs one container a pod, this pod has {len(spec['containers'])}"
    for container in spec.get("initContainers") or []:
        if "restartPolicy" in container:
            return f"init container {container['name']!r}: restartPolicy is not supported"
    return None
