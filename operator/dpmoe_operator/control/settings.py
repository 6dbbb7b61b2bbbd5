"""What the platform team configures, as one immutable value."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

OPEN_VARIABLES = re.compile(r"(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+")
"""What the platform team may set in the trainer's environment: how its network is used."""


@dataclass(frozen=True)
class Settings:
    """Configuration of the operator.

    Attributes:
        namespace: where the ledger and the Lease live.
        trainer_image: the operator's own trainer image, the only one whose reports prove a refund.
        policy: name of the scheduling policy.
        fairness: share of each block's available budget, in [0, 1], that goes in the order of DPF
            before the policy gets the rest.
        foresight_seconds: how far ahead unlocks by time are counted on: budget is kept for jobs
            that are worth more and will fit then. 0 to grant whatever fits now.
        gpu_resource: extended resource name of a GPU.
        storage_cidrs: address ranges that trainer pods may reach beside each other and DNS.
        host_paths: folders of the nodes that blocks may name as `dataset.path`; none by default,
            since the operator would mount them with its own rights.
        progress_labels: labels of the operator's own pods, which may poll the trainers' progress.
        anchored: every entry of the ledger is copied to an anchor before it takes effect.
        pods_run_as: numeric user and group of the trainer's process.
        trainer_env: variables of the trainer's processes, such as NCCL's.
        grace_seconds: how long the trainer may take from SIGTERM to its end.
        start_timeout_seconds: how long a job's pods may wait for nodes, unless the job says; then
            its budget returns. None for ever.
        gangs: several pods are placed together or not at all, by Kubernetes' own gang scheduling
            (scheduling.k8s.io/v1alpha2); the operator turns it off where the server has none.
    """

    namespace: str
    trainer_image: str
    policy: str = "dual"
    fairness: float = 0.0
    foresight_seconds: float = 0.0
    gpu_resource: str = "nvidia.com/gpu"
    storage_cidrs: tuple[str, ...] = ()
    host_paths: tuple[str, ...] = ()
    progress_labels: tuple[tuple[str, str], ...] = (("app.kubernetes.io/name", "dpmoe"),)
    anchored: bool = False
    pods_run_as: int = 65532
    trainer_env: tuple[tuple[str, str], ...] = ()
    grace_seconds: int = 60
    start_timeout_seconds: int | None = None
    gangs: bool = False


def variables(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """`NAME=VALUE` texts as variables of the trainer's processes.

    Raises:
        ValueError: one is no variable that may be set.
    """
    pairs = []
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not OPEN_VARIABLES.fullmatch(name):
            raise ValueError(
                f"--trainer-env: {text!r}: must be NAME=VALUE with a name that begins with NCCL_,"
                " TORCH_NCCL_, GLOO_, UCX_ or FI_"
            )
        pairs.append((name, value))
    return tuple(pairs)
