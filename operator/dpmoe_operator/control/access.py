"""What a job may use: blocks that exist, and what their owners opened to its namespace.

The owner's word is `spec.access` of each block, the platform team's is the operator's settings.
Whatever neither opened is refused, with the field, the value and who can mend it.
"""

import hashlib
import posixpath
from collections.abc import Collection, Mapping, Sequence

from dpmoe_operator.api.base import SpecError
from dpmoe_operator.api.dpmoejob import MAX_BLOCKS, DPMoEJobSpec
from dpmoe_operator.api.identity import within
from dpmoe_operator.api.privateblock import Access, PrivateBlockSpec
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.accounts import Standing
from dpmoe_operator.control.rows import age
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.views import JobView
from dpmoe_operator.launch import paths


class Refusal(Exception):
    """The job cannot be planned as things stand."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(message)


def choose_blocks(
    spec: DPMoEJobSpec,
    uid: str,
    standings: Mapping[tuple[str, str], Standing],
    granted: Collection[str] = (),
) -> list[Standing]:
    """The blocks that the job names, or `count` of those that its selector matches.

    Args:
        spec: of the job, at one of its points.
        uid: of the job.
        standings: of all blocks.
        granted: the accounts of the job's grant, if it has one. The selector has chosen then, and
            blocks that were retired since are still the job's.

    Raises:
        Refusal: a block is missing, retired, or refused itself.
        SpecError: the selector matches more blocks than a job may have.
    """
    wanted = spec.blocks
    if wanted.names is not None:
        missing = [name for name in wanted.names if (wanted.namespace, name) not in standings]
        if missing:
            raise Refusal(
                Reason.BLOCK_NOT_FOUND,
                f"spec.blocks.names: {missing[0]!r}: no such PrivateBlock in namespace"
                f" {wanted.namespace}; see 'kubectl get privateblocks -n {wanted.namespace}'",
            )
        chosen = [standings[wanted.namespace, name] for name in wanted.names]
    elif granted:
        by_account = {s.account_name: s for s in standings.values() if s.refusal is None}
        gone = [name for name in granted if name not in by_account]
        if gone:
            raise Refusal(
                Reason.BLOCK_NOT_FOUND,
                f"spec.blocks.selector: the block of {gone[0]!r}, on which the job was granted, is"
                " gone or refused; apply the job again",
            )
        chosen = [by_account[name] for name in granted]
    else:
        assert wanted.selector is not None
        labels = wanted.selector.match_labels.items()
        matching = [
            standing
            for (namespace, _), standing in sorted(standings.items())
            if namespace == wanted.namespace
            and standing.refusal is None
            and standing.retired is None
            and labels <= standing.block.meta.labels.items()
        ]
        count = wanted.count if wanted.count is not None else max(1, len(matching))
        if len(matching) < count:
            raise Refusal(
                Reason.BLOCK_NOT_FOUND,
                f"spec.blocks.count: {count}: only {len(matching)} PrivateBlocks in namespace"
                f" {wanted.namespace} match {dict(labels)}; ask for fewer or wait for more",
            )
        if count > MAX_BLOCKS:
            raise SpecError(
                "spec.blocks.count",
                "absent",
                f"{count} PrivateBlocks match {dict(labels)}; must be set, to at most {MAX_BLOCKS}",
            )
        chosen = _picked(matching, wanted.pick, uid)[:count]
    for standing in chosen:
        if standing.retired is not None and not granted:
            raise Refusal(
                Reason.BLOCK_RETIRED,
                f"spec.blocks: {standing.block.meta.name!r}: takes no job any more"
                f" ({standing.retired}); ask for other blocks",
            )
        if standing.refusal is not None:
            raise Refusal(
                Reason.BLOCK_NOT_FOUND,
                f"spec.blocks: {standing.block.meta.name!r}: the block is refused"
                f" ({standing.refusal[0]}); its owner must mend it first",
            )
    return chosen


def _picked(matching: Sequence[Standing], pick: str, uid: str) -> list[Standing]:
    """Matching blocks, those that the job prefers first.

    `any` gives each job an order of its own, which stays when blocks come and go (rendezvous
    hashing; Thaler and Ravishankar 1996), so that jobs spread evenly and none changes its mind.
    """
    match pick:
        case "latest":
            return sorted(matching, key=lambda standing: age(standing.block), reverse=True)
        case "any":
            return sorted(
                matching,
                key=lambda s: hashlib.sha256(f"{uid} {s.block.meta.uid}".encode()).digest(),
            )
        case _:
            return list(matching)


def check_access(job: JobView, chosen: Sequence[Standing], settings: Settings) -> list[Access]:
    """What each block's owner opened for the job's namespace.

    Raises:
        Refusal: the job wants a block, image, model or output that was not opened to it.
        SpecError: the model's path is in a place that is nobody's to open.
    """
    assert job.spec is not None
    grants = []
    for standing in chosen:
        name = standing.block.meta.name
        access = standing.spec.access_of(job.meta.namespace)
        if access is None:
            raise Refusal(
                Reason.BLOCK_NOT_SHARED,
                f"spec.blocks: {name!r}: gives namespace {job.meta.namespace} no access; its owner"
                " must add the namespace to the block's spec.access",
            )
        _check_host_paths(name, standing.spec, settings)
        _check_image(job.spec, name, access, settings)
        _check_model(job.spec, name, standing.spec, access)
        _check_output(job.spec, name, access)
        grants.append(access)
    return grants


def _check_host_paths(block: str, spec: PrivateBlockSpec, settings: Settings) -> None:
    """Refuse folders of the nodes that the platform team did not open for data."""
    for path in _host_paths(spec):
        if not any(within(posixpath.normpath(path), folder) for folder in settings.host_paths):
            raise Refusal(
                Reason.BLOCK_NOT_SHARED,
                f"spec.dataset.path: {path!r}: block {block} names a folder of the nodes, and the"
                f" operator opens {list(settings.host_paths)}; put the data on a claim, or ask the"
                " platform team to add the folder to trainer.hostPaths of the Helm release",
            )


def _host_paths(spec: PrivateBlockSpec) -> list[str]:
    """The folders of the nodes that a block names, which are mounted at their own paths."""
    tables = [spec.dataset, *([spec.evaluation] if spec.evaluation else [])]
    return [table.path for table in tables if table.path is not None]


def _meets_table(path: str, spec: PrivateBlockSpec) -> bool:
    """Whether a path of the container is a mounted table of a block, or in one, or around one."""
    tables = [posixpath.normpath(table) for table in _host_paths(spec)]
    return any(within(path, table) or within(table, path) for table in tables)


def _check_image(spec: DPMoEJobSpec, block: str, access: Access, settings: Settings) -> None:
    if spec.image not in (None, settings.trainer_image, *access.images):
        raise Refusal(
            Reason.BLOCK_NOT_SHARED,
            f"spec.image: {spec.image!r}: is not trusted by block {block}; leave it out to use"
            " the operator's trainer, or ask the owner to add it to spec.access.images",
        )


def _check_model(spec: DPMoEJobSpec, block: str, opened: PrivateBlockSpec, access: Access) -> None:
    path, claim = spec.model.path, spec.model.claim
    if path is not None and (not within(path, paths.IMAGE_MODELS) or _meets_table(path, opened)):
        raise SpecError(
            "spec.model.path",
            path,
            f"must be a folder of the trainer image below {paths.IMAGE_MODELS}, with no table of"
            " its blocks mounted there; name a model on a volume by spec.model.claim",
        )
    if claim is not None and claim.claim_name not in access.models:
        raise Refusal(
            Reason.BLOCK_NOT_SHARED,
            f"spec.model.claim.claimName: {claim.claim_name!r}: block {block} opens"
            f" {list(access.models)} for models; use one of them, or ask the owner to add it to"
            " spec.access.models",
        )


def _check_output(spec: DPMoEJobSpec, block: str, access: Access) -> None:
    claim, uri = spec.output.claim, spec.output.uri
    if claim is not None:
        field, value = "spec.output.claim.claimName", claim.claim_name
        opened = [o.claim_name for o in access.outputs if o.claim_name is not None]
        allowed = value in opened
    else:
        assert uri is not None
        field, value = "spec.output.uri", uri
        opened = [o.uri_prefix for o in access.outputs if o.uri_prefix is not None]
        allowed = any(value.startswith(prefix) for prefix in opened)
    if not allowed:
        raise Refusal(
            Reason.BLOCK_NOT_SHARED,
            f"{field}: {value!r}: block {block} opens {opened} for results; use one of them, or"
            " ask the owner to add it to spec.access.outputs",
        )


def checkpoint_claim(
    spec: DPMoEJobSpec, chosen: Sequence[Standing], opened: Sequence[Access]
) -> str | None:
    """The claim for a job's checkpoints: the one that all of its blocks open; None without.

    Args:
        spec: of the job.
        chosen: its blocks.
        opened: what the owner of each opened to its namespace.

    Raises:
        Refusal: the job asks for what needs checkpoints, and its blocks do not agree on a claim.
    """
    claims = [access.checkpoints.claim_name if access.checkpoints else None for access in opened]
    if None not in claims and len(set(claims)) == 1:
        return claims[0]
    asked = {
        "spec.checkpoint": spec.checkpoint is not None,
        "spec.retries": bool(spec.retries),
        "spec.placement.queueName": spec.placement.queue_name is not None,
    }
    for field, needs in asked.items():
        if needs:
            other = next(i for i, claim in enumerate(claims) if claim is None or claim != claims[0])
            name = chosen[other].block.meta.name
            raise Refusal(
                Reason.BLOCK_NOT_SHARED,
                f"{field}: needs a claim for checkpoints that all blocks open: block {name} opens"
                f" {claims[other] or 'none'}{_beside(claims, other)}; leave {field} out, or ask the"
                " owner to set spec.access.checkpoints",
            )
    return None


def _beside(claims: Sequence[str | None], other: int) -> str:
    return "" if other == 0 or claims[0] is None else f", the first block {claims[0]}"
