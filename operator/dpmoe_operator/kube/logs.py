"""What the operator process logs: its decisions; of kopf only what goes wrong."""

import logging

FORMAT = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"


def configure_logging(*, verbose: bool) -> None:
    """Log to stderr. Neither manifests' contents nor credentials are ever logged."""
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    if not verbose:
        for name in ("kopf", "aiohttp.access", "kubernetes"):
            logging.getLogger(name).setLevel(logging.WARNING)
