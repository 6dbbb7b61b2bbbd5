"""The model that the trainer's benchmark trains, and one step of it in each way that is compared.

A step here is the gradient: forward, backward, and for the private ones the clipped sum of the
samples' gradients. Every way computes the same loss on the same batch.
"""

from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from dpmoe_trainer.contract import OptimizerPlan
from dpmoe_trainer.dp import clipped_sum
from dpmoe_trainer.dp.noise import NoiseKey, add_noise
from dpmoe_trainer.methods.dp_sgd import ADAM_BETAS, Gradients, Updater

CLIPPING_NORM = 1.0
NOISE_MULTIPLIER = 1.0
VOCABULARY, HEADS = 1024, 8

PLAN = OptimizerPlan(name="adamw", learning_rate=1e-5)


@dataclass(frozen=True)
class Shape:
    """A batch and a Mixtral.

    Attributes:
        samples: B.
        tokens: T, of each sample.
        hidden: d.
        inner: F, the experts' width.
        experts: E.
        choices: k, the experts of a token.
        layers: L.
    """

    samples: int
    tokens: int
    hidden: int
    inner: int
    experts: int
    choices: int
    layers: int

    def __str__(self) -> str:
        names = ("B", "T", "d", "F", "E", "k", "L")
        return " ".join(f"{name}={size}" for name, size in zip(names, astuple(self), strict=True))

    def of(self, samples: int) -> "Shape":
        """The same with another batch."""
        return replace(self, samples=samples)


@dataclass(frozen=True)
class Place:
    """Where, in which precision, and from which seed."""

    device: str
    dtype: torch.dtype
    seed: int


def build_model(shape: Shape, place: Place) -> MixtralForCausalLM:
    """A fresh model, whose experts run transformers' grouped products."""
    torch.manual_seed(place.seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.choices,
        max_position_embeddings=shape.tokens,
        use_cache=False,
        tie_word_embeddings=False,
    )
    model = MixtralForCausalLM(config).to(place.device, place.dtype).eval()
    assert config._experts_implementation == "grouped_mm", config._experts_implementation
    return model


def build_batch(shape: Shape, place: Place) -> dict[str, Tensor]:
    """Random tokens, no padding."""
    generator = torch.Generator().manual_seed(place.seed)
    ids = torch.randint(VOCABULARY, (shape.samples, shape.tokens), generator=generator)
    ids = ids.to(place.device)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def plain_step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The gradient without privacy, as transformers gives it."""
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()


def private_step(model: nn.Module, batch: dict[str, Tensor]) -> Gradients:
    """The clipped sum."""
    return clipped_sum(model, batch, CLIPPING_NORM)[0]


def halves_step(model: nn.Module, batch: dict[str, Tensor]) -> Gradients:
    """The clipped sum in two physical batches, which needs the activations of one at a time."""
    half = len(batch["labels"]) // 2
    total = private_step(model, {key: value[:half] for key, value in batch.items()})
    more = private_step(model, {key: value[half:] for key, value in batch.items()})
    for name in list(more):
        total[name] += more.pop(name)
    return total


def naive_step(model: nn.Module, batch: dict[str, Tensor]) -> Gradients:
    """The definition: a batch of one for each sample, its gradient clipped and added up."""
    total: Gradients = {}
    for index in range(len(batch["labels"])):
        plain_step(model, {key: value[index : index + 1] for key, value in batch.items()})
        gradients = {
            name: one.grad for name, one in model.named_parameters() if one.grad is not None
        }
        norm = torch.stack([one.pow(2).sum() for one in gradients.values()]).sum().sqrt()
        factor = (CLIPPING_NORM / norm).clamp_max(1)
        for name, gradient in gradients.items():
            if name in total:
                total[name] += factor * gradient
            else:
                total[name] = factor * gradient
    model.zero_grad(set_to_none=True)
    return total


def difference(one: Gradients, other: Gradients) -> float:
    """‖one − other‖/‖other‖."""
    apart = sum(float((one[name] - other[name]).double().pow(2).sum()) for name in other)
    size = sum(float(gradient.double().pow(2).sum()) for gradient in other.values())
    return (apart / size) ** 0.5


class PlainUpdate:
    """AdamW on the gradients that the model holds; fused, as transformers' own trainer has it."""

    def __init__(self, model: nn.Module) -> None:
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=PLAN.learning_rate, betas=ADAM_BETAS, fused=True
        )

    def __call__(self) -> None:
        """Makes a step."""
        self._optimizer.step()


class PrivateUpdate:
    """Noise, and the trainer's optimiser."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        self._key, self._step = NoiseKey(), 0
        self._updater = Updater(model, PLAN, steps=1_000_000, expected_batch=samples)

    def __call__(self, sums: Gradients) -> None:
        """Makes a step."""
        noised = add_noise(sums, NOISE_MULTIPLIER, CLIPPING_NORM, self._key, self._step)
        self._updater.update(noised)
        self._step += 1
