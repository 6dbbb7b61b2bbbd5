"""`dpmoe ledger`: verify and export the log of budget."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpmoe_operator.cli.errors import FAILURE, user_errors
from dpmoe_operator.control.projection import epsilon_text
from dpmoe_operator.ledger.entry import LedgerError
from dpmoe_operator.ledger.fold import LedgerState, fold

app = typer.Typer(help="The append-only log of privacy budget.", no_args_is_help=True)

KubeconfigOption = Annotated[
    Path | None, typer.Option(envvar="KUBECONFIG", help="kubeconfig of the cluster.")
]
NamespaceOption = Annotated[
    str, typer.Option(envvar="DPMOE_NAMESPACE", help="Namespace of the ledger.")
]


@app.command()
def verify(
    file: Annotated[
        Path | None, typer.Option(help="Verify an exported log offline, without a cluster.")
    ] = None,
    namespace: NamespaceOption = "dpmoe-system",
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Replay the whole log: chain, digests, and every rule of the budget. Exit code 1 if broken."""
    with user_errors():
        manifests = read_file(file) if file is not None else read_cluster(namespace, kubeconfig)
        try:
            state = fold(manifests)
        except LedgerError as error:
            Console(stderr=True, soft_wrap=True).print(
                f"dpmoe: the ledger does not hold: {error}", markup=False, highlight=False
            )
            raise typer.Exit(FAILURE) from error
        _print_summary(state)


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="File to write, one entry a line (JSON Lines).")],
    namespace: NamespaceOption = "dpmoe-system",
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Write the log to a file, which `dpmoe ledger verify --file` checks offline."""
    with user_errors():
        manifests = read_cluster(namespace, kubeconfig)
        lines = [
            json.dumps({"metadata": {"name": m["metadata"]["name"]}, "spec": m["spec"]})
            for m in manifests
        ]
        output.write_text("".join(f"{line}\n" for line in lines))
        typer.echo(f"{len(lines)} entries written to {output}")


def read_file(file: Path) -> list[dict[str, Any]]:
    """Entries of an exported log.

    Raises:
        ValueError: a line is not JSON; names the file and the line.
    """
    manifests = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            manifest = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error.msg}); export it again") from error
        if not isinstance(manifest, dict):
            raise ValueError(f"{file}:{number}: not a LedgerEntry; export it again")
        manifests.append(manifest)
    return manifests


def read_cluster(namespace: str, kubeconfig: Path | None) -> list[dict[str, Any]]:
    """Entries of a live cluster."""
    from dpmoe_operator.kube.client import KubeClient
    from dpmoe_operator.kube.config import load_access
    from dpmoe_operator.kube.errors import ApiError
    from dpmoe_operator.kube.store import KubeEntryStore

    async def read() -> list[dict[str, Any]]:
        async with KubeClient(load_access(kubeconfig)) as client:
            return await KubeEntryStore(client, namespace).entries()

    try:
        return asyncio.run(read())
    except ApiError as error:
        raise RuntimeError(str(error)) from error


def _print_summary(state: LedgerState) -> None:
    table = Table(box=None)
    table.add_column("account", overflow="fold")
    for name in ("epsilon", "delta", "consumed", "reserved", "jobs"):
        table.add_column(name)
    for name, account in sorted(state.accounts.items()):
        spending = account.spending
        table.add_row(
            name,
            account.opened.epsilon,
            account.opened.delta,
            epsilon_text(account, spending.consumed),
            epsilon_text(account, spending.reserved),
            str(spending.jobs),
        )
    Console().print(table)
    typer.echo(
        f"the ledger holds: {state.sequence} entries, {len(state.grants)} grants,"
        f" head {state.head[:16]}"
    )
