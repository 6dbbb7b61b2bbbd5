"""All that operator and trainer share: the plan that goes in, the report that comes out.

The operator writes a `TrainingPlan` before anything touches data, reserves its whole cost, and
mounts it read-only into the trainer pods. Rank 0 answers with a `TrainingReport` as the pod's
termination message. What holds:

- A plan pins the mechanism: noise multiplier σ, sampling rate q, number of steps, clipping norm C.
  The trainer runs that mechanism or refuses; it never derives one of them from the data.
- `TrainingPlan.digest()` names the plan in the ledger and in the report. A report that answers
  another plan proves nothing.
- Nothing here imports torch: the operator's image has none.
"""

from dpmoe_trainer.contract.base import (
    Contract,
    Digest,
    JobReference,
    Name,
    PathString,
)
from dpmoe_trainer.contract.data import (
    BlockPlan,
    DataFormat,
    DataPlan,
    PartitionPlan,
    UnitPlan,
)
from dpmoe_trainer.contract.model import (
    LoraPlan,
    ModelPlan,
    UpcyclePlan,
)
from dpmoe_trainer.contract.plan import (
    CheckpointPlan,
    EvaluationPlan,
    OutputPlan,
    ParallelPlan,
    TrainingPlan,
)
from dpmoe_trainer.contract.privacy import (
    ClippingGroup,
    ClippingPlan,
    PrivacyPlan,
)
from dpmoe_trainer.contract.process import (
    FINAL_CODES,
    OTHERS_CODES,
    PROGRESS_PORT,
    VOLUMES,
    Environment,
    ExitCode,
)
from dpmoe_trainer.contract.report import (
    TERMINATION_MESSAGE_BYTES,
    Evaluation,
    Mechanism,
    Outcome,
    Progress,
    TrainingReport,
)
from dpmoe_trainer.contract.training import (
    BalancingPlan,
    OptimizerName,
    OptimizerPlan,
    Precision,
    TrainingSettings,
)

__all__ = [
    "FINAL_CODES",
    "OTHERS_CODES",
    "PROGRESS_PORT",
    "TERMINATION_MESSAGE_BYTES",
    "VOLUMES",
    "BalancingPlan",
    "BlockPlan",
    "CheckpointPlan",
    "ClippingGroup",
    "ClippingPlan",
    "Contract",
    "DataFormat",
    "DataPlan",
    "Digest",
    "Environment",
    "Evaluation",
    "EvaluationPlan",
    "ExitCode",
    "JobReference",
    "LoraPlan",
    "Mechanism",
    "ModelPlan",
    "Name",
    "OptimizerName",
    "OptimizerPlan",
    "Outcome",
    "OutputPlan",
    "ParallelPlan",
    "PartitionPlan",
    "PathString",
    "Precision",
    "PrivacyPlan",
    "Progress",
    "TrainingPlan",
    "TrainingReport",
    "TrainingSettings",
    "UnitPlan",
    "UpcyclePlan",
]
