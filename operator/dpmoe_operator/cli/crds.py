"""`dpmoe crds`: the CustomResourceDefinitions, generated from the models."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from dpmoe_operator.api.crd import all_definitions
from dpmoe_operator.cli.errors import user_errors

HEADER = "# Generated from operator/dpmoe_operator/api by `make crds`; do not edit.\n"


def render() -> dict[str, str]:
    """File names and contents of crds/."""
    return {
        f"{plural}.yaml": HEADER + yaml.safe_dump(definition, sort_keys=False, width=100)
        for plural, definition in all_definitions().items()
    }


def crds(
    output: Annotated[
        list[Path] | None, typer.Option(help="Folder to write to; may be repeated.")
    ] = None,
    check: Annotated[
        list[Path] | None, typer.Option(help="Folder that must be up to date; may be repeated.")
    ] = None,
) -> None:
    """Print the CustomResourceDefinitions, write them, or check written ones."""
    with user_errors():
        for folder in output or []:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in render().items():
                (folder / name).write_text(text)
        for folder in check or []:
            _check(folder)
        if not output and not check:
            typer.echo("---\n".join(render().values()), nl=False)


def _check(folder: Path) -> None:
    expected = render()
    there = {path.name: path.read_text() for path in folder.glob("*.yaml")}
    if there != expected:
        stale = sorted(n for n in there.keys() | expected if there.get(n) != expected.get(n))
        raise ValueError(f"{folder}: {', '.join(stale)}: not what the models say; run `make crds`")
