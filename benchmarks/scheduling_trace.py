"""The scheduling benchmark on a trace: the grid of DPack's artifact on Alibaba-DP."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.scheduling_play import ARTIFACT, ONLINE_DPACK, PARTS, STATIC_DPACK, Bench, ours
from dpmoe_operator.simulate.elastic import elastic
from dpmoe_operator.simulate.trace import TraceOptions, Weights, read_trace
from dpmoe_operator.simulate.workload import Workload

_WEIGHTS: tuple[Weights, Weights] = ("count", "size")


def measure_trace(bench: Bench, path: Path, seed: int, horizons: Sequence[int]) -> None:
    """The grid of DPack's artifact on Alibaba-DP."""
    policies = [*ours(), STATIC_DPACK, ONLINE_DPACK]
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
        for peer in (STATIC_DPACK, ONLINE_DPACK):
            baseline = size[peer.name]
            for ours_name, weight in (
                ("dual", size["dual"].weight),
                ("dual, 30 days ahead,", weighed_ahead),
            ):
                out.add(
                    f"size-proportional weight of {ours_name} over {peer.name}",
                    weight / baseline.weight,
                    "×",
                    better="higher",
                    target=1.14,
                    peer=(baseline.upper_bound or 0.0) / baseline.weight,
                    peer_name="what no policy exceeds, knowing all tasks in advance",
                )
        by_points = elastic(by_count, PARTS)
        flexible = bench.play(by_points, ours(), ARTIFACT, seed)
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
