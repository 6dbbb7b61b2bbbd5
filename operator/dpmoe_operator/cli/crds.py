"""`dpmoe crds`: writes the CustomResourceDefinitions, generated from the models."""

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
        Path | None, typer.Option(help="Folder to write to; without it they are printed.")
    ] = None,
) -> None:
    """Print or write the CustomResourceDefinitions."""
    with user_errors():
        if output is None:
            typer.echo("---\n".join(render().values()), nl=False)
            return
        output.mkdir(parents=True, exist_ok=True)
        for name, text in render().items():
            (output / name).write_text(text)
