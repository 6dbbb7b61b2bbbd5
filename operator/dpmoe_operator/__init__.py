"""dpmoe: privacy budget as a schedulable, non-replenishable resource on Kubernetes."""
