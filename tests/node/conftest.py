"""The node that all tests share. Without one, tests are skipped, but never in CI."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.node.cluster import Node, lacking
from tests.node.image import build_image
from tests.node.world import World


@contextmanager
def started(missing: Sequence[str] = ()) -> Iterator[Node]:
    """A node that goes down whatever happens.

    Args:
        missing: what this machine lacks of what the tests need besides it.
    """
    if missing := [*lacking(), *missing]:
        reason = f"needs a node that runs containers; this machine lacks {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Not below pytest's own folder: the node's sockets are in it, and their paths must be short.
    node = Node(Path(tempfile.mkdtemp(prefix="dpmoe-node-")))
    try:
        node.up()
        yield node
    finally:
        node.down()


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """The node that the tests with the stand-in trainer share."""
    with started() as node:
        yield node


@pytest.fixture(scope="session")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The node with an owner's block in it, and the operator at work."""
    world = World(node, tmp_path_factory.mktemp("world"))
    with ExitStack() as stack:
        world.build()
        world.start_operator(stack)
        node.load(build_image(tmp_path_factory.mktemp("image")))
        yield world
