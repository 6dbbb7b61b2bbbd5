"""A real backup of etcd, really restored: what was granted since is found missing and put back."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.conftest import assets
from tests.cluster.restores import (
    condition,
    dpmoe_ledger,
    entries,
    frozen,
    grant,
    granted,
    resumed,
    stop_operator,
)
from tests.cluster.world import World, block, fill_volumes, job, namespaces

from dpmoe_operator.local.stack import Stack

pytestmark = pytest.mark.envtest


@pytest.fixture
def real_world(tmp_path: Path) -> Iterator[World]:
    """A real control plane and an operator, without any node, and a first granted job."""
    os.environ["KUBEBUILDER_ASSETS"] = str(assets())
    fill_volumes(tmp_path / "volumes")
    stack = Stack(tmp_path, api="envtest")
    try:
        stack.start_api()
        stack.install()
        stack.start_operator()
        world = World(stack)
        world.apply(*namespaces())
        world.apply(block())
        grant(world, "first")
        yield world
    finally:
        stack.stop()


def stop_everything(world: World) -> Path:
    """Stop the operator and the control plane; the folder with etcd's data."""
    stop_operator(world)
    assert world.stack.control_plane is not None
    world.stack.control_plane.stop()
    return world.stack.control_plane.directory / "data"


def start_everything(world: World) -> None:
    world.stack.start_api()
    world.stack.start_operator()


def test_restored_etcd_refills_nothing(real_world: World, tmp_path: Path) -> None:
    world = real_world
    data = stop_everything(world)
    shutil.copytree(data, tmp_path / "backup")
    start_everything(world)
    grant(world, "second")
    log = entries(world)

    shutil.rmtree(stop_everything(world))
    shutil.copytree(tmp_path / "backup", data)
    start_everything(world)
    world.apply(job("third", privacy={"epsilon": "0.1", "delta": "1e-5", "clippingNorm": "1"}))
    frozen(world, "RolledBack", "third")
    assert not granted(world, "second"), "the backup knows nothing of it"

    assert dpmoe_ledger(world, "recover").returncode == 0
    assert entries(world)[: len(log)] == log
    resumed(world, "third")
    assert len(granted(world, "second")) == 1
    assert condition(world) == ("Ready", "True", "Anchored")
    assert dpmoe_ledger(world, "verify", "--anchor", str(world.stack.anchor)).returncode == 0
    # Its DPMoEJob is not in the backup: it was never launched, so its budget returns, and only its.
    [settled] = world.until(
        lambda: [s for s in world.records("settled") if s["job"]["name"] == "second"], "settled"
    )
    assert settled["outcome"] in ("NeverStarted", "WorkloadVanished"), settled
