"""Parameter groups: which learning rate and which weight decay each parameter gets."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmtrain.base.checks import fraction, non_negative, pattern, pattern_matches, positive
from llmtrain.optimizer import OptimizerConfig, ShardedTrainable, Trainable


@dataclass(frozen=True)
class Rule:
    """An exception for the parameters in whose names ``re.search`` finds ``pattern``; None leaves a value as it is.

    Not every rule sets both values, so they alone have defaults here.
    """

    pattern: str
    lr_multiplier: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True, eq=False)
class Member:
    """A trainable parameter with the values that its group will have."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]  # of the whole, where ``parameter`` is this rank's part
    first_element: int  # number, in the whole, of the first element of ``parameter``
    layer: int  # depth: 0 embeddings, i + 1 block i, num_layers + 1 final norm and heads
    is_in_block: bool
    lr_multiplier: float
    weight_decay: float


@dataclass(frozen=True)
class GroupedOptimizer(OptimizerConfig):
    """The keys that every optimizer has.

    The learning rate of a parameter is ``lr * lr_multiplier * layer_decay ** (num_layers + 1 - layer)``: with
    ``layer_decay`` below 1 the lower layers learn more slowly (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146;
    BEiT, https://arxiv.org/abs/2106.08254).  ``weight_decay`` is for parameters of two dimensions and more; norms and
    biases have none.  ``rules`` may change both by name: where several match, the later one wins.
    """

    lr: float
    weight_decay: float
    layer_decay: float
    rules: list[Rule]

    def __post_init__(self) -> None:
        positive(lr=self.lr, layer_decay=self.layer_decay)
        non_negative(weight_decay=self.weight_decay)
        fraction(layer_decay=self.layer_decay)
        for i, rule in enumerate(self.rules):
            pattern(f"rules[{i}].pattern", rule.pattern)
            if rule.lr_multiplier is None and rule.weight_decay is None:
                raise ValueError(f"rules[{i}].pattern={rule.pattern!r}: give an lr_multiplier or a weight_decay")
            non_negative(
                **{f"rules[{i}].lr_multiplier": rule.lr_multiplier, f"rules[{i}].weight_decay": rule.weight_decay}
            )

    def members(self, unit: Trainable) -> list[Member]:
        """The trainable parameters of ``unit``, tied ones once, in the order of ``unit.named_weights()``.

        Raises ValueError if there are none, or if a rule matches none of them.
        """
        trainable = [(name, parameter) for name, parameter in unit.named_weights() if parameter.requires_grad]
        if not trainable:
            raise ValueError("nothing to train: every parameter of the model is frozen")
        for i, rule in enumerate(self.rules):
            pattern_matches(f"rules[{i}].pattern", rule.pattern, unit.trained_names)
        return [self._member(name, parameter, unit) for name, parameter in trainable]

    def _member(self, name: str, parameter: nn.Parameter, unit: Trainable) -> Member:
        layer, num_layers = unit.layer_index(name), unit.num_layers
        shape, first_element = tuple(parameter.shape), 0
        if isinstance(unit, ShardedTrainable):
            shape, first_element = unit.whole_shape(name), unit.first_element(name)
        lr_multiplier = 1.0
        weight_decay = self.weight_decay if len(shape) >= 2 else 0.0
        for rule in self.rules:
            if re.search(rule.pattern, name):
                lr_multiplier = lr_multiplier if rule.lr_multiplier is None else rule.lr_multiplier
                weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        if self.layer_decay != 1:
            lr_multiplier *= self.layer_decay ** (num_layers + 1 - layer)
        return Member(
            name, parameter, shape, first_element, layer, 1 <= layer <= num_layers, lr_multiplier, weight_decay
        )


def parameter_groups(members: Iterable[Member], lr: float) -> list[dict[str, Any]]:
    """torch parameter groups of the members that share their values, in order of first appearance."""
    by_values: dict[tuple[float, float], list[Member]] = {}
    for member in members:
        by_values.setdefault((member.lr_multiplier, member.weight_decay), []).append(member)
    return [
        {
            "params": [member.parameter for member in group],
            "names": [member.name for member in group],
            "lr": lr * lr_multiplier,
            "lr_multiplier": lr_multiplier,
            "weight_decay": weight_decay,
        }
        for (lr_multiplier, weight_decay), group in by_values.items()
    ]


def has_fused_kernel(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether torch has one kernel for the whole update on the device of these parameters."""
    return all(
        parameter.device.type in ("cpu", "cuda", "mps", "xpu") for group in groups for parameter in group["params"]
    )


def check_betas(betas: Sequence[float]) -> None:
    """Raise ValueError unless ``betas`` are two decay rates in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={list(betas)}: must be two numbers of at least 0 and below 1")
