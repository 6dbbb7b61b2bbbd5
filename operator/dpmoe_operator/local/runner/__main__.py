"""`python -m dpmoe_operator.local.runner`: a node of local processes for a control plane."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import ConfigError, load_access
from dpmoe_operator.kube.errors import ApiError
from dpmoe_operator.local.runner.images import load_images
from dpmoe_operator.local.runner.node import Capacity
from dpmoe_operator.local.runner.quantity import parse
from dpmoe_operator.local.runner.runner import ProcessRunner


def main() -> int:
    """Runs until SIGINT or SIGTERM; a second one ends it at once."""
    options = _parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    print("emulated node: local processes, no isolation", file=sys.stderr, flush=True)
    try:
        asyncio.run(_run(options))
    except (ApiError, ConfigError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    machine = Capacity.of_this_machine()
    capacity = Capacity(
        cpu=options.cpu or machine.cpu, memory=options.memory or machine.memory, gpus=options.gpus
    )
    images = load_images(options.images)
    async with KubeClient(load_access(options.kubeconfig)) as client:
        runner = ProcessRunner(
            client,
            images,
            options.volumes,
            node_name=options.node,
            capacity=capacity,
            restart_backoff_seconds=options.restart_backoff,
        )
        task = asyncio.create_task(runner.run())
        _stop_by_signal(task)
        try:
            await task
        except asyncio.CancelledError:
            print("stopped", file=sys.stderr)


def _stop_by_signal(task: asyncio.Task[None]) -> None:
    def stop() -> None:
        # The guardian sees to the processes that this leaves behind.
        if task.cancelling():
            os._exit(1)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dpmoe_operator.local.runner")
    parser.description = "Runs pods as processes of this machine, without any isolation."
    add = parser.add_argument
    add("--kubeconfig", type=Path, required=True, help="how to reach the API server")
    add("--images", type=Path, required=True, help="JSON: image -> {command: [...], env: {...}}")
    add("--volumes", type=Path, required=True, help="folder of claims: NAMESPACE/CLAIM")
    add("--node", default="local", help="name of the Node (default: local)")
    add("--cpu", type=_quantity, help="processors to offer (default: the machine's)")
    add("--memory", type=_quantity, help="memory to offer (default: the machine's)")
    add("--gpus", type=int, default=0, help="nvidia.com/gpu to offer; they need not exist")
    add(
        "--restart-backoff",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="first wait before a failed container starts again",
    )
    return parser.parse_args()


def _quantity(text: str) -> str:
    parse(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
