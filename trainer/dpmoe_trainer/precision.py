"""In which precision a run computes.

Only the model's passes are ever in bfloat16. Norms, clipped sums and noise, of which the release is
made, are float32 at least, and so are weights and the optimiser's state.
"""

from __future__ import annotations

import torch

from dpmoe_trainer.contract import Precision
from dpmoe_trainer.errors import BadPlan


def computing(precision: Precision | None, device: torch.device) -> torch.autocast:
    """Has the model compute in a precision; None is float32.

    No cast of a weight is kept for the weight's next use. Kept, it would outlive the weight's
    update, and ranks that share the weight could not let go of it.
    """
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )


def require_precision(precision: Precision | None, device: torch.device) -> None:
    """Refuses what the device could only imitate, slower than float32.

    Raises:
        BadPlan: it has no such arithmetic; names the device.
    """
    if precision != "bfloat16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise BadPlan(
            f"training.precision: bfloat16 is only imitated by {torch.cuda.get_device_name(device)}"
            "; set it to float32, or place the job on GPUs that have it"
        )
