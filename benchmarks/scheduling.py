"""Policies on published workloads: how many tasks they grant, and how long they take.

Every workload is made from a seed (see `simulate.generators`), played by our policies and by DPF
and DPack as published, in the same process. Where the peer's own program was run elsewhere, its
figure is a constant here, with where it comes from.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

if not __package__:
    # Run as a script: Python has put this folder first, where the package is not to be found.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import ROOT, Json, Quick, Recorder, Seed, note, report
from benchmarks.scheduling_report import Detail, write_markdown
from dpmoe_operator.scheduling import dpack, optimal
from dpmoe_operator.scheduling.outcome import Ranking
from dpmoe_operator.scheduling.policies import POLICIES, Policy
from dpmoe_operator.simulate.elastic import Part, elastic
from dpmoe_operator.simulate.engine import play
from dpmoe_operator.simulate.generators.dpack import blocks_knob, both_knobs
from dpmoe_operator.simulate.generators.large import large
from dpmoe_operator.simulate.generators.privatekube import multi_block
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.summary import Summary, summarise, upper_bound
from dpmoe_operator.simulate.trace import TraceOptions, Weights, read_trace
from dpmoe_operator.simulate.workload import Workload

PACKAGES = ("highspy", "numba", "numpy")
MIB = 2**20

PRIVATEKUBE = "its own simulator, one seed, CPython 3.11"
PRIVATEKUBE_BASIC = {"granted": 2356, "fcfs": 1146, "seconds": 1.4}
PRIVATEKUBE_RENYI = {"granted": 53_439, "seconds": 103.0}

FAIR_SHARES = 50
"""N of the fair share that the traces' fairness column is about."""

FORESIGHT = 30.0
"""How far ahead unlocks are counted on: as long as a block's budget takes to unlock."""

FAIRNESS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the budget that go in DPF's order, to see what efficiency that costs."""

OFFLINE = Rules()
ARTIFACT = Rules(Unlock(lifetime=30.0, steps=1000), period=10.0)
"""By which DPack's artifact plays Alibaba-DP, in days."""

_WEIGHTS: tuple[Weights, Weights] = ("count", "size")

Trace = Annotated[
    Path,
    typer.Option(help="A trace like Alibaba-DP (.csv, .csv.gz); skipped where there is none."),
]
Markdown = Annotated[
    Path | None,
    typer.Option(
        help="Write the tables to this file, too (default: docs/results, unless --quick)."
    ),
]

RESULTS = ROOT / "docs" / "results" / "scheduling.md"
SURROGATE = ROOT.parent / "shared" / "data" / "alibaba-dp-surrogate" / "tasks.csv.gz"

PARTS = (Part.parse("0.5:0.8"), Part.parse("0.25:0.6"))
"""What an elastic task would also take: half its demand for 0.8 of its worth, a quarter for 0.6."""


def _artifact_dpack(name: str, period: int | None) -> Policy:
    """DPack as its artifact does it: tied orders, task counts, anew after every `period` grants."""

    def rank(round: Any, _prices: Any) -> Ranking:
        order = dpack.order(round, published_ties=True, counting=True, period=period)
        return Ranking(order)

    return Policy(name, rank)


STATIC_DPACK = _artifact_dpack("DPack's artifact", None)
"""As the offline experiments set it."""
ONLINE_DPACK = _artifact_dpack("DPack's artifact, anew every 50 grants", 50)
"""As the online experiments set it."""


PATIENT = Policy("optimal", partial(optimal.rank, seconds=60.0))
"""The optimum, with time to prove it."""


class Bench:
    """Plays workloads and keeps what becomes of them.

    Attributes:
        out: rows with targets.
        details: all policies on all workloads.
    """

    def __init__(self) -> None:
        self.out = Recorder()
        self.details: list[Detail] = []

    def play(
        self, workload: Workload, policies: Sequence[Policy], rules: Rules, seed: int
    ) -> dict[str, Summary]:
        """Play one workload by the same rules through several policies; summaries by their name."""
        played = [play(workload, policy, rules) for policy in policies]
        bound = upper_bound(played[0])
        summaries = [summarise(one, upper_bound=bound, fair_shares=FAIR_SHARES) for one in played]
        self.details += [
            Detail(workload.name, seed, str(rules.unlock), summary) for summary in summaries
        ]
        return {summary.policy: summary for summary in summaries}

    def look_ahead(self, workload: Workload, rules: Rules, seed: int) -> float:
        """Play one workload through `dual` with foresight; the weight that it grants."""
        played = play(workload, POLICIES["dual"], replace(rules, foresight=FORESIGHT))
        summary = summarise(played, fair_shares=FAIR_SHARES)
        named = replace(summary, policy=f"dual, {FORESIGHT:g} days ahead")
        self.details.append(Detail(workload.name, seed, str(rules.unlock), named))
        return summary.weight

    def trade(self, workload: Workload, rules: Rules, seed: int) -> None:
        """Play one workload through `dual` with several shares reserved for DPF's order."""
        for share in FAIRNESS:
            played = play(workload, POLICIES["dual"], rules, fairness=share)
            summary = replace(
                summarise(played, fair_shares=FAIR_SHARES), policy=f"dual, fairness {share:g}"
            )
            self.details.append(Detail(workload.name, seed, str(rules.unlock), summary))


