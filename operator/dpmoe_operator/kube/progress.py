"""Polls rank 0 of every running job: how far it is, by the plan's own public numbers."""

import asyncio
import logging
from typing import Any

import aiohttp
from pydantic import ValidationError

from dpmoe_operator.kube.picture import Picture
from dpmoe_trainer.contract import PROGRESS_PORT, Progress

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
MAX_BYTES = 4096

LOCAL_PORT = "local.dpmoe.dev/progress-port"
"""Annotation by which the local process runner says which port it gave to a pod."""


async def poll_progress(picture: Picture) -> None:
    """Ask every running rank 0 again and again; silence is not an error, it may be loading."""
    timeout = aiohttp.ClientTimeout(total=2.0)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            running = picture.running_pods()
            answers = await asyncio.gather(*(_ask(session, pod) for _, pod in running))
            for (job_uid, _), progress in zip(running, answers, strict=True):
                if progress is not None:
                    _remember(picture, job_uid, progress)
            await asyncio.sleep(POLL_SECONDS)


def _remember(picture: Picture, job_uid: str, told: Progress) -> None:
    """The newest answer, at the most steps that any told: a restarted run begins at fewer."""
    known = picture.progress.get(job_uid)
    if known is not None and known.step > told.step:
        told = told.model_copy(update={"step": known.step})
    if told != known:
        picture.progress[job_uid] = told
        picture.changed.set()


async def _ask(session: aiohttp.ClientSession, pod: dict[str, Any]) -> Progress | None:
    address = (pod.get("status") or {}).get("podIP")
    annotations = pod["metadata"].get("annotations") or {}
    port = annotations.get(LOCAL_PORT, PROGRESS_PORT)
    if not address:
        return None
    host = f"[{address}]" if ":" in address else address
    try:
        async with session.get(f"http://{host}:{port}/progress") as response:
            if response.status != 200:
                return None
            return Progress.model_validate_json(await response.content.read(MAX_BYTES))
    except (aiohttp.ClientError, TimeoutError, ValidationError, ValueError):
        return None
