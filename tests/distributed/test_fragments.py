"""Stretches of flattened parameters as boxes, and their way into checkpoints and back."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from llmtrain.base.places import Place
from llmtrain.checkpoint.format import temporary_of, write_checkpoint
from llmtrain.checkpoint.parts import model_parts, owned, placed, state_parts
from llmtrain.checkpoint.restore import read_state_parts
from llmtrain.distributed.fragments import Fragment, boxes

SHAPES = [(), (7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_of_every_stretch_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for begin, end in itertools.combinations(range(whole.numel() + 1), 2):
        found = boxes(shape, begin, end)
        parts = [whole[tuple(map(slice, offset, map(int.__add__, offset, size)))] for offset, size in found]
        assert torch.cat([part.reshape(-1) for part in parts]).tolist() == list(range(begin, end))
        assert len(found) <= max(2 * len(shape) - 1, 1)


def test_a_stretch_without_elements_has_no_box() -> None:
    assert boxes((3, 4), 5, 5) == []
    (place,) = Fragment(nn.Parameter(torch.empty(0)), 12, (3, 4)).places()
    assert place == Place((0, 0), (3, 4), True, (0, 0))


def fragment(whole: torch.Tensor, begin: int, end: int) -> Fragment:
    return Fragment(nn.Parameter(whole.flatten()[begin:end].clone()), begin, tuple(whole.shape))


@pytest.mark.parametrize("cuts", [(0, 5, 21), (0, 0, 21), (0, 7, 14, 21), (0, 1, 2, 20, 21)])
def test_ranks_write_each_element_once(cuts: tuple[int, ...]) -> None:
    """Beside padded rows, which no checkpoint has, and a moment of the same elements."""
    whole = torch.arange(21.0).view(7, 3)
    gathered = {"w": torch.zeros(6, 3), "w/exp_avg": torch.zeros(7, 3)}
    steps = 0
    for rank, (begin, end) in enumerate(itertools.pairwise(cuts)):
        own = fragment(whole, begin, end)
        places = {"w": tuple(Place(p.offset, p.whole, p.is_owner, p.shape, (6, 3)) for p in own.places())}
        model = {"w": own.local.detach()}
        state = {"w/step": torch.tensor(3.0), "w/exp_avg": 10 * own.local.detach()}
        parts = owned(model_parts(model, places, is_first=rank == 0))
        parts |= owned(state_parts(state, model, places, is_first=rank == 0))
        for part in parts.values():
            if part.name == "w/step":
                steps += 1
                continue
            view = gathered[part.name][tuple(map(slice, part.offset, map(int.__add__, part.offset, part.tensor.shape)))]
            assert not view.any() or part.offset == (0, 0)
            view.copy_(part.tensor)
    assert torch.equal(gathered["w"], whole[:6])
    assert torch.equal(gathered["w/exp_avg"], 10 * whole)
    assert steps == 1


def test_parts_are_views_of_the_flat_tensor() -> None:
    own = fragment(torch.arange(12.0).view(3, 4), 2, 11)
    for part, _ in placed("w", own.local, own.places()):
        part.tensor.zero_()
    assert not own.local.any()


def test_state_of_a_stretch_is_read_from_whole_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    path = tmp_path / "step-00000001"
    state = {"w/exp_avg": 2 * whole, "w/step": torch.tensor(5.0)}
    with temporary_of(path, 1000):
        pass
    write_checkpoint(path, model={"w": whole}, optimizer=state, state={"step": 1}, config="")
    own = fragment(whole, 3, 10)
    found = read_state_parts(path, {"w": own.local}, {"w": own.places()})
    assert torch.equal(found["w/exp_avg"], 2 * whole.flatten()[3:10])
    assert found["w/step"] == 5
