"""The division of layers over the stages of a pipeline."""

import random
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest

from llmtrain.distributed.stages import NOTHING, Cost, Division, layer_costs, split_layers, tied_weight
from tests.distributed.tensor_cases import make_unit


def lengths(found: tuple[range, ...]) -> list[int]:
    return [len(blocks) for blocks in found]


def test_equal_blocks_are_divided_evenly() -> None:
    block = Cost(10, 5)
    assert split_layers([block] * 12, 4) == (range(3), range(3, 6), range(6, 9), range(9, 12))
    assert sorted(lengths(split_layers([block] * 10, 4))) == [2, 2, 3, 3]
    assert split_layers([block] * 3, 3) == (range(1), range(1, 2), range(2, 3))


def test_a_stage_with_the_output_layer_has_fewer_blocks() -> None:
    found = split_layers([Cost(10, 5)] * 8, 2, last=Cost(40, 20))
    assert lengths(found) == [6, 2]
    assert lengths(split_layers([Cost(10, 5)] * 4, 2, last=Cost(1000, 500))) == [3, 1]


def test_parameters_decide_between_divisions_that_are_as_fast() -> None:
    embedding = Cost(0, 100)  # looked up: no time
    assert lengths(split_layers([Cost(10, 50)] * 5, 2, first=embedding)) == [2, 3]
    assert lengths(split_layers([Cost(10, 50)] * 5, 2, last=embedding)) == [3, 2]


def divisions(blocks: int, stages: int) -> Iterator[list[tuple[int, int]]]:
    for cuts in combinations(range(1, blocks), stages - 1):
        yield list(pairwise([0, *cuts, blocks]))


@pytest.mark.parametrize("seed", range(20))
def test_no_division_is_faster(seed: int) -> None:
    draw = random.Random(seed)
    blocks = [Cost(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(4, 9))]
    stages, first, last = draw.randint(2, 4), Cost(draw.randint(0, 20), 30), Cost(draw.randint(0, 20), 30)

    def peaks(division: list[tuple[int, int]]) -> tuple[float, float]:
        sums = [[sum(cost[kind] for cost in blocks[begin:end]) for begin, end in division] for kind in (0, 1)]
        for kind in (0, 1):
            sums[kind][0] += first[kind]
            sums[kind][-1] += last[kind]
        return max(sums[0]), max(sums[1])

    found = [(part.start, part.stop) for part in split_layers(blocks, stages, first=first, last=last)]
    assert peaks(found) == min(map(peaks, divisions(len(blocks), stages)))


def test_costs_count_every_parameter_once_and_tied_ones_on_both_ends() -> None:
    for tied in (False, True):
        unit = make_unit(family="tiny", tie_embeddings=tied, num_layers=3)
        blocks, first, last = layer_costs(unit)
        whole = sum(weight.numel() for _, weight in unit.named_weights())
        twice = unit.model.get_parameter("token_embedding.weight").numel() if tied else 0
        assert sum(cost.parameters for cost in (*blocks, first, last)) == whole + twice
        assert len(blocks) == 3
        assert len(set(blocks)) == 1
        assert first.flops == NOTHING.flops
        assert last.flops == 2 * 128 * 32  # the output layer, with its padding
        assert tied_weight(unit) == ("token_embedding.weight" if tied else None)


def test_stages_go_round_the_processes() -> None:
    division = Division((range(2), range(2, 3), range(3, 4), range(4, 6)), 2, "token_embedding.weight")
    assert [list(division.stages_on(rank)) for rank in (0, 1)] == [[0, 2], [1, 3]]
    assert division.holders("token_embedding.weight", 0) == (0, 3)
    assert division.holders("position_embedding.weight", 0) == (0,)
    assert [division.holders("", depth) for depth in range(1, 8)] == [(0,), (0,), (1,), (2,), (3,), (3,), (3,)]
