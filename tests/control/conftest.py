"""Property tests here repeat exactly, on machines of any speed; and where most stories begin."""

import pytest
from hypothesis import settings
from tests.builders import TEAM, block
from tests.control.cluster import Cluster
from tests.control.operator import Operator
from tests.control.stages import OPENED, see

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def cluster() -> Cluster:
    """A cluster with one block, open to jobs that keep checkpoints."""
    cluster = Cluster()
    cluster.apply(block(uid="b", access=[{"namespace": TEAM, **OPENED}]))
    return cluster


@pytest.fixture
def operator(cluster: Cluster) -> Operator:
    """An operator that has seen it."""
    operator = Operator(cluster)
    see(operator)
    return operator
