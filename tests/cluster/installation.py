"""The chart, installed on a real API server of its own, and what tests ask of it.

Helm wants to be the one that creates the custom resources, so no other test may share the server.
"""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.chart.helm import CHART, Helm, kubernetes_binary
from tests.cluster.chart import kubectl_binary, service_account_kubeconfig

from dpmoe_operator.api.ledgerentry import AccountOpened, ObjectReference, Record
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.errors import NotFound
from dpmoe_operator.kube.resources import NAMESPACES
from dpmoe_operator.kube.store import KubeEntryStore
from dpmoe_operator.ledger.log import Ledger
from dpmoe_operator.local.envtest import Envtest

OPERATOR_NAMESPACE = "privacy"
DATA_NAMESPACE = "clinic-data"
TEAM_NAMESPACE = "team-search"
OTHER_NAMESPACE = "elsewhere"

VALUES: dict[str, Any] = {"dataNamespaces": [DATA_NAMESPACE]}

BLOCK: dict[str, Any] = {
    "apiVersion": "dpmoe.dev/v1alpha1",
    "kind": "PrivateBlock",
    "metadata": {"name": "visits"},
    "spec": {
        "dataset": {
            "claim": {"claimName": "visits", "path": "train.tsv"},
            "format": "tsv",
            "textColumn": "text",
            "labelColumn": "label",
            "units": 10_000,
        },
        "budget": {"epsilon": "10", "delta": "1e-6"},
        "access": [
            {
                "namespace": TEAM_NAMESPACE,
                "models": ["models"],
                "outputs": [{"claimName": "results"}],
            }
        ],
    },
}
JOB: dict[str, Any] = {
    "apiVersion": "dpmoe.dev/v1alpha1",
    "kind": "DPMoEJob",
    "metadata": {"name": "triage"},
    "spec": {
        "blocks": {"namespace": DATA_NAMESPACE, "names": ["visits"]},
        "privacy": {"epsilon": "2", "delta": "1e-6"},
        "model": {"claim": {"claimName": "models", "path": "tiny"}},
        "training": {
            "logicalBatch": 100,
            "steps": 20,
            "optimizer": {"learningRate": "1e-3"},
        },
        "output": {"claim": {"claimName": "results", "path": "triage"}},
    },
}


@dataclass(frozen=True)
class Installation:
    """A control plane on which the chart is installed, and its operator's credentials."""

    server: Envtest
    helm: Helm
    kubeconfig: Path

    def install(self, namespace: str, *arguments: str, check: bool = True) -> str:
        """Install the chart; returns what Helm printed."""
        result = self.helm(
            "install", "dpmoe", str(CHART), "-n", namespace, *arguments, values=VALUES, check=check
        )
        return result.stdout + result.stderr

    def upgrade(self, values: dict[str, Any]) -> None:
        """Upgrade the release to other values."""
        release = ("dpmoe", str(CHART), "-n", OPERATOR_NAMESPACE)
        self.helm("upgrade", *release, values=values)

    def uninstall(self) -> None:
        """Uninstall the release."""
        self.helm("uninstall", "dpmoe", "-n", OPERATOR_NAMESPACE)

    def kubectl(
        self, *arguments: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as a cluster administrator (system:masters)."""
        return subprocess.run(
            [str(kubectl_binary()), f"--kubeconfig={self.server.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@contextmanager
def installed(request: pytest.FixtureRequest, folder: Path) -> Iterator[Installation]:
    """A control plane with the chart; skips where only the embedded API server is wanted."""
    if request.config.getoption("--api") == "embedded":
        pytest.skip("--api=embedded: the embedded API server knows neither Helm nor RBAC")
    assets = kubernetes_binary("kube-apiserver").parent
    with Envtest(assets, folder / "state") as server:
        helm = Helm(kubernetes_binary("helm"), folder, server.kubeconfig)
        asyncio.run(_create_namespaces(server.kubeconfig))
        kubeconfig = folder / "operator.kubeconfig"
        installation = Installation(server, helm, kubeconfig)
        installation.install(OPERATOR_NAMESPACE)
        service_account_kubeconfig(server, OPERATOR_NAMESPACE, "dpmoe-operator", kubeconfig)
        yield installation


async def _create_namespaces(kubeconfig: Path) -> None:
    async with KubeClient(load_access(kubeconfig)) as client:
        for name in (OPERATOR_NAMESPACE, DATA_NAMESPACE, TEAM_NAMESPACE, OTHER_NAMESPACE):
            manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            await client.create(NAMESPACES, None, manifest)


async def open_account(operator: KubeClient, name: str = "kept") -> str:
    """Append an entry to the ledger, as the operator does; returns its name."""
    store = KubeEntryStore(operator, OPERATOR_NAMESPACE)
    ledger = Ledger(store, namespace=OPERATOR_NAMESPACE, writer="test")
    await ledger.load()
    opened = AccountOpened(
        account=f"claim://{DATA_NAMESPACE}/{name}/rows.tsv",
        block=ObjectReference(namespace=DATA_NAMESPACE, name=name, uid=name),
        unit="example",
        epsilon="1",
        delta="1e-6",
        conversion="tight",
        orders=["8"],
        capacity=[10**9],
        disjoint_from=[],
    )
    return await ledger.append([Record(account_opened=opened)], time="2026-01-01T00:00:00Z")


async def eventually(holds: Callable[[], Awaitable[Any]], what: str, seconds: float = 60) -> Any:
    """Wait until `holds` is true; a thing that is not there yet counts as not."""
    for _ in range(int(seconds / 0.1)):
        try:
            if answer := await holds():
                return answer
        except NotFound:
            pass
        await asyncio.sleep(0.1)
    raise AssertionError(f"never: {what}")
