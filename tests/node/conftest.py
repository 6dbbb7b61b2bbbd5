"""The node that all tests share. Without one, tests are skipped, but never in CI."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.node.cluster import Node, lacking
from tests.node.image import build_image
from tests.node.world import World


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """A node with the trainer's image; it goes down whatever happens."""
    if missing := lacking():
        reason = f"needs a node that runs containers; this machine lacks {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Not below pytest's own folder: the node's sockets are in it, and their paths must be short.
    directory = Path(tempfile.mkdtemp(prefix="dpmoe-node-"))
    node = Node(directory)
    try:
        node.up()
        yield node
    finally:
        node.down()


@pytest.fixture(scope="session")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The node with an owner's block in it, and the operator at work."""
    world = World(node, tmp_path_factory.mktemp("world"))
    with ExitStack() as stack:
        world.build()
        world.start_operator(stack)
        node.load(build_image(tmp_path_factory.mktemp("image")))
        yield world
