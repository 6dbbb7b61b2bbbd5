"""Runs pods as plain processes of this machine: a node for demos and tests, with no isolation.

The runner is an ordinary client of the API, so it serves the embedded API server and a real control
plane without nodes alike. It registers a Node, binds pods to it, and reports what a kubelet would.
What it does not do: isolate (a process sees the machine's files, network and users), enforce
resource limits or read-only mounts, probe, pull images, or run more than one container at a time.
"""
