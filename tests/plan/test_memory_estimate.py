"""The traced step against formulas, against extrapolation, and against a real run."""

import ctypes
import platform
import statistics
import threading

import numpy as np
import pytest
import torch

from llmtrain import Run
from llmtrain.base.host_memory import ALIGNMENT
from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.snapshot import layouts_of
from llmtrain.config.assemble import assemble
from llmtrain.kernels.linear_cross_entropy import default_chunk
from llmtrain.objective import mean_losses
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.extrapolation import IrregularBlocks, aligned
from llmtrain.plan.memory import Phase, at_micro_batch, estimate
from llmtrain.plan.trace import Category, trace_step
from llmtrain.train.rehearsal import made_up_batch

CPU = torch.device("cpu")
SMALL = ("model=tiny", "tokenizer=byte", "data.sequence_length=64", "precision=fp32")


def blueprint(*overrides: str, vocab_size: int = 257) -> Blueprint:
    run = Run.compose(*overrides)
    return Blueprint(run, vocab_size, run.precision.build(CPU), run.accumulation.batch_size_at(0, 0))


def largest(trace_of: Blueprint, layers: int | None = None) -> dict[str, int]:
    """The categories at the peak of a full trace, as on a GPU."""
    timeline = trace_step(trace_of, layers, planned_for="cuda").timeline()
    rows = max(timeline, key=lambda rows: rows.sum(axis=1).max())
    return {category.name: int(rows[rows.sum(axis=1).argmax()][category]) for category in Category}


def test_weights_gradients_and_state_of_adamw() -> None:
    # 257 bytes are padded to 320 rows: 35,744 parameters + 63 * 32, and 320 values that hide the padding
    trace = trace_step(blueprint(*SMALL))
    update = next(rows for span, rows in zip(trace.spans, trace.timeline(), strict=True) if span.phase is Phase.update)
    parameters = 35_744 + 63 * 32
    assert update[:, Category.weights].max() == 4 * (parameters + 320)
    assert update[:, Category.gradients].max() == 4 * parameters
    assert update[:, Category.optimizer].max() == 8 * parameters + 4 * 28  # two moments, and a step count a tensor


def test_lion_has_half_of_the_state_and_a_temporary_update() -> None:
    trace = trace_step(blueprint(*SMALL, "optimizer=lion"))
    update = trace.timeline()[-1]
    assert update[:, Category.optimizer].max() == 4 * (35_744 + 63 * 32)
    # the update is a temporary, and what the gradients become
    assert update[:, Category.temporary].max() > 0.9 * 4 * (35_744 + 63 * 32)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("precision=bf16",),
        ("optimizer=muon",),
        ("accumulation.micro_batch_size=4",),
        ("activation_checkpointing=full",),
        ("activation_checkpointing=selective",),
        ("activation_checkpointing=selective", "activation_checkpointing.by=block", "activation_checkpointing.every=3"),
    ],
)
def test_deep_models_are_extrapolated_exactly(overrides: tuple[str, ...]) -> None:
    deep = blueprint(*SMALL, "model.num_layers=8", *overrides)
    memory = estimate(deep, gpu=True)
    exact = largest(deep)
    for category, num_bytes in exact.items():
        assert memory.parts[category] == pytest.approx(num_bytes, rel=0.01, abs=2000), category


def test_differing_stretches_cannot_be_aligned() -> None:
    assert aligned(list("habbe"), list("habbbe")) == (3, 1)
    with pytest.raises(IrregularBlocks):
        aligned(list("hae"), list("habe"))  # another kind of block
    with pytest.raises(IrregularBlocks):
        aligned(list("hae"), list("hxae"))


def test_activations_grow_with_the_micro_batch_and_shrink_with_recomputation() -> None:
    deep = blueprint(*SMALL, "model.num_layers=8", "accumulation.batch_size=32", "accumulation.micro_batch_size=32")
    whole = estimate(deep, gpu=True)
    half = estimate(at_micro_batch(deep, 16), gpu=True)
    assert half.parts["activations"] == pytest.approx(whole.parts["activations"] / 2, rel=0.1)
    recomputed = blueprint(*SMALL, "model.num_layers=8", "accumulation.batch_size=32",
                           "accumulation.micro_batch_size=32", "activation_checkpointing=full")  # fmt: skip
    assert estimate(recomputed, gpu=True).parts["activations"] < whole.parts["activations"] / 4


def test_attention_is_the_fused_kernel_and_keeps_no_matrix_of_scores() -> None:
    length = 2048
    long = blueprint(*SMALL[:2], "precision=fp32", f"model.context_length={length}", f"data.sequence_length={length}",
                     "accumulation.batch_size=1", "accumulation.micro_batch_size=1")  # fmt: skip
    scores = 4 * 2 * length * length  # of one layer: two heads
    assert estimate(long, gpu=True).parts["activations"] < scores


