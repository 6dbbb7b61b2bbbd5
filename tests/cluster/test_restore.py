"""A ledger that was taken back, with real operators: granting freezes, says why, and is mended.

Entries are deleted here, as a backup lacks them; `test_etcd_restore` restores a real one.

No pod runs here: that a job is granted is enough, and is read in the ledger itself.
"""

import json
import os
from collections.abc import Iterator

import pytest
from tests.cluster.conftest import assets
from tests.cluster.restores import (
    condition,
    dpmoe_ledger,
    entries,
    frozen,
    grant,
    resumed,
    stop_operator,
    take_back,
)
from tests.cluster.world import OWNER, TEAM, World, block, fill_volumes, job, namespaces

from dpmoe_operator.ledger.entry import digest_of
from dpmoe_operator.local.stack import Stack


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


def test_restored_backup_is_found_on_start_and_put_back(world: World) -> None:
    stop_operator(world)
    before = entries(world)
    take_back(world, 2)
    world.apply(job("after-restore"))
    world.stack.start_operator()
    frozen(world, "RolledBack", "after-restore")
    recovered = dpmoe_ledger(world, "recover")
    assert recovered.returncode == 0, recovered.stderr
    assert "2 entries put back" in recovered.stdout
    assert entries(world)[: len(before)] == before
    resumed(world, "after-restore")


def test_backup_restored_under_a_living_operator(world: World) -> None:
    take_back(world, 1)
    world.apply(job("meanwhile"))
    frozen(world, "RolledBack", "meanwhile")
    assert dpmoe_ledger(world, "verify").returncode == 0, "what is left of the log is a log"
    assert dpmoe_ledger(world, "recover").returncode == 0
    resumed(world, "meanwhile")


def test_entry_of_a_writer_that_stood_still_is_taken_out_by_its_digest(world: World) -> None:
    stop_operator(world)
    before = entries(world)
    place = ("-n", "dpmoe-system", before[-1], "-o", "json")
    lost = json.loads(world.stack.kubectl("get", *place))
    take_back(world, 1)
    late = {**lost["spec"], "writer": "operator-that-slept"}
    late["digest"] = digest_of(late)
    meta = {key: lost["metadata"][key] for key in ("name", "namespace")}
    world.apply({**lost, "metadata": meta, "spec": late})
    world.apply(job("after-sleep"))
    world.stack.start_operator()
    frozen(world, "AnchorForked", "after-sleep")
    told = dpmoe_ledger(world, "recover")
    assert told.returncode == 1
    assert "dpmoe ledger recover --drop" in told.stderr
    assert late["digest"][:16] in told.stderr
    dropped = dpmoe_ledger(world, "recover", "--drop", late["digest"][:16])
    assert dropped.returncode == 0, dropped.stderr
    assert json.loads(world.stack.kubectl("get", *place))["spec"] == lost["spec"]
    resumed(world, "after-sleep")


def test_lost_anchor_is_accepted_only_by_the_heads_digest(world: World) -> None:
    stop_operator(world)
    for path in world.stack.anchor.iterdir():
        path.unlink()
    world.apply(job("after-loss"))
    world.stack.start_operator()
    frozen(world, "AnchorLost", "after-loss")
    assert not list(world.stack.anchor.glob("log-*"))
    empty = dpmoe_ledger(world, "recover")
    assert empty.returncode == 1
    assert "holds no entry of the log" in empty.stderr
    wrong = dpmoe_ledger(world, "reanchor", "--head", "0" * 16)
    assert wrong.returncode == 1
    head = dpmoe_ledger(world, "verify").stdout.strip().split("head ")[-1][:16]
    accepted = dpmoe_ledger(world, "reanchor", "--head", head)
    assert accepted.returncode == 0, accepted.stderr
    resumed(world, "after-loss")
    assert dpmoe_ledger(world, "verify", "--anchor", str(world.stack.anchor)).returncode == 0


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


def test_the_account_kept_its_history(world: World) -> None:
    assert dpmoe_ledger(world, "verify").returncode == 0
    [opened] = world.records("accountOpened")
    assert opened["block"]["namespace"] == OWNER
    names = [g["job"]["name"] for g in world.records("granted")]
    assert sorted(names) == [
        "after-loss",
        "after-restore",
        "after-sleep",
        "first",
        "meanwhile",
        "no-volume",
    ]
    assert all(g["job"]["namespace"] == TEAM for g in world.records("granted"))
