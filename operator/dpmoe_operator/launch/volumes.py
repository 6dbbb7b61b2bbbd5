"""The volumes of a trainer pod: the claims that the blocks' owner opened, and no others."""

from dpmoe_operator.launch import paths
from dpmoe_operator.launch.launching import Json, Launch, workload_name


def _read_only_claims(launch: Launch) -> list[str]:
    claims = {table.claim.claim_name for table in launch.tables if table.claim is not None}
    if launch.spec.model.claim is not None:
        claims.add(launch.spec.model.claim.claim_name)
    return sorted(claims)


def _host_paths(launch: Launch) -> list[str]:
    return sorted({table.path for table in launch.tables if table.path is not None})


def volumes(launch: Launch) -> list[Json]:
    """The pod's volumes: read-only but for scratch, results and checkpoints."""
    output = launch.spec.output.claim
    return [
        {"name": "plan", "configMap": {"name": workload_name(launch.job)}},
        {"name": "scratch", "emptyDir": {}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": launch.spec.resources.shared_memory},
        },
        *(
            {
                "name": f"claim-{i}",
                "persistentVolumeClaim": {"claimName": claim, "readOnly": True},
            }
            for i, claim in enumerate(_read_only_claims(launch))
        ),
        *(
            {"name": f"host-{i}", "hostPath": {"path": path}}
            for i, path in enumerate(_host_paths(launch))
        ),
        *(
            [{"name": "output", "persistentVolumeClaim": {"claimName": output.claim_name}}]
            if output is not None
            else []
        ),
        *(
            [{"name": "checkpoints", "persistentVolumeClaim": {"claimName": launch.checkpoints}}]
            if launch.checkpoints is not None
            else []
        ),
    ]


def mounts(launch: Launch) -> list[Json]:
    """Where the container finds them."""
    output = launch.spec.output.claim
    return [
        {"name": "plan", "mountPath": paths.PLAN_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *(
            {
                "name": f"claim-{i}",
                "mountPath": f"{paths.READ_ONLY_CLAIMS}/{claim}",
                "readOnly": True,
            }
            for i, claim in enumerate(_read_only_claims(launch))
        ),
        *(
            {"name": f"host-{i}", "mountPath": path, "readOnly": True}
            for i, path in enumerate(_host_paths(launch))
        ),
        *(
            [{"name": "output", "mountPath": f"{paths.OUTPUT_CLAIMS}/{output.claim_name}"}]
            if output is not None
            else []
        ),
        *(
            [
                {
                    "name": "checkpoints",
                    "mountPath": f"{paths.CHECKPOINT_CLAIMS}/{launch.checkpoints}",
                }
            ]
            if launch.checkpoints is not None
            else []
        ),
    ]
