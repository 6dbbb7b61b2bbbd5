"""What a model folder may hold, checked before anything in it is loaded.

A model is data: weights in safetensors, a configuration, a tokenizer. A pickle runs code when it is
read, and code in the folder (`auto_map`, *.py) runs when the model is built, beside private data.
Both are refused by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_INDEX = "model.safetensors.index.json"


class UnusableModel(ValueError):
    """A model that is not loaded; the message names what is wrong with it and the remedy."""


def inspect_folder(folder: Path) -> Path:
    """Checks a model folder by its files alone; returns it.

    Raises:
        UnusableModel: The folder is missing or has no configuration, no tokenizer, no weights in
            safetensors, or code of its own.
    """
    if not folder.is_dir():
        raise UnusableModel(f"{folder} is not a folder: give a folder with a model's files")
    config = _read_json(folder / "config.json", "a configuration")
    _refuse_code(folder, config)
    _require_safetensors(folder)
    _require_readable(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UnusableModel(
            f"{folder} has no tokenizer: it needs tokenizer.json or its family's vocabulary file"
        )
    return folder


def require_complete(folder: Path, loading: dict[str, Any], new: tuple[str, ...] = ()) -> None:
    """Checks that a checkpoint held the model's weights: what it lacks would be random.

    Args:
        folder: The checkpoint's folder.
        loading: What transformers reported on loading it (`output_loading_info`).
        new: Prefixes of parameters that may be new, such as a classifier's head.

    Raises:
        UnusableModel: Another parameter is missing, or has another shape.
    """
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(new))
    mismatched = sorted(str(key) for key in loading["mismatched_keys"])
    if missing or mismatched:
        raise UnusableModel(
            f"{folder} does not hold the model's weights: {(missing or mismatched)[0]} is missing "
            "or of another shape"
        )


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    scripts = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    if scripts:
        raise UnusableModel(
            f"{folder} holds code ({scripts[0]}), which is never run: use a model that "
            "transformers implements, and remove the file"
        )
    for name, content in _configurations(folder, config):
        if "auto_map" in content:
            raise UnusableModel(
                f"{folder}: {name} has auto_map, so the model wants code of its own, which is "
                "never run: use a model that transformers implements"
            )
    if (folder / "adapter_config.json").exists():
        raise UnusableModel(
            f"{folder} holds an adapter (adapter_config.json), not a model: merge it into its base"
        )


def _configurations(folder: Path, config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    tokenizer = folder / "tokenizer_config.json"
    found = [("config.json", config)]
    if tokenizer.exists():
        found.append((tokenizer.name, _read_json(tokenizer, "a tokenizer configuration")))
    return found


def _require_readable(folder: Path) -> None:
    """Opens each file of weights: safetensors says of one it may not read that there is none.

    It also writes files that only their owner may read, who is seldom the trainer's user.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            path.open("rb").close()
        except OSError as error:
            raise UnusableModel(
                f"{path} cannot be read ({error.strerror}): let user {os.getuid()} read it, as by "
                f"chmod a+r"
            ) from error


def _require_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f"only pickled ones ({', '.join(pickles)}), which run code" if pickles else "none"
        raise UnusableModel(
            f"{folder} has no weights in safetensors, {found}: convert them to *.safetensors"
        )
    if (folder / _INDEX).exists():
        for shard in sorted(set(_read_json(folder / _INDEX, "an index")["weight_map"].values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UnusableModel(
                    f"{folder}: {_INDEX} points to {shard!r}: every shard must be a *.safetensors "
                    "file of the folder"
                )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise UnusableModel(f"{path.parent} has no {path.name}: a model folder needs {what}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableModel(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnusableModel(f"{path} is not a JSON object")
    return content
