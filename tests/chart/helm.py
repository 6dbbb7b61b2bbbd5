"""Finds helm and runs it on the chart; the tests of the chart and of its installation share it."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "dpmoe"
UNPACK = ROOT.parent / "shared" / "bin" / "unpack"

Manifest = dict[str, Any]


def kubernetes_binary(name: str) -> Path:
    """A program from KUBEBUILDER_ASSETS, from the unpacked folder, or from PATH.

    Where there is none the test is skipped by name, and fails under CI.
    """
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder and UNPACK.exists():
        folder = subprocess.run([UNPACK], capture_output=True, text=True, check=True).stdout.strip()
    if folder and (Path(folder) / name).exists():
        return Path(folder) / name
    if on_path := shutil.which(name):
        return Path(on_path)
    missing = f"needs {name}: put it on PATH, or into the folder that KUBEBUILDER_ASSETS names"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


@dataclass(frozen=True)
class Helm:
    """The helm program, on one chart and, where a kubeconfig is given, on one cluster."""

    binary: Path
    home: Path
    kubeconfig: Path | None = None

    def __call__(
        self, *arguments: str, values: Mapping[str, Any] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run helm; `values` are passed as a file. Its caches and settings stay in `home`."""
        files: tuple[str, ...] = ()
        if values is not None:
            path = self.home / "values.yaml"
            path.write_text(yaml.safe_dump(dict(values)))
            files = ("--values", str(path))
        folders = {f"HELM_{kind}_HOME": str(self.home) for kind in ("CACHE", "CONFIG", "DATA")}
        # A machine's own cluster must never be what a test installs into.
        result = subprocess.run(
            [str(self.binary), *arguments, *files],
            env={**os.environ, **folders, "KUBECONFIG": str(self.kubeconfig or os.devnull)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check:
            assert result.returncode == 0, f"helm {arguments}: {result.stdout}{result.stderr}"
        return result

    def render(self, values: Mapping[str, Any], namespace: str = "dpmoe-system") -> list[Manifest]:
        """The chart's manifests."""
        result = self("template", "dpmoe", str(CHART), "--namespace", namespace, values=values)
        return [manifest for manifest in yaml.safe_load_all(result.stdout) if manifest]


def only(manifests: list[Manifest], kind: str, name: str, namespace: str | None = None) -> Manifest:
    """The one manifest of that kind and name, and namespace where several have the name."""
    found = [
        manifest
        for manifest in manifests
        if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
        and namespace in (None, manifest["metadata"].get("namespace"))
    ]
    assert len(found) == 1, f"{len(found)} of {kind} {name} in {namespace}"
    return found[0]
