"""The engine behind Opacus' interface, for loops that are written for `opacus.PrivacyEngine`."""

from dpmoe_trainer.dp.private.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
