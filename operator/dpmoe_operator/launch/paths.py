"""Where a trainer container finds things. One place, so that plan and volumes cannot disagree.

Claims are mounted whole, data and models read-only. Results go below a folder named after the job's
namespace, so that two teams that share a claim cannot overwrite each other.
"""

import posixpath

from dpmoe_operator.api.dpmoejob import Model, OutputClaim
from dpmoe_operator.api.privateblock import Table
from dpmoe_trainer.contract import VOLUMES as ROOT

IMAGE_MODELS = "/models"
"""Where a trainer image keeps models of its own: the only folder of it that jobs may name."""
READ_ONLY_CLAIMS = f"{ROOT}/claims"
OUTPUT_CLAIMS = f"{ROOT}/outputs"
CHECKPOINT_CLAIMS = f"{ROOT}/checkpoints"
PLAN_FOLDER = f"{ROOT}/plan"
PLAN_FILE = "plan.json"
TERMINATION_LOG = "/dev/termination-log"


def table(table: Table) -> str | None:
    """The path of a table's file or folder; None where it comes from a hub."""
    if table.claim is not None:
        return posixpath.join(READ_ONLY_CLAIMS, table.claim.claim_name, table.claim.path)
    return table.path


def model(model: Model) -> str | None:
    """The path of the pretrained model; None where it comes from a hub."""
    if model.claim is not None:
        return posixpath.join(READ_ONLY_CLAIMS, model.claim.claim_name, model.claim.path)
    return model.path


def output(job_namespace: str, claim: OutputClaim) -> str:
    """The folder that the trained model is written to."""
    return posixpath.join(OUTPUT_CLAIMS, claim.claim_name, job_namespace, claim.path)


def checkpoints(job_namespace: str, job_uid: str, claim_name: str) -> str:
    """The folder of a run's checkpoints and journal: a new job by the same name finds none."""
    return posixpath.join(CHECKPOINT_CLAIMS, claim_name, job_namespace, job_uid)
