"""Workload traces → rounds → tables and plots: the scheduler without a cluster.

A simulation runs the same policies on the same `Round` arrays as the operator, with the same
integer amounts, so what it shows of a policy is what a cluster would do. It knows nothing of
Kubernetes, of the ledger or of the trainer.
"""
