"""8-bit matrix products against float64, with bounds that follow from the formats.

A number in e4m3 has 3 bits behind the leading one, in e5m2 2: rounding changes it by at most 2^-4 and 2^-3 of itself,
or, below the smallest normal number (2^-6, 2^-14 times the scale), by half a subnormal step (2^-10, 2^-17 times it).
"""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.activation_checkpointing.full import Full
from llmtrain.activation_checkpointing.selective import By, Selective
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.precision import Residual, fp8_linear
from llmtrain.precision.fp8 import FP8, FP8Precision
from llmtrain.precision.fp8_linear import E4M3, E5M2, Fp8Linear, Recipe, convert, find_scale, quantise
from llmtrain.train.step import Step
from tests.helpers.batches import batch_of
from tests.helpers.cli import TINY, llmtrain
from tests.helpers.units import as_unit

CPU = torch.device("cpu")
RELATIVE = {E4M3: 2**-4, E5M2: 2**-3}
SUBNORMAL = {E4M3: 2**-10, E5M2: 2**-17}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))


def tensor(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


def has_row_scales() -> bool:
    """Return whether this torch multiplies by row scales on a CPU: 2.11 does not."""
    a, scale = torch.ones(16, 16).to(E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(a, a.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.fixture(autouse=True)
def _products_on_a_cpu() -> None:
    if not torch.cuda.is_available() and not has_row_scales():
        pytest.skip("this torch has no fp8 products with row scales on a CPU")


def rounding(x: Tensor, dtype: torch.dtype, recipe: Recipe, dim: int) -> Tensor:
    """By how much each number of ``x`` may be off, summed over along ``dim``; in float64."""
    x = x.double().abs()
    scale = x.amax() / LARGEST[dtype]
    if recipe is Recipe.rowwise:
        scale = 2 * x.amax(dim, keepdim=True) / LARGEST[dtype]  # the next power of two is less than twice as large
    return torch.maximum(RELATIVE[dtype] * x, SUBNORMAL[dtype] * scale)


def bound(a: Tensor, error_a: Tensor, b: Tensor, error_b: Tensor) -> Tensor:
    """By how much ``a @ b`` may be off where the factors are."""
    a, b = a.double().abs(), b.double().abs()
    return error_a @ b + a @ error_b + error_a @ error_b


def assert_within(found: Tensor, exact: Tensor, errors: Tensor) -> None:
    """Within what rounding of the factors explains, and of the result (bf16: 2^-8), and of the fp32 sums."""
    error = (found.double() - exact).abs()
    assert (error <= 1.001 * errors + 2**-8 * exact.abs() + 1e-12 * exact.abs().max()).all()
    assert error.max() > 0  # it was computed in few bits


def make(hidden_size: int = 64, **changes: float) -> LanguageModel:
    config = GPTConfig(**({
        "num_layers": 2, "hidden_size": hidden_size, "num_heads": 2, "context_length": 32, "vocab_size": None,
        "dropout": 0.0, "qkv_bias": True, "tie_embeddings": True, "logit_softcap": None,
        "initialisation": Initialisation.gpt2,
    } | changes))  # fmt: skip
    return config.create(64, CPU, NamedGenerators(0))


# --- one number --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "in_e4m3", "in_e5m2"),
    [
        (1.0, 1.0, 1.0), (1.0625, 1.0, 1.0), (1.07, 1.125, 1.0), (1.13, 1.125, 1.25), (-300.0, -288.0, -320.0),
        (440.0, 448.0, 448.0), (500.0, 448.0, 512.0), (1e6, 448.0, 57344.0), (2**-10 * 1.1, 2**-9, 2**-10),
        (2**-11, 0.0, 2**-11),
    ],
)  # fmt: skip
def test_a_number_goes_to_the_nearest_and_saturates(number: float, in_e4m3: float, in_e5m2: float) -> None:
    x, one = torch.tensor([[number]]), torch.tensor(1.0)
    assert quantise(x, one, E4M3).float().item() == in_e4m3
    assert quantise(x, one, E5M2).float().item() == in_e5m2


def test_the_largest_magnitude_comes_to_the_largest_number() -> None:
    x = torch.tensor([[1.0, -14.0], [0.25, 0.5], [0.0, 0.0]])
    scale = find_scale(x, E4M3, Recipe.tensorwise)
    assert scale.item() == pytest.approx(14 / 448)
    assert quantise(x, scale, E4M3).float().tolist() == [[32.0, -448.0], [8.0, 16.0], [0.0, 0.0]]
    by_row = find_scale(x, E4M3, Recipe.rowwise)
    assert by_row[:2].tolist() == [[2**-5], [2**-9]]  # 14 / 448 = 2^-5; 0.5 / 448 is just below 2^-9
    assert quantise(x, by_row, E4M3).float().tolist() == [[32.0, -448.0], [128.0, 256.0], [0.0, 0.0]]


@pytest.mark.parametrize("recipe", Recipe)
def test_nonfinite_numbers_stay_nonfinite_in_fp8(recipe: Recipe) -> None:
    for number in (torch.nan, torch.inf):
        layer = Fp8Linear(nn.Linear(16, 16), recipe)
        x = torch.ones(16, 16)
        x[3, 5] = number
        assert not layer(x)[3].isfinite().any()


# --- the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 32), (5, 7)])  # the last: 35 rows, no multiple of 16
@pytest.mark.parametrize("recipe", Recipe)
def test_all_three_products_are_within_their_bounds(recipe: Recipe, shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(96, 48, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(tensor(48, 96, seed=1))
    layer = Fp8Linear(linear, recipe)
    x = tensor(*shape, 96, seed=2).requires_grad_()
    gradient = tensor(*shape, 48, seed=3)
    y = layer(x)
    y.backward(gradient)
    a, w, g = x.detach().flatten(0, -2), layer.weight.detach(), gradient.flatten(0, -2)
    of_g = E5M2 if recipe is Recipe.tensorwise else E4M3
    assert_within(
        y.detach().flatten(0, -2), F.linear(a.double(), w.double(), layer.bias.double() if bias else None),
        bound(a, rounding(a, E4M3, recipe, 1), w.t(), rounding(w, E4M3, recipe, 1).t()),
    )  # fmt: skip
    assert_within(
        x.grad.flatten(0, -2), g.double() @ w.double(),
        bound(g, rounding(g, of_g, recipe, 1), w, rounding(w, E4M3, recipe, 0)),
    )  # fmt: skip
    assert_within(
        layer.weight.grad, g.double().t() @ a.double(),
        bound(g.t(), rounding(g, of_g, recipe, 0).t(), a, rounding(a, E4M3, recipe, 0)),
    )  # fmt: skip
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), g.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", Recipe)
def test_errors_of_products_are_typical_of_fp8(recipe: Recipe) -> None:
    """Over all of a product of normal numbers: some 2.6% from each factor in e4m3, 5.2% from one in e5m2."""
    layer = Fp8Linear(nn.Linear(256, 256, bias=False), recipe)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    y.backward(g)
    w = layer.weight.detach().double()
    exact = (x.detach().double() @ w.t(), g.double() @ w, g.double().t() @ x.detach().double())
    for found, expected, limit in zip((y, x.grad, layer.weight.grad), exact, (0.045, 0.07, 0.07), strict=True):
        relative = (found.double() - expected).norm() / expected.norm()
        assert 0.02 < relative < limit


def test_rowwise_scales_keep_rows_of_very_different_size() -> None:
    """What a scale for each row is for: with one for all, small rows are lost."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[:16] *= 1e-6
    linear = nn.Linear(64, 64, bias=False)
    exact = F.linear(x, linear.weight)[:16]
    errors = {recipe: ((Fp8Linear(linear, recipe)(x)[:16] - exact).norm() / exact.norm()).item() for recipe in Recipe}
    assert errors[Recipe.rowwise] < 0.05
    assert errors[Recipe.tensorwise] > 0.9


@pytest.mark.parametrize("recipe", Recipe)
def test_fp8_layers_give_bf16_and_fp32_gradients_under_autocast(recipe: Recipe) -> None:
    layer = Fp8Linear(nn.Linear(32, 16), recipe)
    x = torch.randn(2, 16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # as any layer
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("recipe", Recipe)
def test_frozen_parts_get_no_gradient(recipe: Recipe) -> None:
    layer = Fp8Linear(nn.Linear(32, 16), recipe)
    layer.weight.requires_grad_(False)
    x = torch.randn(16, 32, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_backward_keeps_a_byte_a_number() -> None:
    layer = Fp8Linear(nn.Linear(64, 64), Recipe.tensorwise)
    layer.hold()
    held, saved = {buffer.data_ptr() for buffer in layer.buffers()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(32, 64))
    assert sorted(t.nbytes for t in saved if t.data_ptr() not in held) == [4, 32 * 64]


@pytest.mark.parametrize("recipe", Recipe)
def test_the_rows_are_filled_up_to_a_multiple_of_16(recipe: Recipe) -> None:
    """The gradient of the weight sums over them, and the tensor cores sum over multiples of 16 alone."""
    layer, shapes = Fp8Linear(nn.Linear(64, 32), recipe), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        assert layer(torch.randn(5, 7, 64)).shape == (5, 7, 32)
    assert (48, 64) in shapes


@pytest.mark.parametrize("recipe", Recipe)
def test_a_held_weight_gives_the_bits_of_one_quantised_anew(recipe: Recipe) -> None:
    layer, found = Fp8Linear(nn.Linear(48, 32), recipe), []
    x = torch.randn(16, 48, requires_grad=True)
    for held in (False, True):
        if held:
            layer.hold()
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer leaves the weights' version counters as they are
def test_each_step_multiplies_by_the_weights_of_the_last_update(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, found, recipe = [], [], Recipe.rowwise  # a CPU takes 50 ms for a product of tensorwise
    quantised: list[torch.Size] = []
    quantise_weight = fp8_linear.quantise_weight

    def count(weight: Tensor, recipe: Recipe) -> fp8_linear.Weight8:
        quantised.append(weight.shape)
        return quantise_weight(weight, recipe)

    monkeypatch.setattr(fp8_linear, "quantise_weight", count)
    for holds in (True, False):
        model, precision = make(32), FP8Precision(CPU, recipe)
        precision.apply(model.blocks)
        if not holds:
            precision.layers = []
        before = len(quantised)
        optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=fused)
        optimizer.param_groups[0]["lr_multiplier"] = 1.0
        step = Step(as_unit(model), optimizer, precision, 2)
        losses = []
        for _ in range(2):
            losses.append(step.gradients(batch_of(IDS, IDS)).total)
            step.update(0.05, torch.zeros(()))
        with torch.no_grad():  # as a roll-back does
            for parameter in model.parameters():
                parameter.mul_(0.5)
        losses.append(step.gradients(batch_of(IDS, IDS)).total)
        found.append((*losses, *(p.grad for p in model.parameters())))
        counts.append(len(quantised) - before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counts == [3 * 8, 2 * 3 * 8]  # 3 steps, 8 layers, 2 micro-batches


def test_an_interrupted_step_releases_the_weights() -> None:
    model, precision = make(32), FP8Precision(CPU, Recipe.tensorwise)
    precision.apply(model.blocks)
    with contextlib.suppress(MemoryError), precision.constant_weights(1):
        assert all(layer.is_held for layer in precision.layers)
        raise MemoryError
    assert not any(layer.is_held for layer in precision.layers)


# --- the model ---------------------------------------------------------------------------------------------------


def train(model: LanguageModel, steps: int, ids: Tensor = IDS) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("recipe", Recipe)
def test_the_curve_is_near_that_of_bf16(recipe: Recipe) -> None:
    """Of a narrow model: a CPU takes 50 ms for the smallest of tensorwise products."""
    model = make(32)
    convert(model.blocks, recipe)
    losses, expected = train(model, 40, IDS[:2]), train(make(32), 40, IDS[:2])
    assert expected[-1] < 0.3 * expected[0]
    assert losses != expected
    assert losses == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize("way", [Full(False), Selective(By.operation, 2, False), Selective(By.block, 2, False)])
def test_recomputed_blocks_give_the_same_bits(recipe: Recipe, way: Full | Selective) -> None:
    models = make(32, dropout=0.1), make(32, dropout=0.1)
    losses = []
    for model in models:
        convert(model.blocks, recipe)
    way.apply(models[0])
    for model in models:
        torch.manual_seed(0)
        losses.append(train(model, steps=3))
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", Recipe)
def test_compiled_fp8_blocks_give_nearly_the_same(recipe: Recipe) -> None:
    models = make(32), make(32)
    for model in models:
        convert(model.blocks, recipe)
    for block in models[0].blocks:
        block.compile(dynamic=False, fullgraph=True)
    assert train(models[0], steps=3) == pytest.approx(train(models[1], steps=3), abs=0.02)


def test_converting_to_fp8_keeps_names_and_weights() -> None:
    model = make()
    before, parameters = model.state_dict(), dict(model.named_parameters())
    assert convert(model.blocks, Recipe.tensorwise) == (8, {})
    assert list(model.state_dict()) == list(before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not isinstance(model.token_embedding, Fp8Linear)


def test_layers_that_stay_bf16_are_named() -> None:
    precision, model = FP8Precision(CPU, Recipe.rowwise), make()
    precision.apply(model.blocks)
    assert precision.notice == "fp8, rowwise, in 8 linear layers of the blocks; bf16 in embeddings, head"
    model = make()
    model.blocks[1].mlp.up = nn.Linear(64, 250)
    precision.apply(model.blocks)
    assert precision.notice == (
        "fp8, rowwise, in 7 linear layers of the blocks; bf16 in embeddings, head, and where a size is no multiple of "
        "16: blocks.1.mlp.up (64 × 250)"
    )
    with pytest.raises(ValueError, match=r"precision=fp8: no linear layer .* multiples of 16 \(20 × 20, .*bf16"):
        precision.apply(make(hidden_size=20).blocks)


# --- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_on_a_cpu_is_refused(recipe: str, tmp_path: Path) -> None:
    command = ("train", *TINY, "precision=fp8", f"precision.recipe={recipe}", "runtime.device=cpu")
    done = llmtrain(*command, cwd=tmp_path, check=2)
    assert "precision=fp8: needs an NVIDIA GPU of compute capability 8.9 or later" in done.stderr
    assert "take precision=bf16" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    done = llmtrain("train", *TINY, "precision=fp8", "precision.recipe=delayed", cwd=tmp_path, check=2)
    assert "precision.recipe='delayed'" in done.stderr
    assert "must be one of tensorwise, rowwise" in done.stderr


def test_an_fp8_run_generates_in_bf16_or_fp32() -> None:
    assert FP8(Recipe.tensorwise, Residual.fp32).inference(CPU).name in ("bf16", "fp32")


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and not has_fp8(), reason="needs compute capability 8.9")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", Recipe)
def test_fp8_products_on_a_gpu_are_near_those_of_a_cpu_without_waiting(recipe: Recipe, compiled: bool) -> None:
    """Each of the products near that of a CPU, and nothing waits for the device."""
    device = torch.device("cuda")
    x, g = torch.randn(70, 256), torch.randn(70, 128)
    linear = nn.Linear(256, 128)
    found = []
    for place in (CPU, device):
        layer = Fp8Linear(nn.Linear(256, 128, device=place), recipe)
        layer.load_state_dict(linear.state_dict())
        if compiled and place.type == "cuda":
            layer.compile(dynamic=False)
        for attempt in range(2):
            layer.zero_grad()
            a, b = x.to(place).requires_grad_(), g.to(place).bfloat16()
            if attempt and place.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                with torch.autocast(place.type, torch.bfloat16):
                    y = layer(a)
                y.backward(b)
            finally:
                if place.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        found.append([t.detach().cpu().float() for t in (y, a.grad, layer.weight.grad, layer.bias.grad)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert (on_gpu - on_cpu).norm() < 0.01 * on_cpu.norm()
