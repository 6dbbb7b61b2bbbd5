"""`make_private`: a loop written for Opacus trains a mixture of experts, exactly and accounted."""

import copy
import math

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from tests.trainer.families import LABELS, VOCABULARY, build, make_batch, rows
from tests.trainer.oracle import difference, one_at_a_time, size
from torch.utils.data import DataLoader, IterableDataset
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from dpmoe_trainer.dp import NotPerSample, clipped_sum
from dpmoe_trainer.dp.clipping import Automatic, PerGroup
from dpmoe_trainer.dp.private import PrivacyEngine
from dpmoe_trainer.dp.private import optimizer as private_optimizer
from dpmoe_trainer.dp.private.draws import LoopError
from dpmoe_trainer.dp.sampling import poisson_draw

UNITS, BATCH, CLIP = 24, 6, 0.5


def items_of(model):
    batch = make_batch(model, UNITS, 5)
    return [{key: value[index] for key, value in batch.items()} for index in range(UNITS)]


def private_parts(model, lr=0.1, items=None, engine=None, **changes):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loader = DataLoader(items or items_of(model), BATCH, collate_fn=default_data_collator)
    arguments = {
        "module": model,
        "optimizer": optimizer,
        "data_loader": loader,
        "noise_multiplier": 1.3,
        "max_grad_norm": CLIP,
    }
    return (engine or PrivacyEngine(accountant="rdp")).make_private(**arguments | changes)


@pytest.fixture
def no_noise(monkeypatch):
    """Steps without noise; what noise each was to have is noted."""
    noted = []

    def note(sums, noise_multiplier, clipping_norm, key, step):
        noted.append((noise_multiplier, clipping_norm, key, step))
        return sums

    monkeypatch.setattr(private_optimizer, "add_noise", note)
    return noted


@pytest.mark.parametrize("family", ["mixtral-classifier", "mixtral-lm", "switch"])
def test_an_opacus_loop_trains_exactly(family, no_noise):
    model = build(family)
    expected = copy.deepcopy(model).eval()
    items = items_of(model)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private_parts(model, items=items, engine=engine)
    losses = []
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))

    steps = 2 * UNITS // BATCH
    assert [noted[:2] for noted in no_noise] == [(1.3, CLIP)] * steps
    assert [noted[3] for noted in no_noise] == list(range(steps))
    (key,) = {noted[2] for noted in no_noise}
    for step in range(steps):
        drawn = poisson_draw(UNITS, 1 / 4, key, step)
        if len(drawn) == 0:
            continue
        batch = default_data_collator([items[index] for index in drawn])
        total, _ = one_at_a_time(expected, batch, CLIP)
        with torch.no_grad():
            alone = [
                float(expected(**rows(batch, slice(i, i + 1))).loss) for i in range(len(drawn))
            ]
            for name, parameter in expected.named_parameters():
                parameter -= 0.1 * total[name] / BATCH
        assert losses[step] == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    trained = dict(model.to_standard_module().named_parameters())
    after = {name: p.detach() for name, p in expected.named_parameters()}
    assert difference({n: trained[n].detach() for n in after}, after) <= 1e-9 * size(after)

    counted = RDPAccountant()
    counted.history = [(1.3, 1 / 4, steps)]
    assert engine.get_epsilon(1e-5) == pytest.approx(counted.get_epsilon(1e-5))


