"""Workloads that papers published, rebuilt from their rules, each from a seed."""
