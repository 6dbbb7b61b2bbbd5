"""All that happens before the first private row is read: what a run needs, or why it is refused.

Checks go from cheap to costly: the plan alone, then the place for the model, then the model. None
of them sees data, so every refusal here costs no privacy, and its text may quote foreign errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpmoe_trainer.contract import OptimizerName, ParallelPlan, TrainingPlan
from dpmoe_trainer.data.rows import Lower
from dpmoe_trainer.dp import check_bound, check_model
from dpmoe_trainer.dp.accounting import AccountingMismatch, check_plan
from dpmoe_trainer.dp.balancing import Balancing, ReleasedLoad, SequenceBalancing
from dpmoe_trainer.dp.clipping import FLAT, Automatic, Clipping, Group, PerGroup
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import BadModel, BadPlan, PeerLost, UncoveredMechanism
from dpmoe_trainer.machine import keep_freed_memory, processors
from dpmoe_trainer.methods.check import check_ranks
from dpmoe_trainer.parallel.hand_out import outline
from dpmoe_trainer.parallel.ranks import ALONE, Ranks
from dpmoe_trainer.parallel.shards import NotShardable
from dpmoe_trainer.parallel.spread import Spread, spread
from dpmoe_trainer.precision import computing, require_precision
from dpmoe_trainer.pretrained import read, trainable

_HOST = torch.device("cpu")


def check_mechanism(plan: TrainingPlan) -> None:
    """Refuses what the plan alone shows to be wrong.

    Raises:
        BadPlan: it asks for what this trainer does not do.
        UncoveredMechanism: its mechanism costs more than its (ε, δ), by this trainer's accountant.
    """
    optimizer = plan.training.optimizer
    if optimizer.name is not OptimizerName.SGD and optimizer.momentum:
        raise BadPlan(
            f"training.optimizer.momentum: {optimizer.momentum} has no meaning for "
            f"{optimizer.name}; set it to 0, or the name to {OptimizerName.SGD}"
        )
    privacy = plan.privacy
    try:
        check_plan(
            privacy.noise_multiplier,
            privacy.sampling_rate,
            privacy.steps,
            privacy.epsilon,
            privacy.delta,
            privacy.orders,
        )
    except AccountingMismatch as error:
        raise UncoveredMechanism(f"privacy: {error}") from error


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to train.

    Attributes:
        model: on its device, with exactly the plan's parameters trainable; this rank's part of it.
        here: which part that is.
        tokenizer: its tokenizer, with a padding token.
        device: where it computes.
        lower: its frozen lower part, if it has one whose outputs may be computed once.
        size: bytes of the whole model's parameters and buffers.
        clipping: how its gradients are clipped.
        balancing: what keeps its experts evenly used.
    """

    model: PreTrainedModel
    here: Spread
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    lower: Lower | None
    size: int
    clipping: Clipping
    balancing: Balancing


