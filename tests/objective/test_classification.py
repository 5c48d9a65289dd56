"""Classification: the loss against torch's, what is counted by hand, what is trained."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import Rows
from llmtrain.data.sequences import Sequences
from llmtrain.evaluation.loss import evaluate
from llmtrain.kernels.linear_cross_entropy import IGNORE
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective import mean_losses
from llmtrain.objective.classification import Classification, ClassifierUnit, Part
from llmtrain.precision import Precision
from tests.helpers.batches import batch_of

LABELS = ("ham", "spam", "other")


class InMemory(Sequences):
    """Rows as they are."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.inputs)

    def gather(self, indices: np.ndarray) -> Rows:
        return Rows(self.rows.inputs[indices], self.rows.targets[indices])


def unit_with(
    objective: Classification, *, labels: tuple[str, ...] = LABELS, tied: bool = True, weights: tuple[float, ...] = ()
) -> ClassifierUnit:
    config = GPTConfig(3, 32, 2, 24, None, 0.0, True, tied, None, Initialisation.gpt2)
    generators = NamedGenerators(1)
    model = config.create(50, torch.device("cpu"), generators)
    return objective.build(model, labels, generators, weights).double()


def loss_of(unit: ClassifierUnit, inputs: Tensor, targets: Tensor) -> Tensor:
    return unit(batch_of(inputs, targets))["class"]


def texts(lengths: list[int], classes: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Texts of random tokens, padded on the right; a class at the last token of each."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.zeros(len(lengths), width, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE)
    for row, (length, label) in enumerate(zip(lengths, classes, strict=True)):
        inputs[row, :length] = torch.randint(0, 50, (length,), generator=generator)
        targets[row, length - 1] = label
    return inputs, targets


def test_the_loss_is_torchs_at_the_last_token() -> None:
    objective = Classification(Part.all, 1, False, True)
    unit = unit_with(objective)
    lengths, classes = [5, 9, 1, 24], [0, 2, 1, 1]
    inputs, targets = texts(lengths, classes, 24)
    alone = [unit.classifier(unit.model.hidden(inputs[row : row + 1, :n])[0, -1]) for row, n in enumerate(lengths)]
    reference = F.cross_entropy(torch.stack(alone), torch.tensor(classes), reduction="sum")
    loss = loss_of(unit, inputs, targets)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    parts = [loss_of(unit, inputs[[row]][:, :n], targets[[row]][:, :n]) for row, n in enumerate(lengths)]
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-6)  # padding plays no part
    targets[1] = IGNORE
    without = loss_of(unit, inputs, targets)
    assert without.item() == pytest.approx(loss.item() - parts[1].item(), rel=1e-5)


def test_class_weights_are_torchs() -> None:
    objective = Classification(Part.all, 1, False, True)
    weights = (0.5, 2.0, 1.5)
    unit = unit_with(objective, weights=weights)
    inputs, targets = texts([5, 9, 7], [0, 1, 2], 12)
    logits = torch.stack([unit.classifier(unit.model.hidden(inputs)[row, n - 1]) for row, n in enumerate([5, 9, 7])])
    reference = F.cross_entropy(logits, torch.tensor([0, 1, 2]), torch.tensor(weights).double(), reduction="sum")
    assert loss_of(unit, inputs, targets).item() == pytest.approx(reference.item(), rel=1e-6)
    assert "classifier.class_weights" not in unit.weights_state()  # they follow from the data


@pytest.mark.parametrize("size", [7, 2, 1])
def test_the_weighted_mean_of_a_step_and_its_gradient_are_torchs(size: int) -> None:
    """``CrossEntropyLoss(weight)`` divides by the sum of the weights of the texts, in however many parts they are."""
    weights = (0.25, 0.5, 4.0)  # sums below 1 among them
    objective = Classification(Part.all, 1, False, True)
    unit, reference = unit_with(objective, weights=weights), unit_with(objective, weights=weights)
    lengths = [5, 9, 7, 3, 11, 2, 4]
    for classes in ([0, 1, 2, 0, 0, 1, 2], [0, 0, 0, 0, 0, 0, 0], [0, IGNORE, IGNORE, IGNORE, 1, IGNORE, IGNORE]):
        inputs, targets = texts(lengths, classes, 12)
        rows = Rows(inputs.numpy(), targets.numpy())
        batch = objective.collator(weights)(rows, np.arange(7), 0)
        unit.zero_grad()
        loss = sum(mean_losses(unit, part)[0] for part in batch.split(size))
        assert isinstance(loss, Tensor)
        loss.backward()
        hidden = reference.model.hidden(inputs)[torch.arange(7), torch.tensor(lengths) - 1]
        expected = torch.nn.CrossEntropyLoss(torch.tensor(weights).double(), ignore_index=IGNORE)(
            reference.classifier(hidden), torch.tensor(classes)
        )
        reference.zero_grad()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for (name, ours), (_, theirs) in zip(unit.named_weights(), reference.named_weights(), strict=True):
            if theirs.grad is not None:
                assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14), name
        result = evaluate(
            unit, InMemory(rows), objective.collator(weights), batch_size=size, max_sequences=None,
            precision=Precision("fp32", torch.device("cpu")), device=torch.device("cpu"),
        )  # fmt: skip
        assert result is not None
        assert result.loss == pytest.approx(expected.item(), rel=1e-12)


