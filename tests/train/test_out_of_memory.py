"""Retries with smaller batches when memory runs out."""

import pytest
import torch

from llmtrain.train.out_of_memory import halve_on_out_of_memory, is_out_of_memory


def test_sizes_are_halved_until_it_fits() -> None:
    tried, noted = [], []

    def work(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError(f"no room for {size}\nand more")
        return f"done with {size}"

    result = halve_on_out_of_memory(work, 11, lambda size, message: noted.append((size, message)))
    assert result == "done with 2"
    assert tried == [11, 6, 3, 2]
    assert noted == [(6, "no room for 11"), (3, "no room for 6"), (2, "no room for 3")]


def test_a_single_sequence_that_does_not_fit_is_an_error() -> None:
    def work(size: int) -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        halve_on_out_of_memory(work, 4)


def test_other_errors_are_not_caught() -> None:
    def work(size: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        halve_on_out_of_memory(work, 4)


def test_torchs_error_without_memory_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
