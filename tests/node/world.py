"""The world of the node tests: an owner with volumes on the node, a team, and the operator.

The operator is the real process with the real trainer contract. What a test claims is read back
from the server: the ledger's records, the job's status, the pods.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.node.cluster import Node
from tests.node.image import IMAGE

from dpmoe_operator.api.crd import all_definitions
from dpmoe_operator.launch.launching import JOB_NAME

SYSTEM, OWNER, TEAM = "dpmoe-system", "clinic", "team-a"
ROWS = 200
MISSING_IMAGE = "127.0.0.1:1/absent:1"
"""An image of a registry that answers nothing, at once."""

Object = dict[str, Any]


def volume(claim: str, folder: Path) -> list[Object]:
    """A claim in the owner's namespace, bound to a folder of the node."""
    shared = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "volumeName": claim,
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": claim},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": str(folder), "type": "Directory"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": OWNER},
            "spec": {**shared, "resources": {"requests": {"storage": "1Gi"}}},
        },
    ]


def block() -> Object:
    """A block that opens everything to the team, and trusts an image that nobody has."""
    return {
        "apiVersion": "dpmoe.dev/v1alpha1",
        "kind": "PrivateBlock",
        "metadata": {"name": "notes", "namespace": OWNER},
        "spec": {
            "dataset": {
                "claim": {"claimName": "notes", "path": "train.jsonl"},
                "format": "jsonl",
                "textColumn": "text",
                "labelColumn": "label",
                "units": ROWS,
                "labels": 2,
            },
            "budget": {"epsilon": "20", "delta": "1e-5"},
            "access": [
                {
                    "namespace": TEAM,
                    "models": ["models"],
                    "outputs": [{"claimName": "results"}],
                    "images": [MISSING_IMAGE],
                }
            ],
        },
    }


def job(name: str, *, model: str = "sleeps", steps: int = 5000, **spec: Any) -> Object:
    """A job whose model says what its steps do, by default for longer than any test waits."""
    return {
        "apiVersion": "dpmoe.dev/v1alpha1",
        "kind": "DPMoEJob",
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "blocks": {"namespace": OWNER, "names": ["notes"]},
            "privacy": {"epsilon": "2", "delta": "1e-5", "clippingNorm": "1"},
            "model": {"claim": {"claimName": "models", "path": model}},
            "training": {
                "logicalBatch": 20,
                "steps": steps,
                "optimizer": {"name": "sgd", "learningRate": "0.1"},
            },
            "resources": {"memory": "96Mi", "sharedMemory": "1Mi"},
            "output": {"claim": {"claimName": "results", "path": name}},
            **spec,
        },
    }


class World:
    """A node with the world's objects in it, and the operator that serves them.

    Attributes:
        image: the operator's own trainer image.
        claims: what the owner has, each a folder of the node.
    """

    image = IMAGE
    claims: tuple[str, ...] = ("notes", "models", "results")

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.results = folder / "results"
        self.folder = folder
        self._log = folder / "operator.log"
        self._operator: subprocess.Popen[bytes] | None = None

    def build(self) -> None:
        """Install the custom resources, and apply the world's objects."""
        definitions = list(all_definitions().values())
        self.apply(*definitions)
        names = [f"crd/{definition['metadata']['name']}" for definition in definitions]
        self.node.kubectl("wait", "--for=condition=Established", "--timeout=30s", *names)
        spaces = [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            for name in (SYSTEM, OWNER, TEAM)
        ]
        (self.folder / "anchor").mkdir()
        volumes = []
        for claim in self.claims:
            folder = self.folder / claim
            folder.mkdir()
            volumes += volume(claim, folder)
        self.fill()
        self.apply(*spaces, *volumes, self.block())

    def fill(self) -> None:
        """Put data into the claims, and open those that trainers write to."""
        self.results.chmod(0o777)
        rows = "".join(f'{{"text": "note {i}", "label": {i % 2}}}\n' for i in range(ROWS))
        (self.folder / "notes" / "train.jsonl").write_text(rows)

    def block(self) -> Object:
        """The owner's block."""
        return block()

    def start_operator(self, stack: ExitStack) -> None:
        """Start the operator; it ends with the node."""
        log = stack.enter_context(self._log.open("wb"))
        self._operator = self.node.start(
            sys.executable,
            *("-m", "dpmoe_operator.cli.main", "operator"),
            *("--namespace", SYSTEM, "--trainer-image", self.image),
            *("--anchor", str(self.folder / "anchor")),
            log=log,
        )
        stack.callback(self._operator.wait, 30)
        stack.callback(self._operator.kill)

    def apply(self, *manifests: Object) -> None:
        """As `kubectl apply -f`."""
        everything = {"apiVersion": "v1", "kind": "List", "items": manifests}
        self.node.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(everything))

    def delete_job(self, name: str) -> None:
        """As `kubectl delete dpmoejob`."""
        self.node.kubectl("delete", "dpmoejob", name, "-n", TEAM, "--timeout=20s")

    def delete_pod(self, name: str, *flags: str) -> None:
        """As `kubectl delete pod`, without waiting until it is gone."""
        self.node.kubectl("delete", "pod", name, "-n", OWNER, "--wait=false", *flags)

    def job(self, name: str) -> Object:
        """A DPMoEJob."""
        return self._get("dpmoejob", name, "-n", TEAM)

    def status(self, name: str) -> Object:
        """The status of a DPMoEJob."""
        return dict(self.job(name).get("status") or {})

    def block_status(self) -> Object:
        """The status of the block."""
        return dict(self._get("privateblock", "notes", "-n", OWNER)["status"])

    def pods(self, name: str) -> list[Object]:
        """The pods of a job."""
        return list(self._get("pods", "-n", OWNER, "-l", f"{JOB_NAME}={name}")["items"])

    def records(self, kind: str) -> list[Object]:
        """All records of a kind in the ledger."""
        entries = self._get("ledgerentries", "-n", SYSTEM)["items"]
        return [r[kind] for e in entries for r in e["spec"]["records"] if kind in r]

    def record(self, kind: str, name: str) -> Object | None:
        """The ledger's only record of a kind about a job, if there is one by now."""
        found = [record for record in self.records(kind) if record["job"]["name"] == name]
        assert len(found) <= 1, found
        return found[0] if found else None

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """Wait until something holds; what it returned."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert self._operator is None or self._operator.poll() is None, self._operator_log()
            assert time.monotonic() < deadline, f"never: {what}\n{self._operator_log()}"
            time.sleep(0.2)
        return found

    def until_settled(self, name: str) -> tuple[Object, Object]:
        """Wait until a job is settled; what was granted, and the settlement."""
        settled = self.until(lambda: self.record("settled", name), f"{name} is settled")
        granted = self.record("granted", name)
        assert granted is not None
        return granted, settled

    def until_status(
        self, name: str, holds: Callable[[Object], Any], what: str, seconds: float = 60
    ) -> Object:
        """Wait until the status of a job is as wanted; the status."""

        def found() -> Object | None:
            status = self.status(name)
            return status if holds(status) else None

        status: Object = self.until(found, f"{name} {what}", seconds)
        return status

    def _get(self, *arguments: str) -> Object:
        result: Object = json.loads(self.node.kubectl("get", *arguments, "-o", "json"))
        return result

    def _operator_log(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