def device_of(settings: Settings) -> torch.device:
    """Where this process computes: on the GPU of its place in its pod, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", settings.worker.local_rank if settings.worker else 0)
    torch.cuda.set_device(device)
    return device


def repeat_exactly(device: torch.device) -> None:
    """Has a GPU sum in the same order each time, for steps that a restart may make again.

    To be called before anything is computed. What has no such kernel runs as it would otherwise.
    """
    if device.type != "cuda":
        return
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS' first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads what it did not write; to fill it first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def load(
    plan: TrainingPlan, settings: Settings, device: torch.device, ranks: Ranks = ALONE
) -> LoadedModel:
    """Loads the pretrained model, and has the engine prove itself on made-up tokens.

    Rank 0 reads it and proves it whole; then the ranks share it and prove themselves together. All
    of them call this together.

    Raises:
        BadPlan: the device has not the plan's precision.
        BadModel: it cannot be loaded, does not fit the plan, cannot be clipped, or not be shared.
    """
    require_precision(plan.training.precision, device)
    if "OMP_NUM_THREADS" not in environ:
        torch.set_num_threads(max(1, processors() // plan.parallel.processes))
    keep_freed_memory()
    model, tokenizer = _same_on_all(plan, settings, device if ranks.alone else _HOST, ranks)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with _refusing():
        here = spread(model, ranks, plan.parallel.shard_dense, device)
        clipping, balancing = clipping_of(plan), balancing_of(plan, model)
        if not ranks.alone:
            _prove_together(model, plan, ranks, clipping, balancing)
    return LoadedModel(
        model=model,
        here=here,
        tokenizer=tokenizer,
        device=device,
        lower=None if plan.parallel.shard_dense else _frozen_part(model, plan.parallel, balancing),
        size=size,
        clipping=clipping,
        balancing=balancing,
    )


def _same_on_all(
    plan: TrainingPlan, settings: Settings, device: torch.device, ranks: Ranks
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, whole and proven on rank 0 and as an outline on the others; and its tokenizer.

    Raises:
        BadModel: rank 0 refused it; on all ranks.
    """
    model: PreTrainedModel | None = None
    told: tuple[type[PreTrainedModel], Any, PreTrainedTokenizerBase] | None = None
    problem: Exception | None = None
    if ranks.first:
        try:
            with _refusing():
                whole, tokenizer = read(plan, settings)
                told = type(whole), whole.config, tokenizer
                model = trainable(whole, plan.model).to(device)
                _prove(model, plan)
        except (BadPlan, BadModel) as error:
            problem = error
    told, refused = ranks.peers.from_first((told, problem is not None))
    if problem is not None:
        raise problem
    if refused or told is None:
        raise BadModel("model: rank 0 refused it; its report says why")
    kind, config, tokenizer = told
    if model is None:
        with _refusing():
            model = trainable(outline(kind, config), plan.model)
    return model, tokenizer


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns whatever is wrong with a model into a refusal; no data was seen, so it may be told."""
    try:
        yield
    except (BadPlan, PeerLost):
        raise
    except NotShardable as error:
        raise BadModel(f"parallel: {error}") from error
    except Exception as error:
        raise BadModel(f"model: {error or type(error).__name__}") from error


def _prove(model: PreTrainedModel, plan: TrainingPlan) -> None:
    clipping, balancing = clipping_of(plan), balancing_of(plan, model)
    # In float32, where nothing but a mistake tells the engine's numbers from the model's own.
    check_model(model, clipping=clipping, loads=balancing.loads, balancing=balancing.loss)
    if plan.training.precision == "bfloat16":
        with computing(plan.training.precision, model.device):
            check_bound(model, clipping=clipping, loads=balancing.loads, balancing=balancing.loss)


def _prove_together(
    model: PreTrainedModel,
    plan: TrainingPlan,
    ranks: Ranks,
    clipping: Clipping,
    balancing: Balancing,
) -> None:
    check_ranks(model, ranks, clipping, balancing)
    if plan.training.precision == "bfloat16":
        with computing(plan.training.precision, model.device):
            check_ranks(model, ranks, clipping, balancing, exact=False)


def clipping_of(plan: TrainingPlan) -> Clipping:
    """How the plan has gradients clipped."""
    clipping = plan.privacy.clipping
    if clipping is None or clipping.mode == "flat":
        return FLAT
    if clipping.mode == "automatic":
        assert clipping.gamma is not None, "the contract has it set for this mode"
        return Automatic(clipping.gamma)
    return PerGroup(tuple(Group(each.parameters, each.weight) for each in clipping.groups))


def balancing_of(plan: TrainingPlan, model: PreTrainedModel) -> Balancing:
    """What the plan has done for the balance of the model's experts.

    Raises:
        NotPerSample: the model's routers do not allow it.
    """
    balancing, privacy = plan.training.balancing, plan.privacy
    if balancing is None:
        return Balancing(privacy.clipping_norm)
    if balancing.method == "sequence":
        return SequenceBalancing(model, privacy.clipping_norm, balancing.strength)
    assert balancing.through is not None, "the contract has it set for this method"
    assert balancing.load_share is not None, "the contract has it set for this method"
    return ReleasedLoad(
        model,
        privacy.clipping_norm,
        privacy.expected_batch,
        balancing.strength,
        balancing.through,
        balancing.load_share,
    )


def _frozen_part(
    model: PreTrainedModel, parallel: ParallelPlan, balancing: Balancing
) -> Lower | None:
    """What may be run for a row alone: no experts that are spread over ranks, or are balanced."""
    if not hasattr(model, "lower"):
        return None
    try:
        frozen_layers = model.first_trainable_layer
    except ValueError:  # the embeddings are trained
        return None
    balanced = balancing.loads is not None or balancing.loss is not None
    if model.lower_has_experts and (parallel.expert_parallel > 1 or balanced):
        return None
    return model.lower if frozen_layers else None
