"""Runs the embedded API server as a process: `python -m dpmoe_operator.local.apiserver`."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .server import HOST, EmbeddedApiServer


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dpmoe_operator.local.apiserver",
        description="An in-memory Kubernetes API server on loopback, for demos and tests.",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="where to listen; 0 (default) takes a free port"
    )
    parser.add_argument(
        "--kubeconfig", type=Path, required=True, help="file to write, with address and token"
    )
    options = parser.parse_args(arguments)
    try:
        asyncio.run(_serve(options.port, options.kubeconfig))
    except OSError as error:
        print(_explain(error, options.port, options.kubeconfig), file=sys.stderr)
        return 2
    return 0


async def _serve(port: int, kubeconfig: Path) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopping.set)
    async with EmbeddedApiServer(port) as server:
        server.write_kubeconfig(kubeconfig)
        print(f"ready: {server.url} kubeconfig {kubeconfig}", flush=True)
        await stopping.wait()


def _explain(error: OSError, port: int, kubeconfig: Path) -> str:
    """One line: the flag, its value, and what to do."""
    if error.filename is not None:
        return (
            f"--kubeconfig {kubeconfig}: can't be written ({error.strerror}); name a file in a "
            "folder that exists and is yours"
        )
    return (
        f"--port {port}: can't listen on {HOST}:{port} ({error.strerror}); end the process that "
        "uses it, name another port, or use --port 0 for a free one"
    )


if __name__ == "__main__":
    sys.exit(main())
