"""The node: registers itself, binds pods that fit, and gives each a worker.

One runner at a time owns a folder of volumes; a lock in it sees to that. Workers learn of their
pods' changes from one informer, and whatever they wrote before a crash is in the API, so that a new
runner of the same name goes on from there.
"""

import asyncio
import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpmoe_operator.kube.client import KubeClient, Object
from dpmoe_operator.kube.errors import ApiError, Conflict, Invalid, NotFound
from dpmoe_operator.kube.resources import NODES, PODS
from dpmoe_operator.kube.watch import Informer
from dpmoe_operator.local.runner.images import Image
from dpmoe_operator.local.runner.node import (
    Capacity,
    build_node,
    build_node_status,
    has_ended,
    wants_a_node,
    why_not,
)
from dpmoe_operator.local.runner.pod import Machine, PodWorker
from dpmoe_operator.local.runner.ports import Ports
from dpmoe_operator.local.runner.process import Processes
from dpmoe_operator.local.runner.status import timestamp
from dpmoe_operator.local.runner.volumes import PodFolder

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 10.0
_RETRY_SECONDS = 1.0


class ProcessRunner:
    """Runs pods as processes, until `run` is cancelled.

    Attributes:
        ready: set once the node is registered and all pods are known.
    """

    def __init__(
        self,
        client: KubeClient,
        images: Mapping[str, Image],
        volumes: Path,
        *,
        node_name: str = "local",
        capacity: Capacity | None = None,
        restart_backoff_seconds: float = 10.0,
    ):
        """Starts nothing yet.

        Args:
            client: an open client, allowed to manage nodes and pods and to read secrets.
            images: which program stands for which image.
            volumes: the folder with `<namespace>/<claim>` for each claim; what belongs to pods is
                in `.pods` below it.
            node_name: the Node's name.
            capacity: what the node claims to have; by default what the machine has.
            restart_backoff_seconds: the first wait before a failed container is started again.
        """
        self.client = client
        self.images = images
        self.volumes = volumes.absolute()
        self.node_name = node_name
        self.capacity = capacity or Capacity.of_this_machine()
        self.restart_backoff_seconds = restart_backoff_seconds
        self.ready = asyncio.Event()
        self._informer = Informer(client, PODS, on_event=self._on_pod)
        self._node = build_node(node_name)
        self._workers: dict[str, tuple[PodWorker, asyncio.Task[None]]] = {}
        self._bound: dict[str, Object] = {}
        self._wake = asyncio.Event()
        self._machine: Machine | None = None
        self._ready_since = timestamp()

    async def run(self) -> None:
        """Works until it is cancelled; then stops its pods' processes and says so in the API.

        Raises:
            RuntimeError: another runner uses the folder of volumes.
            ApiError: the node can't be registered.
        """
        pods = self.volumes / ".pods"
        pods.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(pods / "lock"), Processes() as processes:
            self._machine = Machine(
                client=self.client,
                images=self.images,
                processes=processes,
                ports=Ports(),
                pods=pods,
                claims=self.volumes,
                restart_backoff_seconds=self.restart_backoff_seconds,
            )
            await self._register()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._informer.run())
                    tasks.create_task(self._beat())
                    tasks.create_task(self._schedule())
                    await self._informer.synced.wait()
                    self._clean_up(pods)
                    self.ready.set()
            finally:
                await self._close()

    async def _close(self) -> None:
        for worker, _ in self._workers.values():
            worker.close()
        await asyncio.gather(*(task for _, task in self._workers.values()), return_exceptions=True)
        try:
            await self._write_node(stopped=True)
        except ApiError as error:
            logger.info("the node can't be marked as stopped: %s", error)

    def _on_pod(self, type_: str, pod: Object) -> None:
        """Tells the pod's worker, and makes one for a pod that came to this node."""
        self._wake.set()
        uid = pod["metadata"]["uid"]
        known = self._workers.get(uid)
        if type_ == "DELETED":
            self._bound.pop(uid, None)
            if known is not None:
                known[0].vanish()
        elif known is not None:
            known[0].observe(pod)
        elif pod["spec"].get("nodeName") == self.node_name:
            assert self._machine is not None
            worker = PodWorker(self._machine, pod)
            task = asyncio.get_running_loop().create_task(self._work(worker))
            self._workers[uid] = worker, task

    async def _work(self, worker: PodWorker) -> None:
        try:
            await worker.run()
        finally:
            del self._workers[worker.uid]

    def _clean_up(self, pods: Path) -> None:
        """Removes the folders of pods that were deleted while no runner ran."""
        uids = {pod["metadata"]["uid"] for pod in self._informer.objects.values()}
        for folder in pods.iterdir():
            if folder.is_dir() and folder.name not in uids:
                PodFolder(folder, self.volumes).remove()

    async def _schedule(self) -> None:
        """Binds pods whenever something has changed."""
        await self._informer.synced.wait()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._bind_what_fits()
            except ApiError as error:
                logger.warning("pods can't be bound now: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
                self._wake.set()

    async def _bind_what_fits(self) -> None:
        """Binds waiting pods to this node, oldest first, as far as there is room."""
        waiting = [pod for pod in self._informer.objects.values() if wants_a_node(pod)]
        for pod in sorted(waiting, key=_age):
            uid = pod["metadata"]["uid"]
            if uid in self._bound:
                continue
            problem = self._why_not(pod)
            if problem is None:
                await self._bind(pod)
            else:
                await self._explain(pod, f"0/1 nodes are available: {problem}.")

    def _why_not(self, pod: Object) -> str | None:
        labels = self._node["metadata"]["labels"]
        try:
            return why_not(pod, labels, self.capacity, self._occupants())
        except ValueError as error:
            return str(error)

    def _occupants(self) -> list[Object]:
        """The pods on this node that have not ended, with those just bound."""
        seen = {
            pod["metadata"]["uid"]: pod
            for pod in self._informer.objects.values()
            if pod["spec"].get("nodeName") == self.node_name
        }
        return [pod for pod in (self._bound | seen).values() if not has_ended(pod)]

    async def _bind(self, pod: Object) -> None:
        metadata = pod["metadata"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {key: metadata[key] for key in ("name", "namespace", "uid")},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.node_name},
        }
        path = PODS.path(metadata["namespace"], metadata["name"], "binding")
        try:
            await self.client.raw("POST", path, binding)
        except (NotFound, Conflict):
            return
        self._bound[metadata["uid"]] = pod

    async def _explain(self, pod: Object, message: str) -> None:
        """Writes why the pod still waits, as a scheduler does."""
        metadata, conditions = pod["metadata"], (pod.get("status") or {}).get("conditions") or []
        others = [each for each in conditions if each["type"] != "PodScheduled"]
        if any(each.get("message") == message for each in conditions):
            return
        unscheduled = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastTransitionTime": timestamp(),
        }
        body = {
            "metadata": {"uid": metadata["uid"]},
            "status": {"conditions": [*others, unscheduled]},
        }
        try:
            await self.client.patch(PODS, metadata["namespace"], metadata["name"], body, "status")
        except (NotFound, Invalid):
            return

    async def _register(self) -> None:
        """Writes the node as it is, and creates it where it is missing."""
        try:
            await self.client.patch(NODES, None, self.node_name, self._node)
        except NotFound:
            await self.client.create(NODES, None, self._node)
        await self._write_node()

    async def _beat(self) -> None:
        """Shows that the node is alive; without it a real control plane would empty it."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                await self._register()
            except ApiError as error:
                logger.warning("the node's heartbeat failed: %s", error)

    async def _write_node(self, stopped: bool = False) -> None:
        status = build_node_status(self.capacity, self._ready_since, stopped)
        await self.client.patch(NODES, None, self.node_name, {"status": status}, "status")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"another runner uses {path.parent.parent}: stop it, or give another --volumes"
            ) from error
        yield


def _age(pod: Object) -> tuple[str, str, str]:
    metadata = pod["metadata"]
    return metadata["creationTimestamp"], metadata["namespace"], metadata["name"]
