"""What the platform team may set in the trainer's environment."""

import pytest

from dpmoe_operator.control.settings import variables


def test_variables_of_the_network_pass() -> None:
    texts = ["NCCL_SOCKET_IFNAME=eth0", "GLOO_SOCKET_IFNAME=eth0", "NCCL_DEBUG="]
    assert variables(texts) == (
        ("NCCL_SOCKET_IFNAME", "eth0"),
        ("GLOO_SOCKET_IFNAME", "eth0"),
        ("NCCL_DEBUG", ""),
    )


@pytest.mark.parametrize("text", ["DPMOE_PLAN=/x", "LD_PRELOAD=/x", "NCCL_DEBUG", "PET_NNODES=2"])
def test_all_others_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be NAME=VALUE"):
        variables([text])
