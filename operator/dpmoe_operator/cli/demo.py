"""`dpmoe demo`: see the main job end to end on this machine."""

import json
import os
import signal
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpmoe_operator.cli.errors import user_errors
from dpmoe_operator.scheduling.policies import POLICIES
from dpmoe_operator.scheduling.policies import policy as policy_named

INTERRUPTED = 130


class ApiChoice(StrEnum):
    """Which API server the demo runs on."""

    EMBEDDED = "embedded"
    ENVTEST = "envtest"


def demo(
    api: Annotated[
        ApiChoice,
        typer.Option(help="embedded needs nothing; envtest needs KUBEBUILDER_ASSETS."),
    ] = ApiChoice.EMBEDDED,
    directory: Annotated[
        Path | None,
        typer.Option(help="New folder for the run (default: demo-runs/DATE-TIME)."),
    ] = None,
    downloads: Annotated[
        Path | None, typer.Option(help="Folder where data and model are kept between runs.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Folder of manifests to apply (default: the project's).")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the embedded API server; 0 for any.")
    ] = 0,
    policy: Annotated[
        str, typer.Option(help=f"Scheduling policy: {', '.join(POLICIES)}.")
    ] = "dual",
    keep: Annotated[bool, typer.Option(help="Keep everything running after the end.")] = False,
) -> None:
    """Run the demo: two blocks, two teams, four jobs; the last line printed is JSON."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with user_errors():
        from dpmoe_operator.local.demo.run import DemoOptions, run_demo
        from dpmoe_operator.local.stack import Stack

        policy_named(policy)
        stack = Stack(_new_folder(directory), api=api.value, policy=policy, port=port)
        options = DemoOptions(downloads or _cache(), examples or _examples(), keep)
        try:
            result = run_demo(stack, options, console)
        except KeyboardInterrupt:
            console.print("stopped; nothing is left running")
            raise typer.Exit(INTERRUPTED) from None
    typer.echo(json.dumps(result))


def _new_folder(directory: Path | None) -> Path:
    folder = directory or Path("demo-runs") / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--directory: {folder}: must be a new or empty folder")
    return folder.absolute()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dpmoe" / "downloads"


def _examples() -> Path:
    """The manifests: in a checkout beside the code, in a wheel inside the package."""
    package = Path(__file__).parent.parent
    for folder in (package / "examples", package.parent.parent / "examples"):
        if (folder / "demo").is_dir():
            return folder / "demo"
    raise ValueError("--examples: not found beside the code; name the folder of the manifests")