def test_opacus_own_optimiser_makes_the_same_update(no_noise):
    """On a dense model that both can clip, with Opacus' noise multiplier zero.

    Opacus divides by the norm plus 10⁻⁶, so it clips a little harder.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
        problem_type="single_label_classification",
    )
    ours = BertForSequenceClassification(config).double()
    ours.bert.embeddings.requires_grad_(False)  # Opacus mistakes [1, T] positions for a sample.
    theirs = GradSampleModule(copy.deepcopy(ours).train(), loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=BATCH,
    )
    items = items_of(ours)
    model, private, loader = private_parts(ours, items=items)
    for batch in loader:
        private.zero_grad()
        model(**batch).loss.backward()
        private.step()
        if len(batch["labels"]):
            optimizer.zero_grad()
            theirs(**batch).loss.backward()
            optimizer.step()
    before = dict(theirs._module.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-8)
    assert any(len(batch["labels"]) for batch in loader)

    batch = make_batch(ours, 5, 6, seed=3)
    sums, norms = clipped_sum(ours, batch, CLIP)
    optimizer.zero_grad()
    theirs(**batch).loss.backward()
    optimizer.clip_and_accumulate()
    assert (norms > CLIP).any()
    for name, parameter in before.items():
        if parameter.requires_grad:
            torch.testing.assert_close(sums[name], parameter.summed_grad, rtol=1e-5, atol=1e-8)


def test_empty_batches_are_steps_like_any_other():
    engine = PrivacyEngine(accountant="rdp")
    model = build("mixtral-classifier", torch.float32)
    loader = DataLoader(items_of(model), 1, collate_fn=default_data_collator)
    before = copy.deepcopy(model.state_dict())
    model, optimizer, loader = private_parts(model, engine=engine, data_loader=loader)
    empty = 0
    for batch in loader:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if len(batch["labels"]) == 0:
            empty += 1
            assert float(loss) == 0
    # Each of 24 is empty with a probability of 0.36.
    assert empty > 0
    assert engine.accountant.history == [(1.3, 1 / 24, 24)]
    after = model.to_standard_module().state_dict()
    names = [name for name, _ in model.to_standard_module().named_parameters()]
    assert all(not torch.equal(before[name], after[name]) for name in names)


def test_updates_have_noise_of_the_clipping_norm_over_the_expected_batch():
    model = build("mixtral-classifier", torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Of gradients that are next to nothing, noise is all that is seen.
    model, optimizer, loader = private_parts(model, lr=1.0, max_grad_norm=1e-3)
    optimizer.max_grad_norm = 1e-2  # As a scheduler of Opacus' changes it.
    optimizer.noise_multiplier = 500.0
    model(**next(iter(loader))).loss.backward()
    optimizer.step()
    after = dict(model.to_standard_module().named_parameters())
    moved = torch.cat([(after[n].detach() - before[n]).flatten() for n in before])
    expected = 500 * 1e-2 / BATCH
    error = 3 * expected / math.sqrt(2 * len(moved))
    assert float(moved.pow(2).mean().sqrt()) == pytest.approx(expected, abs=error)
    assert all(p.grad is None for p in after.values())


@pytest.mark.parametrize("clipping", [PerGroup(), Automatic()], ids=repr)
def test_physical_batches_and_other_ways_of_clipping(clipping, no_noise):
    results = []
    for size_ in (None, 2):
        model = build("dpmoe-bert")
        before = copy.deepcopy(model)
        model, optimizer, loader = private_parts(
            model, clipping=clipping, max_physical_batch_size=size_
        )
        batch = make_batch(before, 7, 5, seed=9)
        loader._draws.draw(7)
        model(**batch).loss.backward()
        optimizer.step()
        expected, _ = clipped_sum(before, batch, CLIP, clipping=clipping)
        for name, parameter in before.named_parameters():
            after = model.to_standard_module().get_parameter(name)
            moved = parameter.detach() - 0.1 * expected[name] / BATCH
            torch.testing.assert_close(after.detach(), moved, rtol=1e-9, atol=1e-12)
        results.append(no_noise.pop())
    assert results[0][:2] == results[1][:2]


def test_in_evaluation_it_is_the_model():
    plain = build("mixtral-classifier").eval()
    batch = make_batch(plain, 3, 5)
    expected = plain(**batch)
    model, _, _ = private_parts(plain)
    model.eval()
    output = model(**batch)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert model.config is plain.config
    assert model.to_standard_module() is plain


def test_a_target_is_met_when_the_epochs_are_over():
    engine = PrivacyEngine(accountant="rdp")
    model = build("mixtral-classifier", torch.float32)
    model.requires_grad_(False).score.requires_grad_(True)
    loader = DataLoader(items_of(model), BATCH, collate_fn=default_data_collator)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.score.parameters(), lr=0.1),
        data_loader=loader,
        target_epsilon=5.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=CLIP,
    )
    for _ in range(2):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
    assert 4.5 < engine.get_epsilon(1e-5) <= 5.0
    with pytest.raises(ValueError, match="target_epsilon is for a fresh engine"):
        engine.make_private_with_epsilon(
            data_loader=loader, target_epsilon=1.0, target_delta=1e-5, epochs=1
        )


# Loops that the accounting does not cover.


@pytest.fixture
def loop():
    """A private model, its optimiser, and a drawn batch."""
    model, optimizer, loader = private_parts(build("mixtral-classifier", torch.float32))
    drawn = next(batch for batch in loader if len(batch["labels"]) > 1)
    return model, optimizer, drawn


def test_a_batch_is_trained_on_once(loop):
    model, optimizer, batch = loop
    model(**batch).loss.backward()
    with pytest.raises(LoopError, match="second batch before step"):
        model(**batch).loss.backward()
    optimizer.step()
    with pytest.raises(LoopError, match="one that was used"):
        model(**batch).loss.backward()
    with pytest.raises(LoopError, match="step\\(\\) was called without a batch"):
        optimizer.step()


def test_a_loss_is_not_to_be_changed(loop):
    model, optimizer, batch = loop
    with pytest.raises(LoopError, match=r"scaled by 0\.5"):
        (model(**batch).loss / 2).backward()
    penalty = sum(p.pow(2).sum() for p in model.parameters())
    (model(**batch).loss + penalty).backward()
    with pytest.raises(LoopError, match=r"'model.embed_tokens.weight' that was not clipped"):
        optimizer.step()


def test_a_part_of_the_batch_is_not_the_batch(loop):
    model, _, batch = loop
    with pytest.raises(LoopError, match="not the samples that were drawn"):
        model(**rows(batch, slice(0, 1))).loss.backward()
    with pytest.raises(LoopError, match="by position"):
        model(batch["input_ids"])
    with pytest.raises(NotPerSample, match="labels"):
        model(input_ids=batch["input_ids"])


def test_batches_are_split_here_and_not_by_opacus():
    _, optimizer, loader = private_parts(build("mixtral-classifier", torch.float32))
    with (
        pytest.raises(LoopError, match="max_physical_batch_size"),
        BatchMemoryManager(
            data_loader=loader._loader, max_physical_batch_size=2, optimizer=optimizer
        ) as split,
    ):
        list(split)


REFUSED = [
    ({"criterion": torch.nn.CrossEntropyLoss()}, "criterion is .* the model's own"),
    ({"batch_first": False}, "batch_first is False, must be True"),
    ({"loss_reduction": "sum"}, "loss_reduction is 'sum', must be 'mean'"),
    ({"poisson_sampling": False}, "poisson_sampling is False, must be True"),
    ({"noise_generator": torch.Generator()}, "noise_generator is .* can be predicted"),
    ({"grad_sample_mode": "hooks"}, "grad_sample_mode is 'hooks', must be 'dpmoe'"),
    ({"wrap_model": False}, "wrap_model is False, must be True"),
    ({"rand_on_empty": True}, "rand_on_empty is True, must be False"),
    ({"clipping": "adaptive"}, "clipping is 'adaptive'.*release of its own"),
    ({"clipping": "per_layer", "max_grad_norm": 1.0}, "clipping is 'per_layer'.*PerGroup"),
    ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0"),
    ({"noise_multiplier": math.inf}, "noise_multiplier is inf"),
    ({"max_grad_norm": [1.0, 1.0]}, r"max_grad_norm is \[1.0, 1.0\]"),
    ({"max_grad_norm": math.inf}, "max_grad_norm is inf"),
    ({"max_physical_batch_size": 0}, "max_physical_batch_size is 0"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[next(iter(r[0])) for r in REFUSED])
def test_arguments_that_weaken_the_guarantee_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        private_parts(build("mixtral-classifier", torch.float32), **changes)


def test_secure_mode_is_not_to_be_turned_off():
    with pytest.raises(ValueError, match="secure_mode is False"):
        PrivacyEngine(secure_mode=False)


def test_what_is_not_trained_or_sampled_is_refused_by_name():
    model = build("mixtral-classifier", torch.float32)
    some = torch.optim.SGD(model.score.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer does not have .*'model.embed_tokens.weight'"):
        private_parts(model, optimizer=some)
    other = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="not the module's"):
        private_parts(model, optimizer=other)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from items_of(model)

        def __len__(self):
            return UNITS

    with pytest.raises(ValueError, match="data_loader is of a stream"):
        private_parts(model, data_loader=DataLoader(Stream(), BATCH))
    coupled = build("mixtral-classifier", torch.float32)
    coupled.config.output_router_logits = True
    with pytest.raises(NotPerSample, match="output_router_logits"):
        private_parts(coupled)
