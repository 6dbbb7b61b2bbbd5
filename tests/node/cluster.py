"""One real node for the tests: Kubernetes with a kubelet, and containers that the kernel confines.

A script brings it up in mount, network and process namespaces of its own, and takes all of it down
with one kill. Its addresses exist only inside, so whatever talks to it is started inside.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
SCRIPT = Path(os.environ.get("DPMOE_NODE_CLUSTER", ROOT.parent / "shared" / "bin" / "cluster"))
"""Takes `up`, `down`, `exec COMMAND...` and `load IMAGE.tar`; `mkimage.py` lies beside it."""

TOOLS = ("curl", "ip", "ldd", "nsenter", "openssl", "pgrep", "unshare", "xz")


def lacking() -> list[str]:
    """What this machine would need to run a node, in words; empty if nothing."""
    found = []
    if not (sys.platform == "linux" and os.geteuid() == 0):
        found.append("root on Linux")
    if not SCRIPT.exists():
        found.append("the script that starts a node, by DPMOE_NODE_CLUSTER")
    return found + [tool for tool in TOOLS if shutil.which(tool) is None]


class Node:
    """A cluster of one node, with its state in a folder that the script makes and removes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        gates = "--feature-gates=GenericWorkload=true,GangScheduling=true"
        self._environment = {
            **os.environ,
            "CLUSTER_DIR": str(directory),
            "APISERVER_ARGS": f"{gates} --runtime-config=scheduling.k8s.io/v1alpha2=true",
            "CONTROLLER_MANAGER_ARGS": gates,
            "SCHEDULER_ARGS": gates,
        }

    def up(self) -> None:
        """Start it and wait until it takes pods."""
        # Goes down when this end of the pipe closes: even if the tests are killed.
        self._undertaker = subprocess.Popen(
            ["sh", "-c", 'cat; exec "$0" down', SCRIPT],
            env=self._environment,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._run("up", timeout=120)

    def down(self) -> None:
        """End every process in it, however far it came up."""
        self._undertaker.communicate(timeout=60)

    def load(self, image: Path) -> None:
        """Give the node a container image."""
        self._run("load", str(image), timeout=300)

    def exec(self, *command: str, stdin: str | None = None, timeout: float = 60) -> str:
        """Run a command inside; what it printed."""
        return self._run("exec", *command, stdin=stdin, timeout=timeout)

    def start(self, *command: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a command inside that runs until the node goes down."""
        return subprocess.Popen(
            [SCRIPT, "exec", *command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as the administrator; what it printed."""
        return self.exec("kubectl", *arguments, stdin=stdin)

    def signal(self, process: str, name: str) -> None:
        """Send a signal to a part of the node, as `node.signal("kubelet", "STOP")`."""
        for pid in self.exec("pgrep", "-x", process).split():
            self.exec("kill", f"-{name}", pid)

    def _run(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        result = subprocess.run(
            [SCRIPT, *arguments],
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result.stdout
