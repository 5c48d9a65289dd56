"""Output layer and loss as one operation: equal to the plain form, in a fraction of the memory."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.kernels import linear_cross_entropy as module
from llmtrain.kernels import row_losses
from llmtrain.kernels.linear_cross_entropy import (
    IGNORE,
    Chunking,
    Options,
    default_chunk,
    linear_cross_entropy,
)

TOKENS, HIDDEN, VOCABULARY, PADDED = 50, 16, 120, 128


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    bias = torch.zeros(PADDED, dtype=dtype)
    bias[VOCABULARY:] = -torch.inf
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[7:12] = IGNORE
    return hidden, weight, bias, targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and what the z-loss adds to it, from the logits."""
    logits = hidden @ weight.t()
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if bias is not None:
        logits = logits + bias
    log_sums = torch.logsumexp(logits, -1)[targets != IGNORE]
    return F.cross_entropy(logits, targets, reduction="sum"), options.z_loss * log_sums.square().sum()


@pytest.mark.parametrize("chunk_tokens", [1, 16, 50, 64])
@pytest.mark.parametrize(
    "options", [Options(), Options(softcap=5.0), Options(z_loss=1e-2), Options(softcap=5.0, z_loss=1e-2)], ids=str
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_equal_the_plain_form_in_float64(
    options: Options, chunk_tokens: int, has_bias: bool
) -> None:
    hidden, weight, bias, targets = inputs()
    some_bias = bias if has_bias else None
    loss = linear_cross_entropy(hidden, weight, some_bias, targets, options, Chunking(chunk_tokens))
    ours = torch.autograd.grad(0.37 * loss, (hidden, weight))
    cross_entropy, z_loss = plain(hidden, weight, some_bias, targets, options)
    reference = torch.autograd.grad(0.37 * (cross_entropy + z_loss), (hidden, weight))
    torch.testing.assert_close(loss, cross_entropy, rtol=1e-12, atol=0.0)  # the value is the cross-entropy alone
    for gradient, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("options", [Options(), Options(softcap=5.0, z_loss=1e-2)], ids=str)
@pytest.mark.parametrize("targets_are", ["some", "none"])
def test_the_way_of_a_gpu_equals_the_plain_form_in_float64(
    is_compiled: bool, options: Options, targets_are: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tensors of a CPU, with the form that is compiled there as it stands."""
    monkeypatch.setattr(module, "COMPILED_VOCABULARY", 2)
    monkeypatch.setattr(module, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(row_losses, "compiled_form", lambda: row_losses.losses_at_once)
    hidden, weight, bias, targets = inputs()
    if targets_are == "none":
        targets.fill_(IGNORE)
    chunking = Chunking(16, is_compiled=is_compiled)
    loss = linear_cross_entropy(hidden, weight, bias, targets, options, chunking)
    ours = torch.autograd.grad(0.37 * loss, (hidden, weight))
    cross_entropy, z_loss = plain(hidden, weight, bias, targets, options)
    reference = torch.autograd.grad(0.37 * (cross_entropy + z_loss), (hidden, weight))
    torch.testing.assert_close(loss, cross_entropy, rtol=1e-12, atol=0.0)
    for gradient, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-12)


def test_fp16_keeps_the_gradients_of_rare_classes() -> None:
    """A loss scale of 65,536 over half a million tokens is a factor of 0.13, which saves nothing from underflow."""
    tokens, width, vocabulary, scale = 48, 16, 50_000, 65_536 / 500_000
    generator = torch.Generator().manual_seed(0)
    # numbers that fp16 holds exactly: all that is rounded is the gradient of the logits
    hidden, weight = (
        (torch.randint(-2, 3, (rows, width), generator=generator) / part).requires_grad_()
        for rows, part in ((tokens, 1), (vocabulary, 8))
    )
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    *reference, of_logits = torch.autograd.grad(scale * loss, [*exact, logits])
    with torch.autocast("cpu", torch.float16):
        ours = torch.autograd.grad(
            scale * linear_cross_entropy(hidden, weight, None, targets, Options(), Chunking(16)), (hidden, weight)
        )
    rounded = of_logits.to(torch.float16).double()  # with the loss scale alone, as autocast would pass it on
    rare = torch.ones(vocabulary, dtype=torch.bool)
    rare[targets] = False
    theirs = (rounded @ exact[1], rounded.t() @ exact[0])
    of_rare = [(ours[0], theirs[0], reference[0]), (ours[1][rare], theirs[1][rare], reference[1][rare])]
    for our, their, expected in of_rare:
        errors = [((gradient.double() - expected).norm() / expected.norm()).item() for gradient in (our, their)]
        assert errors[0] < min(3e-4, 0.2 * errors[1])


def test_the_operation_for_the_compiler_has_the_same_results() -> None:
    hidden, weight, bias, targets = inputs(torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(hidden, weight, bias, targets, Options(softcap=5.0), Chunking(16))

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")
    expected, ours = (torch.autograd.grad(0.37 * form(hidden, weight), (hidden, weight)) for form in (loss, compiled))
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("for_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operation_describes_its_results(dtype: torch.dtype, for_weight: bool) -> None:
    hidden, weight, bias, targets = (tensor.detach() for tensor in inputs(torch.float32))
    arguments = (hidden, weight, bias, targets, None, 0.0, 16, False, dtype, True, for_weight)
    torch.library.opcheck(
        torch.ops.llmtrain.linear_cross_entropy.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_a_token_without_a_target_adds_nothing() -> None:
    hidden, weight, bias, targets = inputs()
    linear_cross_entropy(hidden, weight, bias, targets, Options(z_loss=0.1), Chunking(16)).backward()
    whole = weight.grad
    assert torch.equal(hidden.grad[7:12], torch.zeros(5, HIDDEN, dtype=torch.float64))
    valid = targets != IGNORE
    weight.grad = None
    linear_cross_entropy(hidden[valid], weight, bias, targets[valid], Options(z_loss=0.1), Chunking(16)).backward()
    torch.testing.assert_close(weight.grad, whole, rtol=1e-12, atol=1e-14)
    none = torch.full_like(targets, IGNORE)
    assert linear_cross_entropy(hidden, weight, bias, none, Options(), Chunking(16)).item() == 0.0


def test_a_target_of_no_probability_has_a_finite_loss() -> None:
    weight = torch.tensor([[200.0], [0.0]])
    loss = linear_cross_entropy(torch.ones(1, 1), weight, None, torch.tensor([1]), Options(), Chunking())
    assert loss.item() == 200.0  # its probability, e^-200, is 0 in fp32


def test_bf16_is_as_exact_as_the_plain_form() -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected, _ = plain(*exact, bias.double(), targets, Options())
    reference = torch.autograd.grad(expected, exact)

    def errors(loss: Tensor) -> list[float]:
        gradients = torch.autograd.grad(loss, (hidden, weight))
        pairs = zip(gradients, reference, strict=True)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, bias, targets, Options(), Chunking(16))
        logits = F.linear(hidden, weight, bias).float()
        theirs = F.cross_entropy(logits, targets, reduction="sum")
    assert abs(ours.item() / expected.item() - 1) < 5e-3
    for our_error, their_error in zip(errors(ours), errors(theirs), strict=True):
        assert our_error < 1.2 * their_error < 0.02


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, bias, targets, Options(), Chunking(16))
    assert not loss.requires_grad
    # a frozen output layer
    loss = linear_cross_entropy(hidden, weight.detach(), bias, targets, Options(), Chunking(16))
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected, _ = plain(hidden, weight, bias, targets, Options())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], rtol=0.0, atol=1e-12)


def test_chunks_are_of_some_hundred_megabytes() -> None:
    assert default_chunk(50304, torch.bfloat16, "cpu") == 2048
    assert default_chunk(50304, torch.float32, "cpu") == 1024
    assert default_chunk(50304, torch.bfloat16, "cuda") == 8192
    assert default_chunk(1 << 30, torch.float32, "cpu") == 16


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_a_gpu_is_as_exact_as_its_dtype(dtype: torch.dtype, tolerance: float, is_compiled: bool) -> None:
    """In three chunks, the last of them smaller: products in fp32, added in place."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        (scale * torch.randn(rows, 64, device="cuda", generator=generator)).to(dtype).float().requires_grad_()
        for rows, scale in ((300, 1.0), (8192, 0.1))
    )
    targets = torch.randint(0, 8192, (300,), device="cuda", generator=generator)
    targets[7:12] = IGNORE
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected, _ = plain(*exact, None, targets, Options())
    with torch.autocast("cuda", dtype):
        loss = linear_cross_entropy(hidden, weight, None, targets, Options(), Chunking(128, is_compiled=is_compiled))
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for gradient, reference in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient.double() - reference).norm() < tolerance * reference.norm()
    assert not row_losses.compiled_form().failure


