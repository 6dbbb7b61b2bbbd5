"""Which program stands for which image: an explicit table, since nothing is ever pulled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpmoe_operator.kube.client import Object
from dpmoe_operator.local.runner.expansion import expand


@dataclass(frozen=True)
class Image:
    """What an image would bring: its entry point and its environment."""

    command: tuple[str, ...]
    env: Mapping[str, str]

    def argv(self, container: Object, variables: Mapping[str, str]) -> list[str]:
        """The command line of a container.

        Its `command` replaces the entry point, and `$(NAME)` in what the pod says becomes the
        variable's value.
        """
        command = [expand(part, variables) for part in container.get("command") or []]
        arguments = [expand(part, variables) for part in container.get("args") or []]
        return [*(command or self.command), *arguments]


def load_images(path: Path) -> dict[str, Image]:
    """Reads a table `{"image": {"command": [...], "env": {...}}}` from a JSON file.

    Raises:
        ValueError: the file is not such a table; names what is wrong with it.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"image table {path}: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"image table {path}: must be an object from image names to programs")
    return {name: _image(f"image table {path}: {name!r}", entry) for name, entry in table.items()}


def _image(where: str, entry: Any) -> Image:
    if not isinstance(entry, dict) or set(entry) - {"command", "env"}:
        raise ValueError(f'{where}: must be {{"command": [...], "env": {{...}}}}, is {entry!r}')
    command, env = entry.get("command"), entry.get("env", {})
    if not isinstance(command, list) or not command or not _all_strings(command):
        raise ValueError(f"{where}: command must be a list of strings, is {command!r}")
    if not isinstance(env, dict) or not _all_strings(env.values()):
        raise ValueError(f"{where}: env must be an object of strings")
    return Image(tuple(command), env)


def _all_strings(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)