def test_texts_without_a_class_have_no_loss() -> None:
    objective = Classification(Part.all, 1, False, True)
    unit = unit_with(objective, weights=(0.5, 2.0, 1.5))
    inputs, targets = texts([5, 9], [IGNORE, IGNORE], 12)
    batch = objective.collator((0.5, 2.0, 1.5))(Rows(inputs.numpy(), targets.numpy()), np.arange(2), 0)
    loss, _ = mean_losses(unit, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(not weight.grad.any() for _, weight in unit.named_weights() if weight.grad is not None)


@pytest.mark.parametrize("option", [(True, True), (False, False)])
def test_several_labels_and_runs_of_older_versions_are_divided_by_their_texts(option: tuple[bool, bool]) -> None:
    objective = Classification(Part.all, 1, *option)
    inputs, targets = texts([5, 9, 7], [0, 1, 2], 12)
    batch = objective.collator((0.5, 2.0, 1.5))(Rows(inputs.numpy(), targets.numpy()), np.arange(3), 0)
    assert batch.counts == {"class": 3}


def test_the_loss_of_several_labels_is_torchs() -> None:
    objective = Classification(Part.all, 1, True, True)
    unit = unit_with(objective)
    inputs, targets = texts([5, 9], [0b101, 0b010], 12)
    logits = torch.stack([unit.classifier(unit.model.hidden(inputs)[row, n - 1]) for row, n in enumerate([5, 9])])
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).double()
    reference = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / 3
    assert loss_of(unit, inputs, targets).item() == pytest.approx(reference.item(), rel=1e-6)
    loss, counts = unit.score(batch_of(inputs, targets))
    assert loss["class"].item() == pytest.approx(reference.item(), rel=1e-6)
    guess = logits > 0
    assert counts[:3, 0].tolist() == (guess & truth.bool()).sum(0).tolist()
    assert counts[3, :2].tolist() == [int((guess == truth.bool()).all(1).sum()), 2]
    measures = objective.measures(torch.tensor([[2, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 3], [2, 3, 0, 0]]), LABELS)
    assert measures == {"accuracy": round(2 / 3, 6), "macro_f1": round((1 + 2 / 3) / 2, 6)}
    assert objective.name_target(0b101, LABELS) == "ham|other"


def test_accuracy_and_f1_follow_from_the_confusion() -> None:
    objective = Classification(Part.all, 1, False, True)
    unit = unit_with(objective)
    lengths, classes = [5, 9, 7, 3, 8], [0, 1, 1, 2, 0]
    inputs, targets = texts(lengths, classes, 12)
    targets[4] = IGNORE
    loss, counts = unit.score(batch_of(inputs, targets))
    assert loss["class"].item() == pytest.approx(loss_of(unit, inputs, targets).item(), rel=1e-6)
    hidden = unit.model.hidden(inputs)
    guesses = [int(unit.classifier(hidden[row, n - 1]).argmax()) for row, n in enumerate(lengths)]
    expected = torch.zeros(3, 3, dtype=torch.long)
    for truth, guess in list(zip(classes, guesses, strict=True))[:4]:
        expected[truth, guess] += 1
    assert torch.equal(counts, expected)
    counts = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])  # the third is neither there nor predicted
    measures = objective.measures(counts, LABELS)
    f1 = [2 * 8 / (16 + 1 + 2), 2 * 9 / (18 + 2 + 1)]
    assert measures["accuracy"] == 0.85
    assert measures["macro_f1"] == pytest.approx(sum(f1) / 2, abs=1e-6)
    assert measures["confusion"] == counts.tolist()
    many = objective.measures(torch.eye(40, dtype=torch.long), [str(n) for n in range(40)])
    assert "confusion" not in many
    assert many["accuracy"] == 1.0


def test_probabilities_are_the_softmax_at_the_last_token() -> None:
    objective = Classification(Part.all, 1, False, True)
    unit = unit_with(objective)
    inputs, _ = texts([5, 9], [0, 0], 12)
    found = unit.probabilities(inputs, torch.tensor([4, 8]))
    assert found.shape == (2, 3)
    assert found.sum(1).tolist() == pytest.approx([1, 1])
    alone = unit.classifier(unit.model.hidden(inputs[:1, :5])[0, -1]).softmax(0)
    torch.testing.assert_close(found[0].double(), alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("part", "last_layers", "trained"),
    [
        (Part.head, 1, {"classifier"}),
        (Part.last_layers, 1, {"blocks.2", "final_norm", "classifier"}),
        (Part.last_layers, 3, {"blocks.0", "blocks.1", "blocks.2", "final_norm", "classifier"}),
        (Part.all, 1, {"token_embedding", "position_embedding", "blocks.0", "blocks.1", "blocks.2", "final_norm",
                       "classifier"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_train_chooses_the_layers_that_learn(part: Part, last_layers: int, trained: set[str], tied: bool) -> None:
    objective = Classification(part, last_layers, False, True)
    unit = unit_with(objective, tied=tied)
    moving = {name for name, parameter in unit.named_weights() if parameter.requires_grad}
    assert {".".join(name.split(".")[: 1 + name.startswith("blocks")]) for name in moving} == trained
    loss_of(unit, *texts([5, 9], [0, 1], 12)).backward()
    with_gradient = {name for name, parameter in unit.named_weights() if parameter.grad is not None}
    assert with_gradient == moving  # nothing is trained that the loss does not depend on


def test_the_head_starts_near_even_odds() -> None:
    objective = Classification(Part.all, 1, False, True)
    unit = unit_with(objective)
    inputs, targets = texts([5, 9, 7, 3], [0, 1, 1, 2], 12)
    assert loss_of(unit, inputs, targets).item() / 4 == pytest.approx(math.log(3), abs=0.15)


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"last_layers=9: the model has 3; take fewer, or train=all"):
        unit_with(Classification(Part.last_layers, 9, False, True))
    with pytest.raises(ValueError, match="last_layers=0"):
        Classification(Part.last_layers, 0, False, True)