def main(
    quick: Quick = False,
    json_file: Json = None,
    seed: Seed = 0,
    trace: Trace = SURROGATE,
    markdown: Markdown = None,
) -> None:
    """Measure the policies."""
    load = os.getloadavg()[0]
    bench = Bench()
    note("compiling")
    play(blocks_knob(seed, 3.0, tasks=30), POLICIES["dual"], OFFLINE)
    play(multi_block(seed, seconds=20.0), POLICIES["dpf"], Rules(Unlock(fair_shares=20)))
    _privatekube_basic(bench, range(seed, seed + (2 if quick else 10)))
    _privatekube_renyi(bench, seed, 30.0 if quick else 300.0)
    _knobs(bench, range(seed, seed + (1 if quick else 3)))
    _elastic(bench, range(seed, seed + (1 if quick else 3)))
    _small(bench, range(seed, seed + (2 if quick else 5)))
    _large(bench, seed, *((5000, 100) if quick else (100_000, 1000)))
    if not trace.exists():
        note(f"trace: skipped, {trace} is not there; name one with --trace")
    else:
        _trace(bench, trace, seed, (30,) if quick else (30, 60, 90, 120, 180))
    rows = bench.out.rows
    if json_file is None and not quick:
        json_file = RESULTS.with_suffix(".json")
    report(rows, packages=PACKAGES, seed=seed, quick=quick, load=load, path=json_file)
    if markdown is None and not quick:
        markdown = RESULTS
    if markdown is not None:
        write_markdown(
            markdown, rows, bench.details, packages=PACKAGES, seed=seed, quick=quick, load=load
        )


def _privatekube_basic(bench: Bench, seeds: Sequence[int]) -> None:
    """Figure 8 of PrivateKube at N = 175."""
    out = bench.out.at("PrivateKube, many blocks, basic")
    shared = Unlock(fair_shares=175)
    workloads = [multi_block(seed) for seed in seeds]
    fcfs = [_granted(workload, "fcfs", OFFLINE) for workload in workloads]
    dpf = [_granted(workload, "dpf", Rules(shared)) for workload in workloads]
    dual = [_granted(workload, "dual", Rules(shared, period=1.0)) for workload in workloads]
    took = [_best(workload, "dpf", Rules(shared)) for workload in workloads]
    peer = PRIVATEKUBE_BASIC
    out.add(
        f"tasks granted by DPF-N, N = 175, mean of {len(seeds)} seeds",
        statistics.mean(dpf),
        "tasks",
        better="higher",
        target=2200,
        peer=peer["granted"],
        peer_name=PRIVATEKUBE,
    )
    out.add(
        "DPF over FCFS",
        statistics.mean(dpf) / statistics.mean(fcfs),
        "×",
        better="higher",
        target=2.0,
        peer=peer["granted"] / peer["fcfs"],
        peer_name=PRIVATEKUBE,
    )
    out.add(
        "tasks granted by dual, a round a second",
        statistics.mean(dual),
        "tasks",
        better="higher",
        target=statistics.mean(dpf),
        peer=statistics.mean(dpf),
        peer_name="DPF-N",
    )
    out.add(
        "simulation, DPF-N, processor time",
        statistics.median(took),
        "s",
        target=peer["seconds"] / 10,
        peer=peer["seconds"],
        peer_name=PRIVATEKUBE,
    )


