"""`dpmoe ledger`: verify, export, recover and anchor the log of budget."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from dpmoe_operator.cli.errors import FAILURE, user_errors
from dpmoe_operator.control.projection import epsilon_text
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.entry import Unverified, entry_name
from dpmoe_operator.ledger.log import NoAnswer
from dpmoe_operator.ledger.recovery import reanchor, recover
from dpmoe_operator.ledger.verification import Verified, verify

if TYPE_CHECKING:
    from dpmoe_operator.kube.store import KubeEntryStore

T = TypeVar("T")

app = typer.Typer(help="The append-only log of privacy budget.", no_args_is_help=True)

KubeconfigOption = Annotated[
    Path | None, typer.Option(envvar="KUBECONFIG", help="kubeconfig of the cluster.")
]
NamespaceOption = Annotated[
    str, typer.Option(envvar="DPMOE_NAMESPACE", help="Namespace of the ledger.")
]


AnchorOption = Annotated[
    Path, typer.Option(envvar="DPMOE_ANCHOR", help="Folder of the operator's anchor.")
]


@app.command("verify")
def verify_log(
    file: Annotated[
        Path | None, typer.Option(help="Verify an exported log offline, without a cluster.")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option(help="Verify an anchor's folder offline: all there ever was.")
    ] = None,
    namespace: NamespaceOption = "dpmoe-system",
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Replay the log: chain, digests, and every rule of the budget. Exit code 1 if broken."""
    with user_errors():
        if file is not None and anchor is not None:
            raise ValueError(f"--anchor: {anchor}: name either a file or an anchor, not both")
        with _unverified():
            if file is not None:
                manifests = read_file(file)
            elif anchor is not None:
                manifests = list(Anchor(anchor).entries())
            else:
                manifests = _with_store(kubeconfig, namespace, lambda store: store.entries())
            _print_summary(verify(manifests))


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="File to write, one entry a line (JSON Lines).")],
    anchor: Annotated[
        Path | None,
        typer.Option(help="Export an anchor's folder: all there ever was, also what is archived."),
    ] = None,
    namespace: NamespaceOption = "dpmoe-system",
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Write the log to a file, which `dpmoe ledger verify --file` checks offline."""
    with user_errors(), _unverified():
        manifests = (
            list(Anchor(anchor).entries())
            if anchor is not None
            else _with_store(kubeconfig, namespace, lambda store: store.entries())
        )
        lines = [
            json.dumps({"metadata": {"name": m["metadata"]["name"]}, "spec": m["spec"]})
            for m in manifests
        ]
        output.write_text("".join(f"{line}\n" for line in lines))
        typer.echo(f"{len(lines)} entries written to {output}")


@app.command("recover")
def recover_log(
    anchor: AnchorOption,
    drop: Annotated[
        str | None,
        typer.Option(
            help="Digest of an entry that is another in the anchor, to take out with all behind it."
        ),
    ] = None,
    namespace: NamespaceOption = "dpmoe-system",
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Put back the entries that the log lost, from the anchor. Run it in the operator's pod.

    The operator may run meanwhile: it grants nothing until the log is whole, and then goes on.
    """
    with user_errors(), _unverified():
        names = _with_store(
            kubeconfig, namespace, lambda store: recover(store, Anchor(anchor), namespace, drop)
        )
        if names:
            typer.echo(f"{len(names)} entries put back: {names[0]} to {names[-1]}")
        else:
            typer.echo("nothing is missing: the log holds all that the anchor holds")


@app.command("reanchor")
def reanchor_log(
    anchor: AnchorOption,
    head: Annotated[
        str, typer.Option(help="Digest of the log's last entry, as `dpmoe ledger verify` says.")
    ],
    namespace: NamespaceOption = "dpmoe-system",
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Accept the log as it is, and begin a new anchor: only for a volume that is lost.

    If the log itself was taken back, this makes spent budget available again, for ever.
    """
    with user_errors(), _unverified():
        count = _with_store(
            kubeconfig,
            namespace,
            lambda store: reanchor(store, Anchor(anchor), head, datetime.now(UTC)),
        )
        typer.echo(f"{count} entries are anchored in {anchor}")


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


@contextmanager
def _unverified() -> Iterator[None]:
    """Say that the ledger does not hold, and where; exit code 1."""
    try:
        yield
    except Unverified as error:
        Console(stderr=True, soft_wrap=True).print(
            f"dpmoe: the ledger does not hold: {error}", markup=False, highlight=False
        )
        raise typer.Exit(FAILURE) from error


def _with_store(
    kubeconfig: Path | None, namespace: str, ask: "Callable[[KubeEntryStore], Awaitable[T]]"
) -> T:
    """Ask the log of a live cluster."""
    from dpmoe_operator.kube.client import KubeClient
    from dpmoe_operator.kube.config import load_access
    from dpmoe_operator.kube.errors import ApiError
    from dpmoe_operator.kube.store import KubeEntryStore

    async def asked() -> T:
        async with KubeClient(load_access(kubeconfig)) as client:
            return await ask(KubeEntryStore(client, namespace))

    try:
        return asyncio.run(asked())
    except (ApiError, NoAnswer) as error:
        raise RuntimeError(str(error)) from error


def _print_summary(verified: Verified) -> None:
    state = verified.state
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
        f"the ledger holds: {state.sequence - verified.first} entries,"
        f" {len(state.grants) + len(state.closed)} grants, head {state.head[:16]}"
    )
    if verified.trusted is not None:
        typer.echo(
            f"entries before {entry_name(verified.first)} are in the archive: `dpmoe ledger verify"
            f" --anchor FOLDER` checks them; the rules were checked from"
            f" {entry_name(verified.trusted)} on"
        )
