"""The custom resources of dpmoe.dev/v1alpha1, written once.

`PrivateBlock`, `DPMoEJob` and `LedgerEntry` are pydantic models; `crds/` is generated from them.
The operator parses every object through them, so a server without CEL enforces nothing less.
"""