def _privatekube_renyi(bench: Bench, seed: int, length: float) -> None:
    """Figure 10 of PrivateKube at N = 8875."""
    out = bench.out.at("PrivateKube, many blocks, Rényi")
    whole = length == 300.0
    workload, shared = multi_block(seed, renyi=True, seconds=length), Unlock(fair_shares=8875)
    dpf = _granted(workload, "dpf", Rules(shared))
    dual = _granted(workload, "dual", Rules(shared, period=1.0))
    took = _best(workload, "dpf", Rules(shared))
    peer = PRIVATEKUBE_RENYI if whole else {"granted": None, "seconds": None}
    out.add(
        f"tasks granted by DPF-N of {workload.tasks:,}, N = 8875",
        dpf,
        "tasks",
        better="higher",
        target=50_000 if whole else None,
        peer=peer["granted"],
        peer_name=PRIVATEKUBE,
    )
    out.add(
        "tasks granted by dual, a round a second",
        dual,
        "tasks",
        better="higher",
        target=dpf,
        peer=dpf,
        peer_name="DPF-N",
    )
    out.add(
        "simulation, DPF-N, processor time",
        took,
        "s",
        target=PRIVATEKUBE_RENYI["seconds"] / 20 if whole else None,
        peer=peer["seconds"],
        peer_name=PRIVATEKUBE,
    )


def _knobs(bench: Bench, seeds: Sequence[int]) -> None:
    """DPack's heterogeneity, offline: 1000 tasks, 20 blocks."""
    cases: tuple[tuple[str, Callable[[int], Workload], float], ...] = (
        ("DPack's blocks knob 10", lambda seed: blocks_knob(seed, 10.0), 157),
        ("both of DPack's knobs", both_knobs, 169),
    )
    for name, make, target in cases:
        out = bench.out.at(name)
        played = [bench.play(make(seed), [*_ours(), STATIC_DPACK], OFFLINE, seed) for seed in seeds]
        dual = statistics.mean(one["dual"].granted for one in played)
        bound = statistics.mean(one["dual"].upper_bound or 0.0 for one in played)
        out.add(
            f"tasks granted by dual, mean of {len(seeds)} seeds",
            dual,
            "tasks",
            better="higher",
            target=target,
            peer=statistics.mean(one[STATIC_DPACK.name].granted for one in played),
            peer_name=STATIC_DPACK.name,
        )
        out.add(
            "of what any policy could grant",
            dual / bound,
            "of the bound",
            better="higher",
        )


def _elastic(bench: Bench, seeds: Sequence[int]) -> None:
    """Jobs that would also take a part of what they ask, against the same jobs that would not."""
    cases: tuple[tuple[str, Callable[[int], Workload]], ...] = (
        ("elastic jobs, DPack's blocks knob 10", lambda seed: blocks_knob(seed, 10.0)),
        ("elastic jobs, both of DPack's knobs", both_knobs),
    )
    for name, make in cases:
        out = bench.out.at(name)
        rigid, played = [], []
        for seed in seeds:
            rigid.append(play(make(seed), POLICIES["dual"], OFFLINE))
            played.append(bench.play(elastic(make(seed), PARTS), _ours(), OFFLINE, seed))
        won = statistics.mean(one["dual"].weight for one in played)
        inelastic = statistics.mean(float(one.granted.sum()) for one in rigid)
        out.add(
            f"utility granted by dual, mean of {len(seeds)} seeds",
            won,
            "utility",
            better="higher",
            target=inelastic,
            peer=inelastic,
            peer_name="dual, the same jobs inelastic",
        )
        bound = statistics.mean(one["dual"].upper_bound or 0.0 for one in played)
        out.add("of what any policy could grant", won / bound, "of the bound", better="higher")


def _small(bench: Bench, seeds: Sequence[int]) -> None:
    """Instances of which the optimum can be proven."""
    out = bench.out.at("50 tasks, 7 blocks, both knobs")
    proven, equal, parts = 0, 0, []
    for seed in seeds:
        round = both_knobs(seed, tasks=50, blocks=7, smallest=0.05).whole
        optimal, dual = PATIENT.grant(round), POLICIES["dual"].grant(round)
        proven += optimal.weight == optimal.bound
        equal += dual.weight == optimal.weight
        parts.append(dual.weight / optimal.weight)
    out.add(
        "optimal is proven",
        proven / len(seeds),
        "of instances",
        better="higher",
        target=1.0,
    )
    out.add("dual over optimal, the worst", min(parts), "×", better="higher", target=0.97)
    out.add("dual is optimal", equal / len(seeds), "of instances", better="higher")


def _large(bench: Bench, seed: int, tasks: int, blocks: int) -> None:
    """One round of a long queue, in a process of its own so that its memory can be told."""
    out = bench.out.at(f"one round, {tasks:,} tasks, {blocks:,} blocks, 16 orders")
    measured = {name: _in_new_process(name, seed, tasks, blocks) for name in ("dpack", "dual")}
    dual, peer = measured["dual"], measured["dpack"]
    whole = tasks == 100_000
    names = {"peer_name": "DPack, its orders picked once"}
    out.add(
        "dual, processor time",
        dual["seconds"],
        "s",
        target=2.0 if whole else None,
        peer=peer["seconds"],
        **names,
    )
    out.add(
        "dual, most memory",
        dual["memory"] / MIB,
        "MiB",
        target=2048 if whole else None,
        peer=peer["memory"] / MIB,
        **names,
    )
    out.add(
        "tasks granted by dual",
        dual["granted"],
        "tasks",
        better="higher",
        target=peer["granted"],
        peer=peer["granted"],
        **names,
    )


