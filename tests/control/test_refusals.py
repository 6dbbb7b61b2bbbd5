"""Every reason why a job gets no plan, with its remedy."""

import re
from typing import Any

import pytest
from tests.builders import ABSENT, OTHER_TEAM, TEAM, UNITS, Object, block, job
from tests.control.plans import plan, refusal

from dpmoe_operator.api.ledgerentry import Record
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.ledger.entry import MAX_RECORD_BYTES, size_of

ADAMBC = {"name": "adambc", "learningRate": "0.001"}
ACCOUNT = "claim://vault/data/reviews.jsonl"


NOT_OPENED: list[Any] = [
    {"namespace": TEAM, "outputs": [{"claimName": "results"}]},
    {"namespace": TEAM, "models": ["others"], "outputs": [{"claimName": "results"}]},
]
TWO = {"names": ["reviews", "more"]}

REFUSED: dict[str, tuple[Object, list[Object], Reason, str]] = {
    "retired block": (
        job(),
        [block(retired=True)],
        Reason.BLOCK_RETIRED,
        "spec.blocks: 'reviews': takes no job any more (spec.retired is true;",
    ),
    "one of two blocks retired": (
        job(blocks=TWO),
        [block(), block("more", retired=True)],
        Reason.BLOCK_RETIRED,
        "spec.blocks: 'more': takes no job any more",
    ),
    "unreadable job": (
        job(privacy={"epsilon": "-1"}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.privacy.epsilon: '-1'",
    ),
    "no such block": (
        job(blocks={"names": ["reviews", "nothing"]}),
        [block()],
        Reason.BLOCK_NOT_FOUND,
        "spec.blocks.names: 'nothing': no such PrivateBlock in namespace vault; see 'kubectl get",
    ),
    "block of another namespace": (
        job(),
        [block(namespace="elsewhere")],
        Reason.BLOCK_NOT_FOUND,
        "'reviews': no such PrivateBlock in namespace vault",
    ),
    "refused block": (
        job(),
        [block(budget={"epsilon": "-1"})],
        Reason.BLOCK_NOT_FOUND,
        "'reviews': the block is refused (InvalidSpec); its owner must mend it first",
    ),
    "no access": (
        job(namespace="strangers"),
        [block()],
        Reason.BLOCK_NOT_SHARED,
        "'reviews': gives namespace strangers no access; its owner must add the namespace to the"
        " block's spec.access",
    ),
    "no access to one of two": (
        job(blocks=TWO),
        [block(), block("more", access=[])],
        Reason.BLOCK_NOT_SHARED,
        "'more': gives namespace team-a no access",
    ),
    "untrusted image": (
        job(image="evil/image:1"),
        [block()],
        Reason.BLOCK_NOT_SHARED,
        "spec.image: 'evil/image:1': is not trusted by block reviews; leave it out",
    ),
    "model claim that is not opened": (
        job(),
        [block(access=NOT_OPENED[:1])],
        Reason.BLOCK_NOT_SHARED,
        "spec.model.claim.claimName: 'models': block reviews opens [] for models",
    ),
    "another model claim is opened": (
        job(),
        [block(access=NOT_OPENED[1:])],
        Reason.BLOCK_NOT_SHARED,
        "block reviews opens ['others'] for models; use one of them, or ask the owner",
    ),
    "the private data as a model": (
        job(model={"claim": {"claimName": "data"}}),
        [block()],
        Reason.BLOCK_NOT_SHARED,
        "spec.model.claim.claimName: 'data'",
    ),
    "another team's result as a model": (
        job(model={"claim": ABSENT, "path": f"/dpmoe/outputs/results/{OTHER_TEAM}/run"}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.model.path: '/dpmoe/outputs/results/team-b/run': must be a folder of the trainer",
    ),
    "another team's result by a detour": (
        job(model={"claim": ABSENT, "path": "/proc/self/root/dpmoe/outputs/results/team-b/run"}),
        [block()],
        Reason.INVALID_SPEC,
        "must be a folder of the trainer image below /models, with no table of its blocks",
    ),
    "output claim that is not opened": (
        job(output={"claim": {"claimName": "data"}}),
        [block()],
        Reason.BLOCK_NOT_SHARED,
        "spec.output.claim.claimName: 'data': block reviews opens ['results'] for results",
    ),
    "URI that is not opened": (
        job(output={"claim": ABSENT, "uri": "s3://mine/run"}),
        [block()],
        Reason.BLOCK_NOT_SHARED,
        "spec.output.uri: 's3://mine/run': block reviews opens [] for results",
    ),
    "URI beside an opened prefix": (
        job(output={"claim": ABSENT, "uri": "s3://bucket/team-a2/run"}),
        [
            block(
                access=[
                    {
                        "namespace": TEAM,
                        "models": ["models"],
                        "outputs": [{"uriPrefix": "s3://bucket/team-a/"}],
                    }
                ]
            )
        ],
        Reason.BLOCK_NOT_SHARED,
        "block reviews opens ['s3://bucket/team-a/'] for results",
    ),
    "other labels": (
        job(blocks=TWO),
        [block(), block("more", dataset={"labels": 3})],
        Reason.INVALID_SPEC,
        "spec.blocks: 'more': has 3 labels, not 2",
    ),
    "other units": (
        job(blocks=TWO),
        [block(), block("more", unit={"kind": "user", "column": "author"})],
        Reason.INVALID_SPEC,
        "spec.blocks: 'more': protects users, not examples",
    ),
    "delta of one in N": (
        job(privacy={"delta": "0.0001"}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.privacy.delta: '0.0001': must be below 1/N = 1/10000, the units of block reviews",
    ),
    "delta against the largest block": (
        job(privacy={"delta": "0.00001"}, blocks=TWO),
        [block(), block("more", dataset={"units": 100_000})],
        Reason.INVALID_SPEC,
        "must be below 1/N = 1/100000, the units of block more",
    ),
    "batch above the units": (
        job(training={"logicalBatch": UNITS + 1}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.training.logicalBatch: 10001: must be at most 10000",
    ),
    "too many steps": (
        job(training={"steps": ABSENT, "epochs": 10_000, "logicalBatch": 1}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.training.epochs: 10000: makes 100000000 steps, must make at most 10000000",
    ),
    "epsilon without meaning": (
        job(privacy={"epsilon": "1000.1"}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.privacy.epsilon: '1000.1': must be at most 1000",
    ),
    "noise without meaning": (
        job(privacy={"epsilon": ABSENT, "noiseMultiplier": "0.05"}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.privacy.noiseMultiplier: '0.05': costs epsilon",
    ),
    "epsilon that no noise gives": (
        job(privacy={"epsilon": "0.000000001"}, training={"logicalBatch": UNITS}),
        [block()],
        Reason.INVALID_SPEC,
        "spec.privacy: epsilon: 1e-09: needs a noise multiplier above 1000",
    ),
    "delta that is zero to a computer": (
        job(privacy={"delta": "1e-999"}),
        [block()],
        Reason.INVALID_SPEC,
        "delta: 0.0: must lie strictly between 0 and 1",
    ),
}


@pytest.mark.parametrize(
    ("asked", "blocks", "reason", "words"), REFUSED.values(), ids=REFUSED.keys()
)
def test_refuses(asked: Object, blocks: list[Object], reason: Reason, words: str) -> None:
    found, message = refusal(asked, *blocks)
    assert found is reason
    assert words in message


def test_every_block_must_open_model_and_output() -> None:
    half = [{"namespace": TEAM, "models": ["models"]}]
    reason, message = refusal(job(blocks=TWO), block(), block("more", access=half))
    assert reason is Reason.BLOCK_NOT_SHARED
    assert "block more opens [] for results" in message


def wide_blocks(count: int) -> list[Object]:
    """Blocks with the longest names of accounts and the most orders that are allowed."""
    orders = [f"{2 + n / 100:.12f}" for n in range(64)]
    partition = {"column": "c" * 200, "values": ["v" * 250, "w" * 250]}
    return [
        block(
            f"b{number}",
            dataset={
                "claim": {"claimName": "data", "path": "p" * 230 + f"-{number}"},
                "partition": partition,
            },
            budget={"orders": orders},
        )
        for number in range(count)
    ]


def test_grant_that_would_not_fit_into_one_record_is_refused_with_its_remedy() -> None:
    blocks = wide_blocks(256)
    named = [each["metadata"]["name"] for each in blocks]
    dear: Object = {"privacy": {"epsilon": "100"}}
    reason, message = refusal(job(blocks={"names": named}, **dear), *blocks)
    assert reason is Reason.INVALID_SPEC
    found = re.match(
        r"spec\.blocks: 256 blocks: make a ledger record of (\d+) bytes, must make at most 400000;"
        r" ask for at most about (\d+) such blocks, or",
        message,
    )
    assert found is not None, message
    fewer = int(found[2])
    planned = plan(job(blocks={"names": named[:fewer]}, **dear), *blocks)
    size = size_of(Record(granted=planned.reservation))
    assert 0.95 * MAX_RECORD_BYTES < size <= MAX_RECORD_BYTES
    assert int(found[1]) > MAX_RECORD_BYTES
