"""The embedded control plane: an API server and a process runner for demos and tests."""
