"""A ledger that was taken back, with real operators: granting freezes, says why, and is mended.

No pod runs here: that a job is granted is enough, and is read in the ledger itself.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cluster.conftest import assets
from tests.cluster.world import OWNER, TEAM, World, block, fill_volumes, job, namespaces

from dpmoe_operator.local.stack import Stack

Dpmoe = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """An API server and an operator, without any node, and a first granted job."""
    if request.param == "envtest":
        os.environ["KUBEBUILDER_ASSETS"] = str(assets())
    directory = tmp_path_factory.mktemp(f"restore-{request.param}")
    fill_volumes(directory / "volumes")
    stack = Stack(directory, api=request.param)
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


@pytest.fixture
def dpmoe(world: World) -> Dpmoe:
    """`dpmoe ledger ...` as somebody with the operator's rights and its volume."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dpmoe_operator.cli.main", "ledger", *arguments]
        access = {
            "KUBECONFIG": str(world.stack.kubeconfig),
            "DPMOE_ANCHOR": str(world.stack.anchor),
        }
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **access},
        )

    return run


def granted(world: World, name: str) -> list[Any]:
    return [g for g in world.records("granted") if g["job"]["name"] == name]


def grant(world: World, name: str) -> None:
    """Apply a small job and wait until it has budget."""
    world.apply(job(name, privacy={"epsilon": "0.1", "delta": "1e-5", "clippingNorm": "1"}))
    world.until(lambda: granted(world, name), f"{name} is granted")


def stop_operator(world: World) -> None:
    assert world.stack.operator is not None
    world.stack.operator.stop()


def entries(world: World) -> list[str]:
    text = world.stack.kubectl("get", "ledgerentries", "-n", "dpmoe-system", "-o", "name")
    return sorted(text.split())


def take_back(world: World, count: int) -> None:
    """Delete the last entries, as a restored backup lacks them."""
    world.stack.kubectl("delete", "-n", "dpmoe-system", *entries(world)[-count:])


def condition(world: World) -> tuple[str, str, str]:
    """State of the block; status and reason of its LedgerVerified."""
    status = world.block().get("status") or {}
    found = [c for c in status.get("conditions", []) if c["type"] == "LedgerVerified"]
    return (
        status.get("state", ""),
        *((found[0]["status"], found[0]["reason"]) if found else ("", "")),
    )


def frozen(world: World, reason: str, waiting: str) -> None:
    """Granting is frozen, and whoever looks sees why; a waiting job gets nothing."""
    world.until(lambda: condition(world) == ("Frozen", "False", reason), f"frozen: {reason}")
    events = world.stack.kubectl("get", "events", "-n", OWNER, "-o", "jsonpath={.items[*].reason}")
    assert reason in events.split()

    def told() -> bool:
        status = world.job(waiting).get("status") or {}
        return (status.get("state"), status.get("reason")) == ("Pending", "LedgerFrozen")

    world.until(told, f"{waiting} says that granting is frozen")
    assert not granted(world, waiting)


def resumed(world: World, waiting: str) -> None:
    """The waiting job gets its budget, and the block stands again."""
    world.until(lambda: granted(world, waiting), f"{waiting} is granted")
    ready = ("Ready", "True", "Anchored")
    world.until(lambda: condition(world) == ready, "the block is ready again")
    assert len(granted(world, "first")) == 1


def test_restored_backup_is_found_on_start_and_put_back(world: World, dpmoe: Dpmoe) -> None:
    stop_operator(world)
    before = entries(world)
    take_back(world, 2)
    world.apply(job("after-restore"))
    world.stack.start_operator()
    frozen(world, "RolledBack", "after-restore")
    recovered = dpmoe("recover")
    assert recovered.returncode == 0, recovered.stderr
    assert "2 entries put back" in recovered.stdout
    assert entries(world)[: len(before)] == before
    resumed(world, "after-restore")


def test_backup_restored_under_a_living_operator(world: World, dpmoe: Dpmoe) -> None:
    take_back(world, 1)
    world.apply(job("meanwhile"))
    frozen(world, "RolledBack", "meanwhile")
    assert dpmoe("verify").returncode == 0, "what is left of the log is a log"
    assert dpmoe("recover").returncode == 0
    resumed(world, "meanwhile")


def test_lost_anchor_is_accepted_only_by_the_heads_digest(world: World, dpmoe: Dpmoe) -> None:
    stop_operator(world)
    for path in world.stack.anchor.iterdir():
        path.unlink()
    world.apply(job("after-loss"))
    world.stack.start_operator()
    frozen(world, "AnchorLost", "after-loss")
    assert not list(world.stack.anchor.glob("log-*"))
    empty = dpmoe("recover")
    assert empty.returncode == 1
    assert "holds no entry of the log" in empty.stderr
    wrong = dpmoe("reanchor", "--head", "0" * 16)
    assert wrong.returncode == 1
    head = dpmoe("verify").stdout.strip().split("head ")[-1][:16]
    accepted = dpmoe("reanchor", "--head", head)
    assert accepted.returncode == 0, accepted.stderr
    resumed(world, "after-loss")
    assert dpmoe("verify", "--anchor", str(world.stack.anchor)).returncode == 0


def test_full_or_missing_volume_freezes_until_it_is_back(world: World) -> None:
    away = world.stack.anchor.with_name("anchor-away")
    world.stack.anchor.rename(away)
    world.apply(job("no-volume"))
    # The entry may be in the log by then; it takes effect only once the anchor holds it.
    frozen_block = ("Frozen", "False", "AnchorUnusable")
    world.until(lambda: condition(world) == frozen_block, "frozen")
    name = "jsonpath={.items[?(@.metadata.labels.dpmoe\\.dev/job-name=='no-volume')].metadata.name}"
    assert world.stack.kubectl("get", "jobs", "-n", OWNER, "-o", name) == ""
    away.rename(world.stack.anchor)
    resumed(world, "no-volume")


def test_the_account_kept_its_history(world: World, dpmoe: Dpmoe) -> None:
    assert dpmoe("verify").returncode == 0
    [opened] = world.records("accountOpened")
    assert opened["block"]["namespace"] == OWNER
    names = [g["job"]["name"] for g in world.records("granted")]
    assert sorted(names) == ["after-loss", "after-restore", "first", "meanwhile", "no-volume"]
    assert all(g["job"]["namespace"] == TEAM for g in world.records("granted"))