@pytest.mark.gpu
def test_the_loss_is_part_of_a_cuda_graph() -> None:
    hidden, weight = (torch.randn(rows, 64, device="cuda", requires_grad=True) for rows in (300, 8192))
    targets = torch.randint(0, 8192, (300,), device="cuda")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return linear_cross_entropy(hidden, weight, None, targets, Options(), Chunking(128, is_compiled=True))

    graphed = torch.compile(loss, fullgraph=True, dynamic=False, mode="reduce-overhead")
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for _ in range(4):  # warms up, records, plays
        torch.compiler.cudagraph_mark_step_begin()
        ours = torch.autograd.grad(graphed(hidden, weight), (hidden, weight))
        assert all(map(torch.equal, ours, expected))


PEAK = """
import sys, torch
from llmtrain.kernels.linear_cross_entropy import Chunking, Options, linear_cross_entropy
torch.set_num_threads(1)

def peak():  # kilobytes; of this process alone, which getrusage is not
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

tokens, is_plain = int(sys.argv[1]), sys.argv[2] == "plain"
hidden = torch.randn(tokens, 8, requires_grad=True)
weight = torch.randn(4096, 8, requires_grad=True)
targets = torch.zeros(tokens, dtype=torch.long)
before = peak()
if is_plain:
    loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
else:
    loss = linear_cross_entropy(hidden, weight, None, targets, Options(), Chunking(512))
loss.backward()
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_whole_logits_are_never_in_memory() -> None:
    def peak(tokens: int, form: str) -> int:
        command = [sys.executable, "-c", PEAK, str(tokens), form]
        # what is freed goes back at once: else glibc keeps some blocks or not, as it happens
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    logits = 4096 * 4  # bytes a token in fp32
    few, many = peak(2048, "fused"), peak(8 * 2048, "fused")
    assert many - few < 0.1 * 7 * 2048 * logits
    assert peak(8 * 2048, "plain") > 8 * 2048 * logits
