"""An evaluation: batches made ahead, the same losses to the bit, and one moment at which the host waits."""

import threading
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import DataError
from llmtrain.data.loader import EvaluationLoader
from llmtrain.data.sequences import Rows, Sequences, Stream
from llmtrain.evaluation.loss import EvalResult, evaluate
from llmtrain.kernels.linear_cross_entropy import IGNORE
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective import Objective, TrainingUnit, weighted
from llmtrain.objective.causal import Causal
from llmtrain.objective.classification import Classification, Part
from llmtrain.precision import Precision

CPU = torch.device("cpu")
CAUSAL = Causal(z_loss=0.0, chunk_tokens=None)
SEQUENCES = Stream([np.arange(201) % 47], 8)  # 25 of them
FP32, BF16 = Precision("fp32", CPU, torch.float32), Precision("bf16", CPU, torch.bfloat16)


def model() -> LanguageModel:
    config = GPTConfig(2, 32, 2, 8, None, 0.1, True, True, None, Initialisation.gpt2)
    return config.create(50, CPU, NamedGenerators(1))


def causal() -> TrainingUnit:
    return CAUSAL.build(model(), (), NamedGenerators(0))


class LabelledRows(Sequences):
    """Texts of 8 tokens with a class at the last of them, or without any."""

    def __init__(self, several: bool) -> None:
        generator = np.random.default_rng(3)
        self.inputs = generator.integers(0, 50, (25, 8))
        self.targets = np.full((25, 8), IGNORE)
        self.targets[:, -1] = generator.integers(0, 8 if several else 3, 25)
        self.targets[::6] = IGNORE

    def __len__(self) -> int:
        return len(self.inputs)

    def gather(self, indices: np.ndarray) -> Rows:
        return Rows(self.inputs[indices], self.targets[indices])


def run(unit: TrainingUnit, objective: Objective, sequences: Sequences, size: int, **options: Any) -> EvalResult:
    result = evaluate(
        unit, sequences, objective.collator(()), batch_size=size,
        **({"max_sequences": None, "precision": FP32, "device": CPU, "seed": 5} | options),
    )  # fmt: skip
    assert result is not None
    return result


def one_after_the_other(
    unit: TrainingUnit, objective: Objective, sequences: Sequences, size: int, precision: Precision
) -> tuple[float, Tensor | None]:
    """The reference: each batch is made when it is needed, and each sum is read at once."""
    totals, targets, counted = Counter[str](), Counter[str](), None
    unit.eval()
    with torch.no_grad(), precision.autocast():
        for start in range(0, len(sequences), size):
            part = sequences.alike(np.arange(len(sequences)))[start : start + size]
            batch = objective.collator(())(sequences.gather(part), part, 5)
            sums, counts = unit.score(batch)
            for name, total in sums.items():
                totals[name] += total.double().item()
                targets[name] += batch.counts[name]
            counted = counts if counted is None or counts is None else counted + counts
    unit.train()
    return weighted({name: total / targets[name] for name, total in totals.items()}, unit.loss_weights), counted


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 4, 25, 40])
def test_losses_are_to_the_bit_those_of_batches_made_one_after_the_other(size: int, precision: Precision) -> None:
    unit = causal()
    expected, _ = one_after_the_other(unit, CAUSAL, SEQUENCES, size, precision)
    assert run(unit, CAUSAL, SEQUENCES, size, precision=precision).loss == expected
    assert unit.training


@pytest.mark.parametrize("several", [False, True])
def test_counts_of_classes_are_those_of_the_rows_that_have_one(several: bool) -> None:
    objective = Classification(Part.all, 1, several, True)
    sequences, labels = LabelledRows(several), ("a", "b", "c")
    unit = objective.build(model(), labels, NamedGenerators(2))
    loss, _ = one_after_the_other(unit, objective, sequences, 4, FP32)
    result = run(unit, objective, sequences, 4)
    assert result.loss == loss
    assert result.counted is not None
    there = sequences.targets[:, -1] != IGNORE
    inputs = torch.from_numpy(sequences.inputs)[torch.from_numpy(there)]
    truth = sequences.targets[there, -1]
    unit.eval()
    with torch.no_grad():
        chances = unit.probabilities(inputs, torch.full((len(inputs),), 7)).numpy()  # type: ignore[operator]
    expected: Any
    if several:
        are, said = (truth[:, None] >> np.arange(3) & 1).astype(bool), chances > 0.5
        columns = [(are & said).sum(0), (~are & said).sum(0), (are & ~said).sum(0), (~are & ~said).sum(0)]
        expected = [*np.stack(columns, 1).tolist(), [int((are == said).all(1).sum()), len(truth), 0, 0]]
    else:
        expected = np.zeros((3, 3), int)
        np.add.at(expected, (truth, chances.argmax(1)), 1)
        expected = expected.tolist()
    assert result.counted.tolist() == expected


