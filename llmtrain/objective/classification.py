"""Classes for whole texts: a linear head on the last token of a decoder.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.base.checks import positive
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import IGNORE, Batch, Collate, Outline, Rows
from llmtrain.model import LanguageModel
from llmtrain.model.initial_values import InitialValues, initialise_own
from llmtrain.model.layers.skip_init import SkipInitMode
from llmtrain.objective import Objective, TrainingUnit

MAX_MATRIX = 20  # classes; with more, metrics rows leave out the confusion matrix
CLASSIFIER = "classifier"  # the name of the head in a unit and in checkpoints
INITIAL_STD = 0.02  # of the head, as of GPT-2's weights


class Part(Enum):
    """The part of the model that is trained."""

    head = "head"  # the head alone
    last_layers = "last_layers"  # the head, the final norm and the last so many blocks
    all = "all"


class Classifier(nn.Linear, InitialValues):
    """The head: logits ``(batch, classes)`` of hidden states ``(batch, hidden)``; class weights are not saved.

    It has no bias, like the heads of transformers' ``…ForSequenceClassification``, so that it can be exported.
    """

    filled: ClassVar[tuple[str, ...]] = ("weight",)
    class_weights: Tensor | None

    def __init__(self, hidden_size: int, classes: int, device: torch.device, weights: Sequence[float]) -> None:
        with SkipInitMode():
            super().__init__(hidden_size, classes, bias=False, device=device)
        self.weights_of_classes = tuple(weights)
        self.register_buffer("class_weights", None, persistent=False)
        self.set_buffers(device)

    def set_buffers(self, device: torch.device) -> None:
        """Set the weights of the classes, on ``device``."""
        if self.weights_of_classes:
            self.class_weights = torch.tensor(self.weights_of_classes, dtype=torch.float32, device=device)

    def fill(self, key: str, whole: Tensor, generator: torch.Generator) -> None:
        whole.normal_(0.0, INITIAL_STD, generator=generator)


class ClassifierUnit(TrainingUnit):
    """A decoder with a linear head that is read at the last token of a text."""

    uses_output_layer: ClassVar[bool] = False
    has_stages: ClassVar[bool] = True

    def __init__(self, model: LanguageModel, classifier: Classifier, loss: str, *, multi_label: bool) -> None:
        super().__init__(model)
        self.classifier = classifier
        self.loss = loss
        self.multi_label = multi_label

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {self.loss: self._loss(*self._logits_and_classes(batch))}

    def sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
        rows = zip(*(part.split(1) for part in self._logits_and_classes(batch)), strict=True)
        return {self.loss: torch.stack([self._loss(*row) for row in rows])}

    def score(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The loss, and ``(classes, classes)`` counts: rows are true classes, columns the predicted ones.

        With ``multi_label`` ``(classes + 1, 4)``: for each class the true positives, false positives, false negatives
        and true negatives; in the last row the texts with all labels right, and all texts.
        """
        logits, classes = self._logits_and_classes(batch)
        loss = {self.loss: self._loss(logits, classes)}
        valid = classes != IGNORE  # not used as an index: the host would wait for the number of rows
        number = logits.shape[1]
        if not self.multi_label:
            pairs = torch.where(valid, classes * number + logits.argmax(1), number * number)
            counts = pairs.new_zeros(number * number + 1).scatter_add_(0, pairs, torch.ones_like(pairs))
            return loss, counts[:-1].view(number, number)
        truth, guess, rows = bits(classes, number).bool(), logits > 0, valid[:, None]
        cells = [truth & guess & rows, ~truth & guess & rows, truth & ~guess & rows, ~truth & ~guess & rows]
        right = (truth == guess).all(1) & valid
        last = torch.stack([right.sum(), valid.sum(), *right.new_zeros(2, dtype=torch.int64)])
        return loss, torch.cat([torch.stack([cell.sum(0) for cell in cells], 1), last[None]])

    def probabilities(self, inputs: Tensor, last: Tensor) -> Tensor:
        """Probabilities of classes ``(batch, classes)``, fp32, at the tokens ``last`` ``(batch,)`` of ``inputs``."""
        logits = self.logits_at(inputs, last)
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def logits_at(self, inputs: Tensor, last: Tensor) -> Tensor:
        """Logits ``(batch, classes)``, fp32, at the tokens ``last`` ``(batch,)`` of ``inputs``."""
        hidden = self.model.hidden(inputs)
        rows = torch.arange(len(inputs), device=inputs.device)
        logits = self.classifier(hidden[rows, last])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _logits_and_classes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits at each row's target, and the targets ``(batch,)``: IGNORE where a row has none."""
        inputs, targets = batch.tensors["inputs"], batch.tensors["targets"]
        last = (targets != IGNORE).int().argmax(1)
        return self.logits_at(inputs, last), targets.gather(1, last[:, None])[:, 0]

    def _loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        weights = self.classifier.class_weights
        weights = None if weights is None else weights.to(logits.dtype)
        if not self.multi_label:
            return F.cross_entropy(logits, classes, weights, reduction="sum", ignore_index=IGNORE)
        loss = F.binary_cross_entropy_with_logits(logits, bits(classes, logits.shape[1]), weights, reduction="none")
        return torch.where(classes == IGNORE, 0.0, loss.mean(1)).sum()


@dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy of the class; with ``multi_label`` the mean over classes of the binary ones.

    Where classes have weights the loss is the weighted mean, the sum over the sum of the weights, as
    ``torch.nn.CrossEntropyLoss(weight=…)`` has it; without ``weighted_mean`` the sum over the number of texts.  With
    ``multi_label`` it is always the latter, as ``torch.nn.BCEWithLogitsLoss(weight=…)`` has it.
    """

    train: Part
    last_layers: int
    multi_label: bool
    weighted_mean: bool

    takes: ClassVar[tuple[str, ...]] = ("labels",)
    loss: ClassVar[str] = "class"
    generates: ClassVar[bool] = False
    verb: ClassVar[str] = "predict"

    def __post_init__(self) -> None:
        positive(last_layers=self.last_layers)

    def collator(self, class_weights: Sequence[float]) -> Collate:
        if self.multi_label or not self.weighted_mean or not class_weights:
            return self.collate

        def collate(rows: Rows, positions: np.ndarray, seed: int) -> Batch:
            batch = self.collate(rows, positions, seed)
            classes = rows.targets[rows.targets != IGNORE]
            return replace(batch, counts={self.loss: weight_of(classes, class_weights)})

        return collate

    def count(self, outline: Outline, class_weights: Sequence[float] = ()) -> Mapping[str, float] | None:
        own = type(self)
        if own.collate is not Objective.collate or own.collator is not Classification.collator:
            return None
        if self.multi_label or not self.weighted_mean or not class_weights:
            return {self.loss: outline.targets}
        return None if outline.classes is None else {self.loss: weight_of(outline.classes, class_weights)}

    def build(
        self,
        model: LanguageModel,
        labels: Sequence[str],
        generators: NamedGenerators | None,
        class_weights: Sequence[float] = (),
    ) -> ClassifierUnit:
        """Add the head and freeze the weights that are not trained, among them the model's own output layer."""
        if self.train is Part.last_layers and self.last_layers > model.num_layers:
            raise ValueError(
                f"last_layers={self.last_layers}: the model has {model.num_layers}; take fewer, or train=all"
            )
        weight = model.head_weight
        head = Classifier(weight.shape[1], len(labels), weight.device, class_weights)
        if generators is not None:
            initialise_own(head, CLASSIFIER, generators)
        first = {
            Part.head: model.num_layers + 1,
            Part.last_layers: model.num_layers - self.last_layers + 1,
            Part.all: 0,
        }
        for name, parameter in model.named_parameters():
            is_output = name.startswith("head.")  # a tied one is the embedding, which is trained
            trained = model.layer_index(name) >= first[self.train] and self.train is not Part.head
            parameter.requires_grad_(trained and not is_output)
        return ClassifierUnit(model, head, self.loss, multi_label=self.multi_label)

    def measures(self, counted: Tensor, labels: Sequence[str]) -> dict[str, Any]:
        """``accuracy`` (with ``multi_label``: texts with all of their labels right), ``macro_f1``, ``confusion``."""
        counts = counted.double().cpu()
        if self.multi_label:
            hit, false_alarm, missed = counts[:-1, 0], counts[:-1, 1], counts[:-1, 2]
            accuracy = counts[-1, 0] / counts[-1, 1].clamp(min=1)
        else:
            hit = counts.diagonal()
            false_alarm, missed = counts.sum(0) - hit, counts.sum(1) - hit
            accuracy = hit.sum() / counts.sum().clamp(min=1)
        f1 = 2 * hit / (2 * hit + false_alarm + missed).clamp(min=1)
        seen = hit + missed + false_alarm > 0  # a class that neither occurs nor is predicted has no F1
        measures: dict[str, Any] = {
            "accuracy": round(accuracy.item(), 6),
            "macro_f1": round(f1[seen].mean().item() if seen.any() else 0.0, 6),
        }
        if not self.multi_label and len(labels) <= MAX_MATRIX:
            measures |= {"confusion": counted.tolist(), "labels": list(labels)}
        return measures

    def name_target(self, target: int, labels: Sequence[str]) -> str:
        if not self.multi_label:
            return labels[target]
        return "|".join(label for index, label in enumerate(labels) if target >> index & 1)


def weight_of(classes: np.ndarray, class_weights: Sequence[float]) -> float:
    """The sum of the weights of ``classes``, each as the head holds it."""
    return float(np.array(class_weights, np.float32)[classes].sum(dtype=np.float64))


def bits(masks: Tensor, number: int) -> Tensor:
    """The lowest ``number`` bits of ``masks`` ``(batch,)`` as ``(batch, number)`` fp32."""
    return ((masks[:, None] >> torch.arange(number, device=masks.device)) & 1).float()
