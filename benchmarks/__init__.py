"""Benchmarks: what is claimed about speed and size, measured. See README.md."""
