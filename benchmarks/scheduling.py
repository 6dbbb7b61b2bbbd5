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
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

if not __package__:
    # Run as a script: Python has put this folder first, where the package is not to be found.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import ROOT, Json, Quick, Seed, note, report
from benchmarks.scheduling_play import OFFLINE, PARTS, PATIENT, STATIC_DPACK, Bench, ours
from benchmarks.scheduling_report import write_markdown
from benchmarks.scheduling_trace import measure_trace
from dpmoe_operator.scheduling.policies import POLICIES
from dpmoe_operator.simulate.elastic import elastic
from dpmoe_operator.simulate.engine import play
from dpmoe_operator.simulate.generators.dpack import blocks_knob, both_knobs
from dpmoe_operator.simulate.generators.large import large
from dpmoe_operator.simulate.generators.privatekube import multi_block
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.workload import Workload

PACKAGES = ("highspy", "numba", "numpy")
MIB = 2**20

PRIVATEKUBE = "its own simulator, one seed, CPython 3.11"
PRIVATEKUBE_BASIC = {"granted": 2356, "fcfs": 1146, "seconds": 1.4}
PRIVATEKUBE_RENYI = {"granted": 53_439, "seconds": 103.0}


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
        measure_trace(bench, trace, seed, (30,) if quick else (30, 60, 90, 120, 180))
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
        played = [bench.play(make(seed), [*ours(), STATIC_DPACK], OFFLINE, seed) for seed in seeds]
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
            played.append(bench.play(elastic(make(seed), PARTS), ours(), OFFLINE, seed))
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
