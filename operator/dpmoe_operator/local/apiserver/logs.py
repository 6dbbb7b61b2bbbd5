"""`GET …/pods/NAME/log`: reads the file that the pod's annotation names.

Whoever runs the pods writes their output to files on this machine and notes the path in the
annotation `local.dpmoe.dev/log-file`. All containers of a pod share that one file.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from . import errors
from .cluster import Cluster
from .resources import PODS, Object

LOG_FILE_ANNOTATION = "local.dpmoe.dev/log-file"
POLL_SECONDS = 0.2
_CHUNK = 64 * 1024


async def pod_log(
    cluster: Cluster, namespace: str, name: str, *, follow: bool, tail_lines: int | None
) -> AsyncIterator[bytes]:
    """The output of a pod so far, and with `follow` all that comes until the pod ends.

    Raises:
        ApiError: 404 without the pod, 400 before it has written anything.
    """
    path = log_file(cluster.get(PODS, namespace, name).object)
    with path.open("rb") as file:
        if tail_lines is not None:
            file.seek(_tail_offset(path, tail_lines))
        while True:
            # Whether the pod has ended is asked first: what it wrote last is read after that.
            ended = _has_ended(cluster, namespace, name)
            while chunk := file.read(_CHUNK):
                yield chunk
            if not follow or ended:
                return
            await asyncio.sleep(POLL_SECONDS)


def log_file(pod: Object) -> Path:
    """The file of a pod's output.

    Raises:
        ApiError: 400, if there is none yet.
    """
    annotation = pod["metadata"].get("annotations", {}).get(LOG_FILE_ANNOTATION)
    if annotation is None or not Path(annotation).is_file():
        container = pod["spec"]["containers"][0]["name"]
        name = pod["metadata"]["name"]
        raise errors.bad_request(
            f'container "{container}" in pod "{name}" is waiting to start: no log file'
        )
    return Path(annotation)


def _has_ended(cluster: Cluster, namespace: str, name: str) -> bool:
    stored = cluster.store.get(PODS.storage, namespace, name)
    return stored is None or stored.object["status"].get("phase") in ("Succeeded", "Failed")


def _tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin."""
    content = path.read_bytes()
    end = len(content.removesuffix(b"\n"))
    offset = len(content) if lines == 0 else end
    for _ in range(lines):
        offset = content.rfind(b"\n", 0, offset)
        if offset < 0:
            return 0
    return offset + 1 if lines else offset
