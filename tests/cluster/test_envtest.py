"""How the real control plane refuses to start, and that nothing of it stays behind."""

import os

import pytest

from dpmoe_operator.local.envtest import Envtest, EnvtestError


def fill(folder, *names, script="#!/bin/sh\nexit 3\n"):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("present", "missing", "hint"),
    [
        ((), "etcd", "setup-envtest"),
        (("etcd",), "kube-apiserver", "setup-envtest"),
        (("etcd", "kube-apiserver"), "kube-controller-manager", "never have it"),
    ],
)
def test_a_missing_binary_is_named(tmp_path, present, missing, hint):
    assets = fill(tmp_path / "assets", *present)
    with pytest.raises(EnvtestError) as refused:
        Envtest(assets, tmp_path / "state").start()
    message = str(refused.value)
    assert message.startswith(f"KUBEBUILDER_ASSETS={assets} has no executable '{missing}'")
    assert hint in message
    assert not (tmp_path / "state").exists()


def test_missing_openssl_is_named(tmp_path, monkeypatch):
    names = ("etcd", "kube-apiserver", "kube-controller-manager")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvtestError, match="openssl is not on PATH"):
        Envtest(fill(tmp_path / "assets", *names), tmp_path / "state").start()


def test_a_process_that_ends_is_reported_and_the_others_are_killed(tmp_path):
    assets = fill(
        tmp_path / "assets",
        *("etcd", "kube-controller-manager"),
        script=f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n",
    )
    fill(assets, "kube-apiserver", script="#!/bin/sh\nsleep 1\necho some reason\nexit 3\n")
    with pytest.raises(EnvtestError) as refused:
        Envtest(assets, tmp_path / "state").start()
    assert "kube-apiserver ended with exit code 3" in str(refused.value)
    assert "some reason" in str(refused.value)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
