"""Where the API server is and how to prove who we are, by the official client's own rules.

kubeconfig files have many ways to name credentials (tokens, certificates, exec plugins, OIDC), and
the `kubernetes` package knows them all; this module takes what it found and nothing more. What
holds:

- Credentials are asked for anew while a program runs: tokens in a cluster rotate within the hour,
  and exec plugins hand out tokens that expire. `Access.authorization` is the current header, and
  `Access.reload` reads everything again.
- Nothing here prints a credential: `Access` leaves it out of its `repr`.
"""

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import yaml
from kubernetes import config as official
from kubernetes.client import Configuration

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class ConfigError(ValueError):
    """No usable configuration; the message names the file or variable and the remedy."""


@dataclass(frozen=True)
class Access:
    """How to reach one API server.

    Attributes:
        server: its URL, without a trailing slash. The embedded server's carries a token in its
            path, so show `address` to people.
        source: where this came from, for messages: a file's path, or "the pod's service account".
        namespace: what the context names as its namespace, else "default".
        ssl: how to check the server and which certificate to show; `None` for plain HTTP.
        server_hostname: the name that the server's certificate must carry, where it differs.
        proxy: an HTTP proxy's URL.
        authorization: the current Authorization header. May run an exec plugin, so call it in a
            thread.
        reload: reads the configuration again, for when the server no longer takes the credentials.
    """

    server: str = field(repr=False)
    source: str
    namespace: str
    ssl: ssl.SSLContext | None
    server_hostname: str | None
    proxy: str | None
    authorization: Callable[[], str | None] = field(repr=False)
    reload: Callable[[], "Access"] = field(repr=False)

    @property
    def address(self) -> str:
        """The server's scheme, host and port: nothing secret."""
        parts = urlsplit(self.server)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def load_access(kubeconfig: str | Path | None = None, context: str | None = None) -> Access:
    """Finds the API server.

    In this order: the file given; the files that `KUBECONFIG` names; the pod's service account, in
    a cluster; `~/.kube/config`.

    Args:
        kubeconfig: a kubeconfig file.
        context: the context to use, instead of the file's current one.

    Raises:
        ConfigError: nothing is there, or it can't be used.
    """
    in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ and not context
    if kubeconfig is None and not os.environ.get("KUBECONFIG") and in_cluster:
        return _from_service_account()
    return _from_kubeconfig(kubeconfig, context)


def _from_kubeconfig(kubeconfig: str | Path | None, context: str | None) -> Access:
    path = str(kubeconfig or os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser())
    if not any(Path(part).expanduser().is_file() for part in path.split(os.pathsep) if part):
        raise ConfigError(
            f"no kubeconfig at {path!r}: give one with --kubeconfig or the variable KUBECONFIG, "
            "or start a local control plane with `dpmoe demo`"
        )
    configuration = Configuration()
    try:
        official.load_kube_config(path, context, client_configuration=configuration)
        contexts, current = official.list_kube_config_contexts(path)
        chosen = next((c for c in contexts if c["name"] == context), current)
        namespace = chosen["context"].get("namespace") or "default"
    except (official.ConfigException, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"kubeconfig {path!r} can't be used: {error}") from error
    return _access(
        configuration,
        source=path,
        namespace=namespace,
        reload=partial(_from_kubeconfig, kubeconfig, context),
    )


def _from_service_account() -> Access:
    configuration = Configuration()
    try:
        official.load_incluster_config(configuration)
        namespace = (SERVICE_ACCOUNT / "namespace").read_text().strip() or "default"
    except (official.ConfigException, OSError) as error:
        raise ConfigError(
            f"the pod's service account can't be used: {error}; mount its token "
            "(automountServiceAccountToken) or give a kubeconfig file"
        ) from error
    return _access(
        configuration,
        source="the pod's service account",
        namespace=namespace,
        reload=_from_service_account,
    )


def _access(
    configuration: Configuration, *, source: str, namespace: str, reload: Callable[[], Access]
) -> Access:
    server = str(configuration.host).rstrip("/")
    try:
        tls = _ssl_context(configuration) if server.startswith("https:") else None
    except OSError as error:
        raise ConfigError(
            f"the certificates of {source} can't be used: {error}; check certificate-authority, "
            "client-certificate and client-key"
        ) from error
    return Access(
        server=server,
        source=source,
        namespace=namespace,
        ssl=tls,
        server_hostname=configuration.tls_server_name,
        proxy=None if _is_direct(server) else configuration.proxy,
        authorization=partial(_authorization, configuration),
        reload=reload,
    )


def _ssl_context(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    # Python 3.13 began to ask of authorities' certificates what kubectl and the clusters' own
    # tools never wrote into them.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    return context


def _is_direct(server: str) -> bool:
    """Whether no proxy may be used: this machine itself, and what NO_PROXY names."""
    host = urlsplit(server).hostname or ""
    return host in ("localhost", "127.0.0.1", "::1") or bool(proxy_bypass(host))


def _authorization(configuration: Configuration) -> str | None:
    """The header as the official client would send it; this runs its refresh hook."""
    setting = configuration.auth_settings().get("BearerToken") or {}
    value = str(setting.get("value") or "").strip()
    if value.lower().startswith("bearer "):
        return "Bearer " + value[len("bearer ") :].strip()
    return value or None
