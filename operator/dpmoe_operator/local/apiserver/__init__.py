"""The embedded Kubernetes API server: in memory, over HTTP on loopback, for demos and tests.

It speaks enough of the Kubernetes API for an unmodified kopf operator, stock kubectl and the
official Python client. It imitates: nothing that it shows proves how Kubernetes behaves, so the
tests of its contract run against a real kube-apiserver too.
"""

from .server import EmbeddedApiServer

__all__ = ["EmbeddedApiServer"]