def test_the_loss_is_cut_as_on_the_device_planned_for() -> None:
    """Though the step is traced here: a GPU takes more tokens at once, and makes no second tensor of their logits."""
    tokens, vocabulary = 8 * 1024, 50304
    large = blueprint("model=tiny", "model.context_length=1024", "precision=bf16", vocab_size=50257)
    for device, most in (("cpu", 2.2), ("cuda", 1.0)):
        logits = max(int(rows[:, Category.logits].max()) for _, rows in phases(large, device == "cuda"))
        least = min(default_chunk(vocabulary, torch.bfloat16, device), tokens) * vocabulary * 2
        assert least <= logits <= most * least


def test_an_uncompiled_loss_on_a_gpu_takes_blocks_in_fp32_too() -> None:
    vocabulary = 50304
    overrides = ("model=tiny", "model.context_length=1024", "precision=bf16")
    compiled, plain = (
        max(
            int(rows[:, Category.logits].max())
            for _, rows in phases(blueprint(*overrides, more, vocab_size=50257), True)
        )
        for more in ("runtime.compile=auto", "runtime.compile=false")
    )
    rows = (1 << 28) // (4 * vocabulary)
    assert compiled + rows * vocabulary * 4 <= plain < compiled + 3 * rows * vocabulary * 4


def phases(blueprint: Blueprint, gpu: bool) -> list[tuple[Phase, np.ndarray]]:
    trace = trace_step(blueprint, planned_for="cuda" if gpu else "cpu")
    return [(span.phase, rows) for span, rows in zip(trace.spans, trace.timeline(), strict=True)]


def test_a_copy_for_checkpoints_is_host_memory_of_the_size_that_a_run_takes_for_it() -> None:
    small = blueprint(*SMALL)
    on_cpu, on_gpu = (estimate(small, gpu=gpu, copied=True) for gpu in (False, True))
    step = small.build()
    model, optimizer = saved_tensors(step.unit), state_tensors(step.optimizer)
    taken = sum(layout.num_bytes for layout in layouts_of({"model": model, "optimizer": optimizer}).values())
    scalars = sum(tensor.ndim == 0 for tensor in optimizer.values())  # they take as much as the alignment
    assert 0 <= taken - on_gpu.host <= ALIGNMENT * scalars < 0.01 * taken
    assert on_cpu.parts["checkpoint copy"] == on_gpu.host
    assert "checkpoint copy" not in on_gpu.parts


class Malloc(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def in_use() -> int:
    """Bytes that malloc has given out."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Malloc
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
@pytest.mark.parametrize(
    "overrides",
    [
        ("precision=fp32",),
        ("precision=bf16",),
        ("precision=fp32", "activation_checkpointing=full"),
        ("precision=fp32", "activation_checkpointing=selective"),
        ("precision=fp32", "tokenizer=gpt2", "accumulation.batch_size=4", "accumulation.micro_batch_size=4"),
    ],
)
def test_the_estimate_is_what_malloc_gives_a_real_step(overrides: tuple[str, ...]) -> None:
    """Against what malloc has given out during a real forward and backward pass, some 50 MB."""
    run = Run.compose("model=laptop_gpt2", "tokenizer=byte", "data.sequence_length=256", "accumulation.batch_size=6",
                      "accumulation.micro_batch_size=6", *overrides)  # fmt: skip
    parts = assemble(run, CPU)
    size = run.accumulation.micro_batch_size
    batch = made_up_batch(run.objective, size, 256, is_packed=False)
    parts.unit.train()

    def measured() -> int:
        """The most that a step takes beyond what there is before."""
        parts.optimizer.zero_grad(set_to_none=True)
        before, most, ended = in_use(), [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.0005):
                most[0] = max(most[0], in_use())

        watcher = threading.Thread(target=watch)
        watcher.start()
        with parts.precision.autocast():
            loss, _ = mean_losses(parts.unit, batch)
        loss.backward()
        ended.set()
        watcher.join()
        return most[0] - before

    measured()  # makes what the libraries keep for good
    taken = statistics.median(measured() for _ in range(3))
    trace = trace_step(Blueprint(run, run.vocab_size(parts.tokenizer), run.precision.build(CPU), size))
    rows = [rows for span, rows in zip(trace.spans, trace.timeline(), strict=True) if span.phase in (
        Phase.forward, Phase.backward)]  # fmt: skip
    held = trace.timeline()[0].sum(axis=1).max()
    traced = max(part.sum(axis=1).max() for part in rows) - held
    assert traced == pytest.approx(taken, rel=0.1)