class Waits(TorchDispatchMode):
    """A count of the operations for whose result the host has to wait."""

    OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name().partition(".")[0]
        masks = name == "aten::index" and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in tree_iter(args[1])
        )
        if masks or name in self.OPERATIONS:
            self.found[name] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["causal", "class", "classes"])
def test_the_host_waits_for_the_device_at_the_end_of_an_evaluation_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective: Objective = CAUSAL if kind == "causal" else Classification(Part.all, 1, kind == "classes", True)
    sequences = SEQUENCES if kind == "causal" else LabelledRows(kind == "classes")
    unit = objective.build(model(), () if kind == "causal" else ("a", "b", "c"), NamedGenerators(2))
    read: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: read.append(tensor.numel()) or tolist(tensor))
    for size in (1, 5, 25):  # 25, 5 and 1 batches
        read.clear()
        with Waits() as waits:
            run(unit, objective, sequences, size)
        assert waits.found == {}
        assert read == [1]  # the sums of the losses


def test_batches_are_made_while_others_are_computed() -> None:
    """By the thread of the loader, two ahead, as for training."""
    made: list[str] = []
    ahead: list[int] = []

    class Watched(Stream):
        def gather(self, indices: np.ndarray) -> Rows:
            made.append(threading.current_thread().name)
            return super().gather(indices)

    unit, reached = causal(), threading.Event()
    score = unit.score

    def scored(batch: Any) -> Any:
        if not ahead:
            for _ in range(500):
                if len(made) == 3:
                    break
                reached.wait(0.01)
        ahead.append(len(made) - len(ahead) - 1)
        return score(batch)

    unit.score = scored  # type: ignore[method-assign]
    run(unit, CAUSAL, Watched([np.arange(201) % 47], 8), 5)
    assert made == ["loader"] * 5
    assert ahead[0] == 2
    assert max(ahead) <= 3


def test_an_evaluation_that_ends_early_leaves_no_thread() -> None:
    before = threading.active_count()
    asked: list[int] = []
    unit = causal()
    result = evaluate(
        unit, SEQUENCES, CAUSAL.collate, batch_size=2, max_sequences=None, precision=FP32, device=CPU,
        stop=lambda: asked.append(0) or len(asked) > 3,
    )  # fmt: skip
    assert result is None
    assert threading.active_count() == before

    def broken(batch: Any) -> Any:
        raise torch.OutOfMemoryError("of the device")

    unit.score = broken  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        run(unit, CAUSAL, SEQUENCES, 2)
    assert threading.active_count() == before
    assert unit.training


def test_an_error_in_making_a_batch_names_the_batch() -> None:
    class Failing(Stream):
        def gather(self, indices: np.ndarray) -> Rows:
            if indices[0] == 8:
                raise OSError("the disk is gone")
            return super().gather(indices)

    with pytest.raises(DataError, match=r"^loader thread, evaluation, batch 3: OSError: the disk is gone$"):
        run(causal(), CAUSAL, Failing([np.arange(201) % 47], 8), 4)


def test_an_evaluation_of_no_sequences_has_no_loss() -> None:
    assert run(causal(), CAUSAL, SEQUENCES, 4, max_sequences=0) == EvalResult(0.0)


def test_the_loader_of_an_evaluation_ends_after_the_last_batch() -> None:
    with EvaluationLoader(SEQUENCES, np.arange(7), CAUSAL.collate, seed=0, batch_size=3, device=CPU) as loader:
        assert [batch.sequences for batch in loader] == [3, 3, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 5, 25])
def test_an_evaluation_on_a_gpu_waits_for_it_once(size: int) -> None:
    unit, device = causal().to("cuda"), torch.device("cuda")
    run(unit, CAUSAL, SEQUENCES, size, device=device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            result = run(unit, CAUSAL, SEQUENCES, size, device=device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in found if "synchronizing" in str(each.message)]) == 1
    assert result.loss == pytest.approx(run(unit.to("cpu"), CAUSAL, SEQUENCES, size).loss, rel=1e-3)
