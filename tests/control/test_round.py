"""A whole round over odd manifests: nobody's oddity stops or changes anybody else's job."""

from hypothesis import event, given, settings
from hypothesis import strategies as st
from tests.builders import (
    ABSENT,
    SETTINGS,
    UNITS,
    Object,
    block,
    commit,
    job,
    merged,
    snapshot,
    with_accounts,
)

from dpmoe_operator.control.actions import Prepare, SetStatus
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.launch.manifests import build_job, build_owned

NUMBERS = ["1e-99", "0.000001", "0.7", "1", "50", "999999999"]
ODD: list[Object] = [
    *({"privacy": {"epsilon": text}} for text in ("0.000000001", "0.5", "900", "9999", ABSENT)),
    *({"privacy": {"delta": text}} for text in ("1e-999", "1e-300", "1e-30", "0.00009")),
    *({"privacy": {"noiseMultiplier": text}} for text in NUMBERS),
    *({"privacy": {"epsilon": ABSENT, "noiseMultiplier": text}} for text in NUMBERS),
    *({"privacy": {"clippingNorm": text}} for text in NUMBERS),
    *({"training": {"logicalBatch": size}} for size in (1, 7, UNITS // 10 + 1, UNITS, 10**8)),
    *({"training": {"steps": steps}} for steps in (1, 10**7)),
    *({"training": {"steps": ABSENT, "epochs": epochs}} for epochs in (1, 10_000)),
    *({"training": {"optimizer": {"learningRate": text}}} for text in NUMBERS),
    *({"training": {"optimizer": {"momentum": text}}} for text in ("0.999999999999", "1", "7")),
    *({"training": {"optimizer": {"weightDecay": text}}} for text in NUMBERS),
    *({"training": {"maxTokens": count}} for count in (4, 8192)),
    *({"model": {"upcycle": {"experts": n, "layers": [0, 1023]}}} for n in (2, 256, 257)),
    *({"model": {"upcycle": {"experts": 64, "topK": k, "layers": [0]}}} for k in (1, 16, 17)),
    *({"model": {"trainable": names}} for names in ([], ["*"], ["\x00"], [""])),
    *({"model": {"claim": ABSENT, "huggingFace": {"id": "a/b", "revision": r}}} for r in ("", "v")),
    *({"output": {"claim": {"path": path}}} for path in ("x" * 512, "x" * 513)),
    *({"blocks": {"names": ABSENT, "selector": {"matchLabels": {}}, "count": n}} for n in (1, 9)),
]
ODD_BLOCKS: list[Object] = [
    *({"budget": {"orders": orders}} for orders in (["1.000000000001"], ["1.5", "1024"], ["2.0"])),
    *({"budget": {"epsilon": text}} for text in ("0.000000001", "9999.999999999")),
    {"budget": {"delta": "1e-999"}},
    {"dataset": {"units": 1}},
    {"dataset": {"units": 10**10}, "budget": {"delta": "1e-11"}},
    {"dataset": {"partition": {"column": "c" * 253, "values": ["", "v" * 253]}}},
    {"dataset": {"partition": {"column": "c" * 253, "values": ["v" * 253] * 3}}},
    {"dataset": {"partition": {"column": "ü" * 200, "values": ["ä"]}}},
    {"unit": {"kind": "user", "column": "u" * 253}},
]


PLAIN_JOB, PLAIN_BLOCK = job(uid="plain", blocks={"names": ["plain"]}), block("plain")


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from(ODD), max_size=4), st.lists(st.sampled_from(ODD_BLOCKS), max_size=2)
)
def test_every_manifest_is_answered_and_none_stops_the_round(
    of_job: list[Object], of_block: list[Object]
) -> None:
    asked, reviews = job(uid="odd"), block()
    for oddity in of_job:
        asked["spec"] = merged(asked["spec"], oddity)
    for oddity in of_block:
        reviews["spec"] = merged(reviews["spec"], oddity)
    blocks, planner = [reviews, PLAIN_BLOCK], Planner(SETTINGS)
    seen = snapshot(blocks, [asked, PLAIN_JOB], ledger=with_accounts(*blocks))
    decision = decide(seen, SETTINGS, planner)
    commit(seen.ledger, *decision.records)
    actions = react(seen, decision, SETTINGS)

    prepared = {a.launch.job.uid: a.launch for a in actions if isinstance(a, Prepare)}
    assert "plain" in prepared
    written = {a.uid: a.patch for a in actions if isinstance(a, SetStatus)}
    assert {"odd", "plain"} <= written.keys()
    if "odd" in prepared:
        event("granted")
        mechanism = decision.plans["odd"].plan.privacy
        assert 0 < mechanism.sampling_rate <= 1
        assert 1 <= mechanism.steps <= 10**7
        assert all(max(amounts) > 0 for amounts in decision.plans["odd"].demand.values())
        assert build_job(prepared["odd"])["spec"]["suspend"]
        assert len(build_owned(prepared["odd"])) == 3
    else:
        event(str(written["odd"]["reason"]))
        assert written["odd"]["message"]
