"""Adapters in a model: initial values, trained parameters, exact merging, and use with other features."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.activation_checkpointing.full import Full
from llmtrain.activation_checkpointing.selective import By, Selective
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.lora.layers import LoraLinear
from llmtrain.lora.merge import adapters, merge
from llmtrain.lora.quantization import Quantization
from llmtrain.model import LanguageModel
from llmtrain.model.initial_values import initialise_own
from llmtrain.objective.classification import Classification, Part
from llmtrain.plan.trace import fake_tensors
from llmtrain.precision.fp8 import FP8Precision
from llmtrain.precision.fp8_linear import Recipe
from tests.helpers.adapted import FAMILIES, IDS, KINDS, logits, make, make_pair, seeded, stir
from tests.helpers.batches import batch_of
from tests.helpers.options import make_option, option_names
from tests.helpers.units import as_unit

EVERYTHING = ["all-linear", "head", "embeddings"]
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], LanguageModel]:
    return lambda family: make_pair(family, tmp_path).ours


BATCH = batch_of(IDS[:, :-1], IDS[:, 1:])  # outside of any fake mode


def loss_of(model: LanguageModel) -> Tensor:
    (total,) = as_unit(model)(BATCH).values()
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_forward_equals_the_bases(family: str, kind: str, dtype: torch.dtype, model: Callable) -> None:
    ours = model(family)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = logits(ours)
        targets = ["all-linear", "embeddings"] if family == "gpt2" else EVERYTHING
        make(kind, targets=targets).apply(ours, seeded())
        assert torch.equal(logits(ours), before)
    stir(ours)
    assert not torch.equal(logits(ours), before)


def test_adapters_start_with_kaiming_values_of_their_seed(model: Callable) -> None:
    """Kaiming uniform with a = sqrt(5) is U(-1, 1) / sqrt(inputs); the same for the same seed, another for another."""
    values = {}
    for seed in (3, 3, 4):
        ours = model("llama")
        make(rank=16).apply(ours, seeded(seed))
        values.setdefault(seed, []).append({name: module.lora_A.clone() for name, module in adapters(ours).items()})
        for name, module in adapters(ours).items():
            bound = module.lora_A.shape[1] ** -0.5
            assert 0.9 * bound < module.lora_A.abs().max() <= bound, name
            assert abs(module.lora_A.std() / (bound / 3**0.5) - 1) < 0.1
            assert not module.lora_B.any()
    (first, again), (other,) = values[3], values[4]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({tuple(a.flatten()[:3].tolist()) for a in first.values()}) == len(first)


def test_adapters_and_heads_alone_are_trained(model: Callable) -> None:
    """Names stay; frozen parameters get no gradient; what an objective added is always trained."""
    ours = model("gpt2")
    unit = Classification(Part.all, 1, False, True).build(ours, ["a", "b"], seeded())
    names = [name for name, _ in unit.named_weights()]
    make(targets=["qkv"], also_train=["final_norm"]).apply(ours, seeded())
    trained = {name for name, parameter in unit.named_weights() if parameter.requires_grad}
    of_layers = {f"blocks.{layer}.attention.qkv.lora_{matrix}" for layer in range(2) for matrix in "AB"}
    assert trained == of_layers | {"classifier.weight", "final_norm.weight", "final_norm.bias"}
    assert [name for name, _ in unit.named_weights() if name not in of_layers] == names
    loss_of(ours).backward()
    with_gradient = {name for name, parameter in unit.named_weights() if parameter.grad is not None}
    assert with_gradient == trained - {"classifier.weight"}
    sizes = {name: parameter.numel() for name, parameter in unit.named_weights()}
    every = sum(sizes.values()) - (128 - 101) * 48  # of the vocabulary's padding
    assert unit.count_parameters() == (sum(sizes[name] for name in trained), every)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", Quantization)
def test_merged_equals_unmerged(family: str, kind: str, quantization: Quantization, model: Callable) -> None:
    if quantization in (Quantization.int8, Quantization.nf4):
        pytest.importorskip("bitsandbytes")
    ours = model(family)
    plain = {name: type(module) for name, module in ours.named_modules()}
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    make(kind, targets=["all-linear"] if family == "gpt2" else EVERYTHING, quantization=quantization).apply(
        ours, seeded()
    )
    stir(ours)
    with torch.no_grad():
        before = logits(ours)
        merge(ours)
        torch.testing.assert_close(logits(ours), before, atol=1e-5, rtol=0)
    assert {name: type(module) for name, module in ours.named_modules()} == plain
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())


def test_merging_the_adapter_of_a_tied_embedding_unties(model: Callable) -> None:
    """The adapter is for the input alone, the output layer stays what it was."""
    ours = model("gpt2")
    make(targets=["all-linear", "embeddings"]).apply(ours, seeded())
    stir(ours)
    with torch.no_grad():
        before, output = logits(ours), ours.head_weight.clone()
        merge(ours)
        torch.testing.assert_close(logits(ours), before, atol=1e-5, rtol=0)
    assert not ours.config.tie_embeddings
    assert torch.equal(ours.head.weight, output)
    assert not torch.equal(ours.token_embedding.weight, output)


def test_the_adapter_of_a_classifiers_tied_embedding_merges(model: Callable) -> None:
    """Its output layer is not used."""
    ours = model("gpt2")
    unit = Classification(Part.all, 1, False, True).build(ours, ["a", "b"], seeded())
    make(targets=["all-linear", "embeddings"]).apply(ours, seeded())
    stir(ours)
    with torch.no_grad():
        ids = torch.arange(12).view(2, 6)
        before = unit.classifier(ours.hidden(ids))
        merge(ours, has_output=unit.uses_output_layer)
        torch.testing.assert_close(unit.classifier(ours.hidden(ids)), before, atol=1e-5, rtol=0)
    assert ours.config.tie_embeddings


def test_a_base_in_bf16_gives_the_bits_of_autocast(model: Callable) -> None:
    """The same loss and gradients to the bit."""
    results = []
    for quantization in (Quantization.none, Quantization.bf16):
        ours = model("gpt2")
        make(quantization=quantization).apply(ours, seeded())
        stir(ours)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ours)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in ours.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize(
    "checkpointing",
    [Full(offload=False), Selective(By.operation, 1, offload=False), Selective(By.block, 2, offload=False)],
)
def test_recomputed_blocks_give_the_same_gradients(
    quantization: Quantization, checkpointing: ActivationCheckpointing, model: Callable
) -> None:
    """Though nothing that enters the first block has a gradient."""
    results = []
    for apply in (False, True):
        ours = model("llama")
        make("dora", quantization=quantization, dropout=0.3).apply(ours, seeded())
        stir(ours)
        if apply:
            checkpointing.apply(ours)
        ours.train()
        torch.manual_seed(0)
        loss_of(ours).backward()
        results.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_blocks_compile_to_two_graphs(kind: str, quantization: Quantization, model: Callable) -> None:
    """One for the first block, whose input has no gradient, one for all others."""
    ours = replace(model("gpt2").config, num_layers=4).create(101, CPU, seeded())
    make(kind, quantization=quantization).apply(ours, seeded())
    stir(ours)
    expected = torch.autograd.grad(loss_of(ours), [p for p in ours.parameters() if p.requires_grad])
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    ours.compiled_blocks = [torch.compile(block, backend=graphs, fullgraph=True) for block in ours.blocks]
    found = torch.autograd.grad(loss_of(ours), [p for p in ours.parameters() if p.requires_grad])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("name", option_names("optimizer"))
def test_every_optimizer_trains_adapters_alone(name: str, model: Callable) -> None:
    ours = model("llama")
    make("dora", also_train=["final_norm"]).apply(ours, seeded())
    frozen = {name: p.clone() for name, p in ours.named_parameters() if not p.requires_grad}
    optimizer = make_option("optimizer", name, {}).build(as_unit(ours))
    groups = optimizer.param_groups
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert {name for group in groups for name in group["names"]} == trained
    decayed = {name for group in groups for name in group["names"] if group["weight_decay"]}
    assert decayed in (set(), {name for name in trained if name.endswith(("lora_A", "lora_B"))})
    start = loss_of(ours).item()
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(ours) / IDS.numel()).backward()
        optimizer.step()
    assert loss_of(ours).item() < start
    assert all(torch.equal(frozen[name], p) for name, p in ours.named_parameters() if name in frozen)


@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_step_on_fake_tensors_gives_every_adapter_a_gradient(
    kind: str, quantization: Quantization, tmp_path: Path
) -> None:
    """As planning does it; weights are counted as they are kept."""
    real = make_pair("gpt2 untied", tmp_path).ours
    lora = make(kind, quantization=quantization, targets=EVERYTHING)
    lora.apply(real, seeded())
    stored = {name: (t.shape, t.dtype) for name, t in (*real.named_parameters(), *real.named_buffers())}
    with fake_tensors():
        ours = real.config.build(101)
        ours.set_buffers(CPU)
        ours.initialise(seeded())
        lora.apply(ours, NamedGenerators(0))
        loss_of(ours).backward()
        found = {name: (t.shape, t.dtype) for name, t in (*ours.named_parameters(), *ours.named_buffers())}
        assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    assert found == stored


def test_adapters_are_built_on_the_meta_device(tmp_path: Path) -> None:
    real = make_pair("llama", tmp_path).ours
    with torch.device("meta"):
        ours = real.config.build(101)
        for_both = make("dora", quantization=Quantization.nf4, targets=EVERYTHING)
        for_both.apply(ours, NamedGenerators(0))
    for_both.apply(real, seeded())
    assert as_unit(ours).count_parameters() == as_unit(real).count_parameters()
    assert ours.num_parameters() == real.num_parameters()


def test_fp8_is_refused(model: Callable) -> None:
    ours = model("llama")
    make().apply(ours, seeded())
    with pytest.raises(ValueError, match="precision=fp8: does not go with adapters"):
        FP8Precision(CPU, Recipe.tensorwise).apply(ours.blocks)


def test_no_copy_of_the_weight_waits_for_backward(model: Callable) -> None:
    """Beside a frozen layer the adapter keeps its input and ``A x``, and nothing of the size of the weight."""
    sizes: list[int] = []
    linear = nn.Linear(256, 512)
    for quantization in Quantization:
        linear.requires_grad_(False)
        layer = LoraLinear(linear, quantization.pack(linear.weight))
        layer.adapt(4, 1.0, 0.0)
        initialise_own(layer, "layer", seeded())
        sizes.clear()
        parameters = {id(p) for p in layer.parameters()}

        def note(tensor: Tensor, own: set[int] = parameters) -> Tensor:
            if id(tensor) not in own and id(tensor._base) not in own:
                sizes.append(tensor.numel())
            return tensor

        x = torch.randn(8, 256, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x).sum().backward()
        assert sizes, quantization
        assert max(sizes) <= x.numel(), quantization
