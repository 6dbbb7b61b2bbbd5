"""Credentials of a ServiceAccount, to run programs outside the cluster with its rights only."""

import subprocess
import sys
from pathlib import Path
from typing import Protocol

import yaml
from tests.chart.helm import kubernetes_binary


class Server(Protocol):
    """A real API server: the `api` fixture, or an `Envtest`. The embedded one has no tokens."""

    @property
    def url(self) -> str: ...

    @property
    def kubeconfig(self) -> Path: ...

    @property
    def ca_file(self) -> Path | None: ...


def kubectl_binary() -> Path:
    """The kubectl that was installed beside Python, else any."""
    beside = Path(sys.executable).with_name("kubectl")
    return beside if beside.exists() else kubernetes_binary("kubectl")


def service_account_kubeconfig(api: Server, namespace: str, name: str, path: Path) -> Path:
    """Write a kubeconfig that logs in as a ServiceAccount, with a token of one hour.

    Args:
        api: the API server, and an administrator's kubeconfig of it.
        namespace: the ServiceAccount's namespace, which becomes the context's too.
        name: the ServiceAccount.
        path: the file to write.

    Returns:
        `path`.
    """
    command = [str(kubectl_binary()), f"--kubeconfig={api.kubeconfig}", "--namespace", namespace]
    token = subprocess.run(
        [*command, "create", "token", name, "--duration=1h"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    cluster = {"server": api.url, "certificate-authority": str(api.ca_file)}
    context = {"cluster": "tested", "user": name, "namespace": namespace}
    path.touch(mode=0o600)
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "tested", "cluster": cluster}],
                "users": [{"name": name, "user": {"token": token}}],
                "contexts": [{"name": "tested", "context": context}],
                "current-context": "tested",
            }
        )
    )
    return path