def _trace(bench: Bench, path: Path, seed: int, horizons: Sequence[int]) -> None:
    """The grid of DPack's artifact on Alibaba-DP."""
    policies = [*_ours(), STATIC_DPACK, ONLINE_DPACK]
    for horizon in horizons:
        out = bench.out.at(f"{path.parent.name}, {horizon} days")
        by_count, by_size = (_read(path, horizon, weights, seed) for weights in _WEIGHTS)
        count = bench.play(by_count, policies, ARTIFACT, seed)
        counted_ahead = bench.look_ahead(by_count, ARTIFACT, seed)
        if horizon == horizons[0]:
            bench.trade(by_count, ARTIFACT, seed)
        size = bench.play(by_size, policies, ARTIFACT, seed)
        weighed_ahead = bench.look_ahead(by_size, ARTIFACT, seed)
        published = count[ONLINE_DPACK.name].granted
        out.add(
            "tasks granted by dual",
            count["dual"].granted,
            "tasks",
            better="higher",
            target=published,
            peer=published,
            peer_name=ONLINE_DPACK.name,
        )
        out.add(
            "tasks granted by dual, 30 days ahead",
            counted_ahead,
            "tasks",
            better="higher",
            target=published,
            peer=count["dual"].weight,
            peer_name="dual without foresight",
        )
        baseline = size[ONLINE_DPACK.name]
        out.add(
            "size-proportional weight of dual over the artifact's",
            size["dual"].weight / baseline.weight,
            "×",
            better="higher",
            target=1.14,
            peer=(baseline.upper_bound or 0.0) / baseline.weight,
            peer_name="what no policy exceeds, knowing all tasks in advance",
        )
        out.add(
            "size-proportional weight of dual, 30 days ahead, over the artifact's",
            weighed_ahead / baseline.weight,
            "×",
            better="higher",
            target=1.14,
            peer=(baseline.upper_bound or 0.0) / baseline.weight,
            peer_name="what no policy exceeds, knowing all tasks in advance",
        )
        by_points = elastic(by_count, PARTS)
        flexible = bench.play(by_points, _ours(), ARTIFACT, seed)
        out.add(
            "utility granted by dual, elastic jobs",
            flexible["dual"].weight,
            "utility",
            better="higher",
            peer=count["dual"].weight,
            peer_name="dual, the same jobs inelastic",
        )
        out.add(
            "utility granted by dual, 30 days ahead, elastic jobs",
            bench.look_ahead(by_points, ARTIFACT, seed),
            "utility",
            better="higher",
            target=counted_ahead,
            peer=counted_ahead,
            peer_name="dual, 30 days ahead, the same jobs inelastic",
        )


def _read(path: Path, horizon: int, weights: Weights, seed: int) -> Workload:
    return read_trace(path, TraceOptions(horizon=horizon, weights=weights, seed=seed))


def _ours() -> list[Policy]:
    return [POLICIES[name] for name in ("fcfs", "dpf", "area", "dpack", "dual")]


def _granted(workload: Workload, name: str, rules: Rules) -> int:
    return int(play(workload, POLICIES[name], rules).granted.sum())


def _best(workload: Workload, name: str, rules: Rules) -> float:
    """Processor seconds of the fastest of three runs; one thread, so seconds on an idle machine."""
    took = []
    for _ in range(3):
        started = time.process_time()
        play(workload, POLICIES[name], rules)
        took.append(time.process_time() - started)
    return min(took)


def _in_new_process(policy: str, seed: int, tasks: int, blocks: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_one_round, policy, seed, tasks, blocks).result()


def _one_round(policy: str, seed: int, tasks: int, blocks: int) -> dict[str, float]:
    """Grant one large round; compiled code is loaded before the clock starts."""
    POLICIES[policy].grant(large(seed, tasks=50, blocks=10).whole)
    round = large(seed, tasks=tasks, blocks=blocks).whole
    started = time.process_time()
    granted = POLICIES[policy].grant(round).granted
    return {
        "seconds": time.process_time() - started,
        "granted": float(len(np.unique(granted))),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


if __name__ == "__main__":
    typer.run(main)
