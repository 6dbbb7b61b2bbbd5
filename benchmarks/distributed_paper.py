"""Scaling to many GPUs, on paper: what a step computes, holds and sends, per rank.

Nothing here was run. It is arithmetic on published model shapes, with rates that are named, so that
a reader can put in others. Amounts of the exchange are those that the benchmark measures.

Shapes: B samples of T tokens a rank and physical batch, D hidden, F inner, E experts, K of a token,
L layers, W ranks, P of them share the experts.
"""

from dataclasses import dataclass

FLOPS = 400e12
"""bfloat16 products of an H100, two fifths of its peak."""
INSIDE, BETWEEN = 350e9, 40e9
"""Bytes a second of a rank inside a node of 8 (NVLink) and between nodes (InfiniBand)."""
NODE = 8
WEIGHT, ACTIVATION, STATE = 4, 2, 8
"""Bytes: of a weight (float32), of an activation (bfloat16), of an AdamW state."""


@dataclass(frozen=True)
class Moe:
    """A published model's shape."""

    name: str
    layers: int
    hidden: int
    inner: int
    experts: int
    choices: int
    dense: float
    """Parameters that are no expert's."""

    @property
    def expert_parameters(self) -> float:
        """Of all experts."""
        return 3.0 * self.layers * self.experts * self.hidden * self.inner


MIXTRAL = Moe("Mixtral-8x7B", 32, 4096, 14336, 8, 2, 1.6e9)
OLMOE = Moe("OLMoE-1B-7B", 16, 2048, 1024, 64, 8, 0.47e9)


@dataclass(frozen=True)
class Estimate:
    """One rank's part of a logical batch's step."""

    model: Moe
    ranks: int
    shared_by: int
    samples: int
    tokens: int

    @property
    def rows(self) -> int:
        """Routed rows of a layer."""
        return self.samples * self.tokens * self.model.choices

    @property
    def weights_bytes(self) -> float:
        """Weights and optimiser states, what is no expert sharded over all ranks."""
        held = self.model.expert_parameters / self.shared_by + self.model.dense / self.ranks
        return held * (WEIGHT + STATE)

    @property
    def kept_bytes(self) -> float:
        """Inputs and output gradients of linear layers, kept until the norms are known."""
        model = self.model
        a_token = 8 * model.hidden + model.choices * (2 * model.hidden + 5 * model.inner)
        return float(model.layers * self.samples * self.tokens * a_token * ACTIVATION)

    @property
    def compute_seconds(self) -> float:
        """Forward, activation gradients and weight gradients, and 5 % for norms."""
        model = self.model
        active = model.dense + model.expert_parameters * model.choices / model.experts
        return 1.05 * 6 * active * self.samples * self.tokens / FLOPS

    @property
    def token_bytes(self) -> float:
        """Tokens that leave the rank: there and back, forward and backward."""
        away = 1 - 1 / self.shared_by
        return 4.0 * self.model.layers * self.rows * self.model.hidden * ACTIVATION * away

    @property
    def private_bytes(self) -> float:
        """What privacy adds: counts by sample, and a number a sample."""
        counts = self.model.layers * self.model.experts * self.samples * 8
        return float(counts + self.samples * self.shared_by * 8)

    @property
    def dense_bytes(self) -> float:
        """A logical batch's sums of what is no expert, and experts' sums over their replicas."""
        dense = 2 * self.model.dense * WEIGHT * (1 - 1 / self.ranks)
        copies = self.ranks / self.shared_by
        experts = 2 * self.model.expert_parameters / self.shared_by * WEIGHT * (1 - 1 / copies)
        return dense + experts

    @property
    def rate(self) -> float:
        """Bytes a second between the ranks that share experts."""
        return INSIDE if self.shared_by <= NODE else BETWEEN

    @property
    def efficiency(self) -> float:
        """Share of the time that a rank computes, at 8 physical batches, nothing overlapped."""
        batches = 8
        talk = batches * self.token_bytes / self.rate
        talk += self.dense_bytes / (INSIDE if self.ranks <= NODE else BETWEEN)
        compute = batches * self.compute_seconds
        return compute / (compute + talk)


def estimates() -> list[Estimate]:
    """Both models on a node and on eight, experts shared inside a node."""
    return [
        Estimate(model, ranks, NODE, 4, 1024) for model in (MIXTRAL, OLMOE) for ranks in (8, 64)
    ]


def as_markdown() -> str:
    """The table, with what it assumes."""
    lines = [
        "## On paper: many GPUs",
        "",
        "Not run: arithmetic (`benchmarks/distributed_paper.py`) for ranks of 4 × 1,024 tokens a"
        " physical batch and 8 of these a logical batch, experts shared inside a node of 8, what is"
        f" no expert sharded over all; {FLOPS / 1e12:.0f} TFLOP/s a GPU, {INSIDE / 1e9:.0f} GB/s"
        f" inside a node, {BETWEEN / 1e9:.0f} GB/s between nodes, nothing overlapped. Weights in"
        " float32 with AdamW's states, activations in bfloat16.",
        "",
        "| model | GPUs | weights and states a rank | activations kept | compute a physical batch |"
        " tokens sent | added by privacy | sums a logical batch | efficiency |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.model.name} | {one.ranks} | {one.weights_bytes / 1e9:.0f} GB |"
        f" {one.kept_bytes / 1e9:.1f} GB | {one.compute_seconds * 1e3:.0f} ms |"
        f" {one.token_bytes / 1e6:,.0f} MB | {one.private_bytes / 1e3:.0f} kB"
        f" ({one.private_bytes / one.token_bytes:.4%}) | {one.dense_bytes / 1e9:.1f} GB |"
        f" {one.efficiency:.0%} |"
        for one in estimates()
    ]
    return "\n".join([*lines, ""])
