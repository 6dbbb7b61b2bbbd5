"""A small world for end-to-end tests: a data namespace with volumes, a team, tiny real models."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.tiny import WORDS, save_mixtral, sentences, write_rows

from dpmoe_operator.local.stack import Stack

OWNER, TEAM, OTHER_TEAM = "clinic", "team-a", "team-b"
ROWS = 200

Object = dict[str, Any]


def fill_volumes(volumes: Path) -> None:
    """The owner's claims: private notes, a mixture-of-experts model, one with pickled weights."""
    notes = volumes / OWNER / "notes"
    notes.mkdir(parents=True)
    write_rows(notes / "train.jsonl", sentences(ROWS))
    write_rows(notes / "public.jsonl", sentences(20))
    models = volumes / OWNER / "models"
    save_mixtral(models / "mixtral", WORDS)
    pickled = models / "pickled"
    save_mixtral(pickled, WORDS)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (volumes / OWNER / "results").mkdir()


def namespaces() -> list[Object]:
    """The owner's namespace and two teams', with the owner's claims."""
    spaces = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        for name in (OWNER, TEAM, OTHER_TEAM)
    ]
    claims = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": OWNER},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }
        for name in ("notes", "models", "results")
    ]
    return spaces + claims


def block(name: str = "notes", **spec: Any) -> Object:
    """A block over the tiny table that opens everything to the first team."""
    table = {"format": "jsonl", "textColumn": "text", "labelColumn": "label"}
    return {
        "apiVersion": "dpmoe.dev/v1alpha1",
        "kind": "PrivateBlock",
        "metadata": {"name": name, "namespace": OWNER},
        "spec": {
            "dataset": {
                "claim": {"claimName": "notes", "path": "train.jsonl"},
                "units": ROWS,
                "labels": 2,
                **table,
            },
            "evaluation": {"claim": {"claimName": "notes", "path": "public.jsonl"}, **table},
            "budget": {"epsilon": "20", "delta": "1e-5"},
            "access": [
                {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]}
            ],
            **spec,
        },
    }


def job(name: str, *, namespace: str = TEAM, **spec: Any) -> Object:
    """A job of a few steps on the tiny mixture."""
    return {
        "apiVersion": "dpmoe.dev/v1alpha1",
        "kind": "DPMoEJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "blocks": {"namespace": OWNER, "names": ["notes"]},
            "privacy": {"epsilon": "3", "delta": "1e-5", "clippingNorm": "1"},
            "model": {"claim": {"claimName": "models", "path": "mixtral"}},
            "training": {
                "logicalBatch": 20,
                "steps": 4,
                "maxTokens": 16,
                "optimizer": {"name": "sgd", "learningRate": "0.1"},
            },
            "output": {"claim": {"claimName": "results", "path": name}},
            **spec,
        },
    }


class World:
    """A stack with the world's objects in it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def apply(self, *manifests: Object) -> None:
        """As `kubectl apply -f`."""
        path = self.stack.directory / "apply.yaml"
        path.write_text("\n---\n".join(json.dumps(manifest) for manifest in manifests))
        self.stack.kubectl("apply", "-f", str(path))

    def get(self, plural: str, name: str, namespace: str) -> Object:
        """One object."""
        text = self.stack.kubectl("get", plural, name, "-n", namespace, "-o", "json")
        result: Object = json.loads(text)
        return result

    def job(self, name: str, namespace: str = TEAM) -> Object:
        """A DPMoEJob."""
        return self.get("dpmoejobs", name, namespace)

    def block(self, name: str = "notes") -> Object:
        """A PrivateBlock."""
        return self.get("privateblocks", name, OWNER)

    def records(self, kind: str) -> list[Object]:
        """All records of a kind in the ledger, in order."""
        text = self.stack.kubectl("get", "ledgerentries", "-n", "dpmoe-system", "-o", "json")
        entries = sorted(json.loads(text)["items"], key=lambda e: str(e["metadata"]["name"]))
        return [r[kind] for e in entries for r in e["spec"]["records"] if kind in r]

    def until(
        self, holds: Callable[[], Any], what: str, *, seconds: float = 120, supervise: bool = True
    ) -> Any:
        """Wait until something holds; what it returned."""
        deadline = time.monotonic() + seconds
        while True:
            if supervise:
                self.stack.supervise()
            if found := holds():
                return found
            assert time.monotonic() < deadline, f"never: {what}\n{self._logs()}"
            time.sleep(0.3)

    def until_state(self, name: str, *states: str, seconds: float = 120) -> Mapping[str, Any]:
        """Wait until a job is in one of the states; its status."""

        def status() -> Mapping[str, Any] | None:
            found: Mapping[str, Any] = self.job(name).get("status") or {}
            return found if found.get("state") in states else None

        found: Mapping[str, Any] = self.until(status, f"{name} is {states}", seconds=seconds)
        return found

    def _logs(self) -> str:
        return "\n".join(
            child.last_lines(15) for child in (self.stack.operator, self.stack.runner) if child
        )
