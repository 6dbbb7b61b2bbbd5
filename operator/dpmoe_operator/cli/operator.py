"""`dpmoe operator`: the operator process, as the chart's Deployment runs it."""

from pathlib import Path
from typing import Annotated

import typer

from dpmoe_operator.cli.errors import user_errors
from dpmoe_operator.control.settings import Settings, variables
from dpmoe_operator.scheduling.policies import POLICIES


def operator(
    namespace: Annotated[
        str,
        typer.Option(envvar="DPMOE_NAMESPACE", help="Namespace of the ledger and the lease."),
    ] = "dpmoe-system",
    trainer_image: Annotated[
        str,
        typer.Option(
            envvar="DPMOE_TRAINER_IMAGE",
            help="The operator's own trainer image, best by digest; only its reports refund.",
        ),
    ] = "ghcr.io/dpmoe/trainer:0.1.0",
    policy: Annotated[
        str,
        typer.Option(envvar="DPMOE_POLICY", help=f"Scheduling policy: {', '.join(POLICIES)}."),
    ] = "dual",
    fairness: Annotated[
        float,
        typer.Option(
            envvar="DPMOE_FAIRNESS",
            min=0,
            max=1,
            help="Share of the available budget that goes in the order of dpf first.",
        ),
    ] = 0.0,
    foresight_seconds: Annotated[
        float,
        typer.Option(
            envvar="DPMOE_FORESIGHT_SECONDS",
            min=0,
            max=315_360_000,
            help="How far ahead unlocks by time are counted on, to keep budget for them.",
        ),
    ] = 0.0,
    round_seconds: Annotated[
        float,
        typer.Option(
            envvar="DPMOE_ROUND_SECONDS", min=0.1, max=3600, help="Longest time between rounds."
        ),
    ] = 5.0,
    anchor: Annotated[
        Path | None,
        typer.Option(
            envvar="DPMOE_ANCHOR",
            help="Folder on a volume of its own to which every entry of the ledger is copied.",
        ),
    ] = None,
    no_anchor: Annotated[
        bool,
        typer.Option(
            "--no-anchor",
            envvar="DPMOE_NO_ANCHOR",
            help="Run without an anchor: a ledger that is restored from a backup goes unnoticed.",
        ),
    ] = False,
    lease_seconds: Annotated[
        int,
        typer.Option(
            envvar="DPMOE_LEASE_SECONDS",
            min=1,
            max=3600,
            help="How long an operator may be silent until another takes over.",
        ),
    ] = 8,
    pod_uid: Annotated[
        str | None,
        typer.Option(
            envvar="DPMOE_POD_UID",
            help="metadata.uid of the operator's own pod: its next container takes over at once.",
        ),
    ] = None,
    gpu_resource: Annotated[
        str, typer.Option(envvar="DPMOE_GPU_RESOURCE", help="Extended resource name of a GPU.")
    ] = "nvidia.com/gpu",
    storage_cidr: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DPMOE_STORAGE_CIDR",
            help="Address range of storage that trainer pods may reach; may be repeated.",
        ),
    ] = None,
    host_path: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DPMOE_HOST_PATH",
            help="Folder of the nodes that blocks may name as dataset.path; may be repeated.",
        ),
    ] = None,
    trainer_env: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DPMOE_TRAINER_ENV",
            help="NAME=VALUE of NCCL's or Gloo's for the trainer's processes; may be repeated.",
        ),
    ] = None,
    grace_seconds: Annotated[
        int,
        typer.Option(
            envvar="DPMOE_GRACE_SECONDS",
            min=1,
            max=86_400,
            help="How long a trainer may take to save itself after SIGTERM.",
        ),
    ] = 60,
    start_timeout_seconds: Annotated[
        int,
        typer.Option(
            envvar="DPMOE_START_TIMEOUT_SECONDS",
            min=0,
            max=315_360_000,
            help="How long pods may wait for nodes, then their budget returns; 0 for ever.",
        ),
    ] = 0,
    gangs: Annotated[
        bool,
        typer.Option(
            envvar="DPMOE_GANGS",
            help="Use Kubernetes' own gang scheduling where the server has it.",
        ),
    ] = True,
    liveness: Annotated[
        str | None,
        typer.Option(
            envvar="DPMOE_LIVENESS", help="Liveness endpoint, e.g. http://0.0.0.0:8080/healthz."
        ),
    ] = None,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(envvar="KUBECONFIG", help="kubeconfig; in a pod its service account serves."),
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Log every request of the watches.")] = False,
) -> None:
    """Run the operator: it grants privacy budget and launches the jobs that got some."""
    import os

    if kubeconfig is not None:
        os.environ["KUBECONFIG"] = str(kubeconfig)
    with user_errors():
        from dpmoe_operator.kube.config import load_access
        from dpmoe_operator.kube.logs import configure_logging
        from dpmoe_operator.kube.operator import OperatorOptions, run_operator

        configure_logging(verbose=verbose)
        if (anchor is None) != no_anchor:
            raise ValueError(
                f"--anchor: {anchor}: name a folder for the copy of the ledger, or say --no-anchor"
            )
        settings = Settings(
            namespace=namespace,
            trainer_image=trainer_image,
            policy=policy,
            fairness=fairness,
            foresight_seconds=foresight_seconds,
            gpu_resource=gpu_resource,
            storage_cidrs=tuple(storage_cidr or ()),
            host_paths=tuple(host_path or ()),
            trainer_env=variables(trainer_env or ()),
            grace_seconds=grace_seconds,
            start_timeout_seconds=start_timeout_seconds or None,
            gangs=gangs,
            anchored=anchor is not None,
        )
        access = load_access(kubeconfig)
        run_operator(
            OperatorOptions(
                settings,
                access,
                round_seconds,
                liveness,
                anchor=anchor,
                lease_seconds=lease_seconds,
                pod_uid=pod_uid,
            )
        )
