"""Losses of rows of logits: both forms equal to torch's in float64, and a way out where nothing can be compiled."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.kernels import row_losses
from llmtrain.kernels.row_losses import IGNORE, CompiledForm, Options, RowWork, compiled_form, losses_at_once

ROWS, VOCABULARY, PADDED = 24, 120, 128
PLAIN = Options()
Form = Callable[[Tensor, Tensor | None, Tensor, RowWork], Tensor | None]
OPTIONS = [Options(), Options(softcap=5.0), Options(z_loss=1e-2), Options(softcap=5.0, z_loss=1e-2)]


def work_of(options: Options = PLAIN, *, compiled: bool = True, differentiate: bool = True, factor: float = 1.0,
            device: str = "cuda") -> RowWork:  # fmt: skip
    return RowWork(options, differentiate, factor, device, compiled, is_traced=False)


def inputs(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, PADDED, dtype=torch.float64, generator=generator)
    bias = torch.zeros(PADDED, dtype=torch.promote_types(dtype, torch.float32))
    bias[VOCABULARY:] = -torch.inf
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[3:6] = IGNORE
    return logits.to(dtype), bias, targets


def reference(logits: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The losses of rows with a target, 0 elsewhere, and the gradient; float64."""
    exact = logits.double().requires_grad_()
    x = exact if options.softcap is None else options.softcap * torch.tanh(exact / options.softcap)
    x = x if bias is None else x + bias.double()
    losses = F.cross_entropy(x, targets, reduction="none")
    penalty = options.z_loss * (x.logsumexp(-1)[targets != IGNORE]).square().sum()
    return losses.detach(), torch.autograd.grad(losses.sum() + penalty, exact)[0]


def losses_and_gradient(
    form: Form, logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork
) -> tuple[Tensor, Tensor]:
    written = logits.clone()
    losses = form(written, bias, targets, work)
    assert losses is not None
    return torch.where(targets == IGNORE, 0.0, losses), written


@pytest.mark.parametrize("form", [losses_at_once, row_losses._losses_in_blocks], ids=["at once", "in blocks"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_both_forms_for_a_gpu_equal_torch_in_float64(form: Form, options: Options, has_bias: bool) -> None:
    logits, padding, targets = inputs()
    bias = padding if has_bias else None
    losses, gradient = losses_and_gradient(form, logits, bias, targets, work_of(options))
    expected, expected_gradient = reference(logits, bias, targets, options)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0.0, atol=1e-14)
    assert not gradient[3:6].any()  # exactly: rows without a target are not masked again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    logits, bias, targets = inputs(dtype)
    losses, gradient = losses_and_gradient(losses_at_once, logits, bias, targets, work_of())
    expected, expected_gradient = reference(logits, bias, targets, Options())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    half_a_digit = torch.finfo(dtype).eps / 2 + 2e-6
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((gradient.double() - expected_gradient).abs() <= half_a_digit * expected_gradient.abs() + smallest).all()


@pytest.mark.parametrize("form", [losses_at_once, row_losses._losses_in_blocks], ids=["at once", "in blocks"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_factor_saves_small_probabilities_from_fp16(form: Form, device: str) -> None:
    logits = torch.tensor([[0.0, -10.0, -20.0, -22.0]], dtype=torch.float16)
    expected = logits.double().softmax(1) - torch.eye(4)[:1]
    for factor, is_kept in ((1.0, False), (1024.0, True)):
        work = work_of(factor=factor, compiled=False, device=device)
        _, gradient = losses_and_gradient(form, logits, None, torch.tensor([0]), work)
        torch.testing.assert_close(gradient.double() / factor, expected, rtol=1e-3, atol=3.1e-8 / factor)
        assert (gradient[0, 2:] != 0).all() == is_kept


def test_rows_without_any_target_have_no_gradient() -> None:
    logits, bias, targets = inputs(torch.bfloat16)
    losses, gradient = losses_and_gradient(losses_at_once, logits, bias, torch.full_like(targets, IGNORE), work_of())
    assert not losses.any()
    assert not gradient.any()


def test_a_certain_class_has_a_loss_that_is_not_rounded_to_zero() -> None:
    logits = torch.tensor([[30.0, 15.0, -20.0]])
    loss = losses_at_once(logits, None, torch.tensor([0]), work_of(differentiate=False))
    assert loss.item() == pytest.approx(3.06e-7, rel=0.25)  # exp(-15): 30 + it is 30 in fp32


def test_without_gradients_the_logits_stay() -> None:
    logits, bias, targets = inputs(torch.bfloat16)
    _, written = losses_and_gradient(losses_at_once, logits, bias, targets, work_of(differentiate=False))
    assert torch.equal(written, logits)


# --- compilation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_form() -> Iterator[CompiledForm]:
    compiled_form.cache_clear()
    yield compiled_form()
    compiled_form.cache_clear()


def test_one_compilation_serves_any_number_of_rows(fresh_form: CompiledForm, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(row_losses._losses_or_blocks, fullgraph=True, backend=backend)
    monkeypatch.setattr(row_losses, "compile_for_any_rows", lambda: compiled)
    for rows in (24, 7, 2, 1, PADDED, 24):
        logits, bias, targets = inputs(rows=rows)
        with torch.no_grad():
            result = losses_and_gradient(row_losses.row_losses, logits, bias, targets, work_of())
        for ours, expected in zip(result, reference(logits, bias, targets, Options()), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert len(graphs) == 1
    assert not fresh_form.failure
    logits, bias, targets = inputs()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the form that needs little memory
        monkeypatch.setattr(row_losses, "losses_at_once", None)
        losses_and_gradient(row_losses.row_losses, logits, bias, targets, work_of())
    assert not fresh_form.failure


def test_where_nothing_can_be_compiled_torchs_operations_are_taken_and_said_so_once(
    fresh_form: CompiledForm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(row_losses, "compile_for_any_rows", lambda: failing)
    logits, bias, targets = inputs()
    with caplog.at_level(logging.WARNING, "llmtrain"):
        for _ in range(3):
            result = losses_and_gradient(row_losses.row_losses, logits, bias, targets, work_of())
    for ours, expected in zip(result, reference(logits, bias, targets, Options()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("(RuntimeError: Failed to find C compiler. Please specify via CC environment "
                                       "variable.)")  # fmt: skip


def test_running_out_of_memory_is_no_reason_to_do_without_the_kernel(
    fresh_form: CompiledForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(row_losses, "compile_for_any_rows", lambda: failing)
    with pytest.raises(torch.OutOfMemoryError):
        row_losses.row_losses(*inputs(), work_of())
    assert not fresh_form.failure


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_compiled_kernel_equals_torch_and_takes_no_memory(fresh_form: CompiledForm, options: Options) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    rows, vocabulary = 512, 50304
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16, generator=generator)
    bias = torch.zeros(vocabulary, device="cuda")
    bias[50257:] = -torch.inf
    targets = torch.randint(0, 50257, (rows,), device="cuda", generator=generator)
    targets[:100] = IGNORE
    work = work_of(options)
    with torch.no_grad():
        row_losses.row_losses(logits.clone(), bias, targets, work)  # compiles
        written = logits.clone()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses = row_losses.row_losses(written, bias, targets, work)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert not fresh_form.failure
    expected, gradient = reference(logits, bias, targets, options)
    torch.testing.assert_close(torch.where(targets == IGNORE, 0.0, losses).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written.double(), gradient, rtol=2.0**-8, atol=1e-9)
