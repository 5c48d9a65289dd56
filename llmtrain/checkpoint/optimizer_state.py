"""Optimizer state by parameter name, for checkpoints: independent of the order of parameters and groups."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Python numbers in a state are kept as 0-dimensional tensors; the end of the key names their type.
NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as ``{"<parameter name>/<state key>": tensor}``.

    Tensors are the optimizer's own, not copies, on their devices.  A Python number becomes a tensor under
    ``"<parameter name>/<state key>:<its type>"``.
    """
    tensors = {}
    for name, parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif type(value) in NUMBERS:
                tensors[f"{name}/{key}:{type(value).__name__}"] = torch.tensor(value, dtype=NUMBERS[type(value)])
            elif value is not None:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} in {key!r}: cannot be saved"
                )
    return tensors


@torch.no_grad()
def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the state of ``optimizer`` from the tensors of :func:`state_tensors`; in place, so that it is not held twice.

    An optimizer that makes its state at the first step takes the tensors as torch's ``load_state_dict`` does.
    Raises ValueError that names the entries if some are missing, not known, or of another shape or type.
    """
    current = state_tensors(optimizer)
    if not current:
        _load_into_empty(optimizer, tensors)
        return
    _refuse("missing", current.keys() - tensors.keys())
    _refuse("not known", tensors.keys() - current.keys())
    _refuse(
        "of another shape or type",
        {
            f"{key} ({_kind(tensors[key])} instead of {_kind(value)})"
            for key, value in current.items()
            if _kind(tensors[key]) != _kind(value)
        },
    )
    parameters = dict(_parameters(optimizer))
    for entry, tensor in tensors.items():
        name, key, number = _split(entry)
        if number:
            optimizer.state[parameters[name]][key] = tensor.item()
        else:
            current[entry].copy_(tensor)


def _load_into_empty(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    index = {name: i for i, (name, _) in enumerate(_parameters(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    _refuse("not known", {entry for entry in tensors if _split(entry)[0] not in index})
    for entry, tensor in tensors.items():
        name, key, number = _split(entry)
        # load_state_dict keeps a tensor whose type and device fit as it is; the caller's must not be shared
        state.setdefault(index[name], {})[key] = tensor.item() if number else tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters in the order of the groups, which is how torch numbers them."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _split(entry: str) -> tuple[str, str, bool]:
    """Parameter name, state key, and True if the value was a Python number."""
    name, _, key = entry.partition("/")
    key, _, number = key.partition(":")
    return name, key, bool(number)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refuse(what: str, entries: set[str], shown: int = 3) -> None:
    if entries:
        more = f" and {len(entries) - shown} more" if len(entries) > shown else ""
        raise ValueError(f"optimizer state {what}: {', '.join(sorted(entries)[:shown])}{more}")
