"""Batches of rows: padding, masks, and the cached outputs of frozen layers."""

import numpy as np
import torch
from tests.tiny import WORDS
from torch import Tensor

from dpmoe_trainer.data.rows import Lower, Rows
from dpmoe_trainer.models import DPMoEBertConfig, DPMoEBertForSequenceClassification

CPU = torch.device("cpu")
TOKENS = [np.array(row, dtype=np.int32) for row in ([5, 6, 7], [8], [9, 3], [4, 4, 4, 4])]


def test_a_batch_is_padded_to_its_own_longest_row() -> None:
    batch = Rows(TOKENS, [0, 1, 2, 3], padding=1, device=CPU).batch([2, 0])
    assert batch["input_ids"].tolist() == [[9, 3, 1], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [2, 0]


def test_physical_batches_hold_every_row_once_sorted_by_length() -> None:
    rows = Rows(TOKENS, [0, 1, 2, 3], padding=0, device=CPU)
    labels = [batch["labels"].tolist() for batch in rows.physical_batches([0, 1, 2, 3], size=3)]
    assert labels == [[1, 2, 0], [3]]
    assert list(rows.physical_batches([], size=3)) == []


def half_frozen_model() -> DPMoEBertForSequenceClassification:
    torch.manual_seed(0)
    config = DPMoEBertConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        moe_layers=[2],
        num_labels=4,
    )
    model = DPMoEBertForSequenceClassification(config)
    model.eval()
    model.requires_grad_(False)
    model.layers[2].requires_grad_(True)
    return model


def test_cached_lower_layers_give_the_models_own_outputs() -> None:
    model = half_frozen_model()
    plain = Rows(TOKENS, [0, 1, 2, 3], 0, CPU).batch([1, 3, 0, 2])
    cached = Rows(TOKENS, [0, 1, 2, 3], 0, CPU, model.lower, cache_bytes=1000)
    cached.batch([2, 1])  # some rows known, others not
    batch = cached.batch([1, 3, 0, 2])
    assert "input_ids" not in batch
    assert torch.equal(plain.pop("labels"), batch.pop("labels"))
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, model(**plain).logits, atol=2e-3, rtol=1e-2
        )


def counted_lower(seen: list[int], scale: float = 1.0) -> Lower:
    def lower(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.extend(input_ids[:, 0].tolist())
        return input_ids[..., None] * torch.tensor([1.0, 2.0]) * scale

    return lower


def test_a_frozen_part_sees_each_row_once_while_there_is_room() -> None:
    seen: list[int] = []
    rows = Rows(TOKENS, [0, 1, 2, 3], 0, CPU, counted_lower(seen), cache_bytes=1000)
    for chosen in ([0, 1], [1, 2], [2, 0, 1]):
        hidden = rows.batch(chosen)["hidden_states"]
        assert hidden[:, 0, 0].tolist() == [TOKENS[row][0] for row in chosen]
    assert seen == [5, 8, 9]

    seen.clear()
    first_row = 3 * 2 * 2  # three tokens of two numbers in half precision
    rows = Rows(TOKENS, [0, 1, 2, 3], 0, CPU, counted_lower(seen), cache_bytes=first_row)
    for _ in range(2):
        assert rows.batch([0, 1])["hidden_states"][1].tolist() == [[8, 16], [0, 0], [0, 0]]
    assert seen == [5, 8, 8]


def test_outputs_beyond_half_precision_are_kept_exactly() -> None:
    rows = Rows(TOKENS, [0, 1, 2, 3], 0, CPU, counted_lower([], scale=1e6))
    assert rows.batch([1])["hidden_states"].tolist() == [[[8e6, 16e6]]]
