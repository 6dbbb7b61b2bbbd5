"""What the tests of restored ledgers look at: grants, the condition of a block, the command."""

import os
import subprocess
import sys
from typing import Any

from tests.cluster.world import OWNER, World, job


def dpmoe_ledger(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`dpmoe ledger ...` as somebody with the operator's rights and its volume."""
    access = {"KUBECONFIG": str(world.stack.kubeconfig), "DPMOE_ANCHOR": str(world.stack.anchor)}
    return subprocess.run(
        [sys.executable, "-m", "dpmoe_operator.cli.main", "ledger", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **access},
    )


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
