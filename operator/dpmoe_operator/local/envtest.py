"""A real Kubernetes control plane without nodes: etcd, kube-apiserver, kube-controller-manager.

The embedded API server is an imitation, so every claim about Kubernetes is shown on this one. The
binaries come from a folder, by convention the one in KUBEBUILDER_ASSETS; nothing is downloaded
and no root is needed. Each process leads a session of its own and is killed with its whole
group on `stop()`; the kernel kills it too when the thread that started it dies.

etcd runs without fsync: right for tests, wrong for any claim about latency or durability.
"""

import contextlib
import ctypes
import http.client
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

ETCD = "etcd"
API_SERVER = "kube-apiserver"
CONTROLLER_MANAGER = "kube-controller-manager"

# The parent-death signal of prctl(2).
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class EnvtestError(Exception):
    """The control plane can't start; the message says what is missing and what to do."""


class Envtest:
    """One control plane on free loopback ports, with its state in one directory.

    Args:
        assets: folder with the binaries (KUBEBUILDER_ASSETS).
        directory: empty or new folder for certificates, logs, etcd's data and the kubeconfig.
        ready_seconds: how long the API server may take until it serves.
    """

    def __init__(self, assets: Path, directory: Path, *, ready_seconds: float = 120.0) -> None:
        self.assets = assets
        self.directory = directory
        self.ready_seconds = ready_seconds
        self.token = secrets.token_hex(16)
        self.url = ""
        self.kubeconfig = directory / "kubeconfig"
        self.ca_file = directory / "certs" / "apiserver.crt"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> Self:
        """Starts all three processes and waits until the default ServiceAccount exists.

        Raises:
            EnvtestError: a binary is missing, or a process ended or never became ready.
        """
        check_assets(self.assets)
        self.directory.mkdir(parents=True, exist_ok=True)
        key = _make_service_account_key(self.directory)
        tokens = self.directory / "tokens.csv"
        _write_private(tokens, f'{self.token},admin,admin,"system:masters"\n')
        etcd_port, peer_port, api_port, manager_port = _free_ports(4)
        self.url = f"https://127.0.0.1:{api_port}"
        try:
            self._spawn(ETCD, _etcd_flags(self.directory, etcd_port, peer_port))
            self._spawn(API_SERVER, self._api_server_flags(api_port, etcd_port, key, tokens))
            self._wait_for(API_SERVER, "/readyz")
            self._write_kubeconfig()
            self._spawn(CONTROLLER_MANAGER, self._controller_manager_flags(manager_port, key))
            self._wait_for(CONTROLLER_MANAGER, "/api/v1/namespaces/default/serviceaccounts/default")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kills whatever was started, and waits for it. Safe to call twice."""
        for process in reversed(self._processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _api_server_flags(
        self, port: int, etcd_port: int, key: Path, tokens: Path
    ) -> Sequence[str]:
        return (
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={self.ca_file.parent}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=none",
        )

    def _controller_manager_flags(self, port: int, key: Path) -> Sequence[str]:
        return (
            f"--kubeconfig={self.kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--leader-elect=false",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self.ca_file}",
        )

    def _spawn(self, name: str, flags: Sequence[str]) -> None:
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [str(self.assets / name), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _wait_for(self, name: str, path: str) -> None:
        """Polls `path` until it answers 200, and fails early if a process has ended."""
        deadline = time.monotonic() + self.ready_seconds
        while not self._answers(path):
            for started, process in self._processes.items():
                if process.poll() is not None:
                    raise EnvtestError(
                        f"{started} ended with exit code {process.returncode}; its last lines:\n"
                        f"{_tail(self._log(started))}"
                    )
            if time.monotonic() > deadline:
                raise EnvtestError(
                    f"{name} is not ready after {self.ready_seconds:.0f} s ({path}); its last "
                    f"lines:\n{_tail(self._log(name))}"
                )
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        if not self.ca_file.exists():
            return False
        try:
            context = ssl.create_default_context(cafile=str(self.ca_file))
        except ssl.SSLError:
            return False  # The server is still writing it.
        host = self.url.removeprefix("https://")
        connection = http.client.HTTPSConnection(host, timeout=5, context=context)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    def _write_kubeconfig(self) -> None:
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "envtest",
                    "cluster": {"server": self.url, "certificate-authority": str(self.ca_file)},
                }
            ],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "envtest", "context": {"cluster": "envtest", "user": "admin"}}],
            "current-context": "envtest",
        }
        _write_private(self.kubeconfig, yaml.safe_dump(config, sort_keys=False))

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


def check_assets(assets: Path) -> None:
    """Refuses a folder that lacks one of the three binaries, by name.

    Raises:
        EnvtestError: with the name of the missing binary and where it comes from.
    """
    for name in (ETCD, API_SERVER):
        if not os.access(assets / name, os.X_OK):
            raise EnvtestError(
                f"KUBEBUILDER_ASSETS={assets} has no executable {name!r}. Point it at a folder "
                "with etcd, kube-apiserver and kube-controller-manager; `setup-envtest use -p "
                "path` brings the first two."
            )
    if not os.access(assets / CONTROLLER_MANAGER, os.X_OK):
        raise EnvtestError(
            f"KUBEBUILDER_ASSETS={assets} has no executable {CONTROLLER_MANAGER!r}. Folders made "
            "by setup-envtest never have it, and without it nothing runs Jobs, collects garbage "
            "or empties deleted namespaces. Put the one of the same release beside the others, "
            "from a Kubernetes server tarball (kubernetes/server/bin) or "
            f"https://dl.k8s.io/VERSION/bin/linux/amd64/{CONTROLLER_MANAGER}."
        )


def _etcd_flags(directory: Path, port: int, peer_port: int) -> Sequence[str]:
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return (
        f"--data-dir={directory / 'data'}",
        "--unsafe-no-fsync",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    )


def _make_service_account_key(directory: Path) -> Path:
    """The RSA key that signs ServiceAccount tokens; kube-apiserver can't make it itself."""
    key = directory / "sa.key"
    if shutil.which("openssl") is None:
        raise EnvtestError(
            "openssl is not on PATH; it makes the key that signs ServiceAccount tokens. Install "
            "it, on Debian by `apt-get install openssl`."
        )
    _write_private(key, "")
    command = ["openssl", "genrsa", "-out", str(key), "2048"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise EnvtestError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return key


def _free_ports(count: int) -> list[int]:
    """Ports free at the moment of asking; all are held open together so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _die_with_parent() -> None:
    """Runs in the child between fork and exec: one system call, no allocation of locks."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
