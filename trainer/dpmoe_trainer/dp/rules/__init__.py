"""One rule for each torch function that may use a trained parameter.

A rule is called in place of the function, with the tape first. Experts are reached through the
seam that transformers has for them (`dp.rules.experts`), as their kernels differ by model family.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dpmoe_trainer.dp.rules import embedding, linear, norm
from dpmoe_trainer.dp.tape import Rule

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear.linear,
    F.embedding: embedding.embedding,
    F.layer_norm: norm.layer_norm,
    F.rms_norm: norm.rms_norm,
    torch.mul: norm.multiply,
    torch.Tensor.mul: norm.multiply,
}
