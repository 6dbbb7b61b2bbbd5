"""Differentially private gradients: per-sample clipping, noise, sampling, and their accounting."""

from dpmoe_trainer.dp.check import check_bound, check_model
from dpmoe_trainer.dp.engine import clipped_sum
from dpmoe_trainer.dp.errors import NotPerSample, UncoveredParameter

__all__ = ["NotPerSample", "UncoveredParameter", "check_bound", "check_model", "clipped_sum"]
