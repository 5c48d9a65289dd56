"""The trial of FlexAttention: where its kernels cannot be compiled, a mask takes their place and a notice says so."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtrain.model.layers import flex
from llmtrain.model.layers.attention import Kernel, alibi_slopes, attend, attention_mask, slow_attention_reason
from llmtrain.model.layers.flex import BlockwiseMask, HeadShape, flex_failure, flex_notice, missing_requirement

CPU = torch.device("cpu")
HEADS = HeadShape(4, 2, 16, torch.float32)


@pytest.fixture(autouse=True)
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_failures", {})


def scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockwiseMask) -> torch.Tensor:
    """In place of FlexAttention, whose backward pass torch refuses on a CPU before anything is compiled."""
    return (query.sum() * key.sum()) + value.sum()


def failing_compiler(error: Exception) -> Callable[..., Any]:
    """torch.compile with a compiler that ends as the ones for a GPU do."""
    compile_function = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        raise error

    return lambda function, **options: compile_function(function, backend=backend, **options)


ERRORS = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    subprocess.CalledProcessError(1, ["gcc", "main.c", "-O3"]),
    RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 147456"),
    ImportError("No module named 'triton'"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_mask_takes_the_place_of_kernels_that_cannot_be_compiled(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", failing_compiler(error))
    monkeypatch.setattr(flex, "_trial_loss", scores)
    starts = torch.tensor([[0] * 20 + [20] * 30])
    mask = attention_mask(50, 0, CPU, starts=starts, window=9, kernel=Kernel.flex, heads=HEADS)
    plain = attention_mask(50, 0, CPU, starts=starts, window=9)
    assert isinstance(mask, torch.Tensor)
    assert isinstance(plain, torch.Tensor)
    assert torch.equal(mask, plain)
    monkeypatch.setattr(torch, "compile", None)  # tried once
    assert isinstance(attention_mask(50, 0, CPU, starts=starts, kernel=Kernel.flex, heads=HEADS), torch.Tensor)
    notice = slow_attention_reason(torch.device("cuda"), torch.bfloat16)
    assert str(error).splitlines()[0][:50] in notice
    assert "more memory" in notice
    assert "\n" not in notice


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_device_without_free_memory_says_nothing_about_the_kernels(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(function: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            raise error

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(torch.OutOfMemoryError):
        flex_failure(HEADS, CPU, is_biased=False)
    assert flex_notice() == ""
    monkeypatch.setattr(torch, "compile", lambda function, **options: torch.nn.Identity())  # there is memory again
    monkeypatch.setattr(flex, "_trial_loss", None)
    assert flex_failure(HEADS, CPU, is_biased=False).startswith("TypeError")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("biased", [False, True])
def test_a_trial_that_passes_leaves_the_blocks(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(flex, "_trial_loss", scores)
    monkeypatch.setattr(flex, "_compiled_flex", lambda: flex.flex_attention)
    slopes = alibi_slopes(4) if biased else None
    starts = torch.zeros(1, 50, dtype=torch.int64)
    mask = attention_mask(50, 0, CPU, starts=starts, slopes=slopes, kernel=Kernel.flex, heads=HEADS)
    assert isinstance(mask, BlockwiseMask)
    query, key = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16)
    assert attend(query, key, key, mask).shape == query.shape
    assert slow_attention_reason(torch.device("cuda"), torch.bfloat16) == ""


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_requirement() == "the package triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert missing_requirement() == "a C compiler (gcc)"
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_paths", lambda *scheme: {"include": str(tmp_path)})
    assert missing_requirement().startswith("Python.h")
    (tmp_path / "Python.h").touch()
    assert missing_requirement() == ""


def test_a_plan_takes_the_mask_where_this_machines_gpu_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    missing = ""
    monkeypatch.setattr("llmtrain.model.layers.attention.missing_requirement", lambda: missing)
    with FakeTensorMode():
        starts = torch.zeros(1, 50, dtype=torch.int64)
        assert attention_mask(50, 0, CPU, starts=starts, kernel=Kernel.flex, heads=HEADS) is None
        missing = "a C compiler (gcc)"
        assert isinstance(attention_mask(50, 0, CPU, starts=starts, kernel=Kernel.flex, heads=HEADS), torch.Tensor)


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler itself, not a stand-in: Inductor for a CPU, which finds no g++."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(flex, "_trial_loss", scores)
    failure = flex_failure(HEADS, CPU, is_biased=False)
    assert "C++ compiler" in failure
    assert len(failure) <= flex.SHOWN_CHARACTERS
    assert flex_failure(HEADS, CPU, is_biased=False) is failure


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
def test_the_trial_passes_on_a_gpu_with_a_compiler(biased: bool) -> None:
    if missing_requirement():
        pytest.skip(f"needs {missing_requirement()}")
    heads = HeadShape(8, 2, 64, torch.bfloat16)
    assert flex_failure(heads, torch.device("cuda"), is_biased=biased) == ""
