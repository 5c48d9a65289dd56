"""Llama and related models against transformers, independent references and the published sizes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from llmtrain.activation_checkpointing.full import Full
from llmtrain.activation_checkpointing.selective import By, Selective
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.config.build import build
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.model.layers.rotary import Scaling
from llmtrain.model.llama import Llama, LlamaConfig, Position
from tests.helpers.cli import llmtrain, only_run, rows

CONF = Path(__file__).parents[2] / "conf" / "model"
CPU = torch.device("cpu")
VOCABULARY = 101
SMALL = LlamaConfig(
    num_layers=3, hidden_size=48, num_heads=4, num_kv_heads=2, head_size=None, intermediate_size=80, context_length=64,
    vocab_size=None, position=Position.rope, rope_theta=10000.0, rope_scaling=Scaling.none, rope_factor=None,
    rope_low_freq_factor=None, rope_high_freq_factor=None, rope_original_context_length=None, norm_eps=1e-5,
    qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, fused_qkv=False, sliding_window=None,
    sliding_window_from_layer=0, tie_embeddings=False, normalised_head=False, dropout=0.0, logit_softcap=None,
    initial_std=0.02,
)  # fmt: skip
BAICHUAN_7B = {"fused_qkv": True, "normalised_head": True, "num_kv_heads": 4, "norm_eps": 1e-6}
BAICHUAN_13B = BAICHUAN_7B | {"position": Position.alibi, "rope_theta": None, "num_heads": 6, "num_kv_heads": 6}


def make(seed: int = 0, vocab_size: int = VOCABULARY, **changes: Any) -> Llama:
    """A model in which every parameter matters, biases and norms too."""
    model = replace(SMALL, **changes).create(vocab_size, CPU, NamedGenerators(seed))
    assert isinstance(model, Llama)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        for name in ("token_embedding", "head"):
            if hasattr(model, name):
                getattr(model, name).weight[vocab_size:] = 0.0
    return model


def draw_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


# --- transformers ------------------------------------------------------------------------------------------------

NAMES = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "query_norm": "q_norm",
    "key_norm": "k_norm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.projection": "self_attn.o_proj", "attention.": "self_attn.",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj", "blocks.": "layers.",
    "final_norm": "norm", "token_embedding": "embed_tokens",
}  # fmt: skip


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of ``LlamaForCausalLM`` and the like; the tensors are the same."""
    result = {}
    for name, tensor in state.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        result["lm_head.weight" if name == "head.weight" else f"model.{name}"] = tensor
    return result


def their_model(kind: str, ours: Llama, **values: Any) -> Any:
    """transformers' model of the class ``kind`` with our weights."""
    transformers = pytest.importorskip("transformers")
    c = ours.config
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": c.hidden_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.size_of_head,
        "intermediate_size": c.intermediate_size, "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings, "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "pad_token_id": None,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**(settings | values)))
    loaded = model.load_state_dict(as_transformers(ours.state_dict()), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= ({"lm_head.weight"} if c.tie_embeddings else set())
    return model.eval()


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "tied": ("Llama", {"tie_embeddings": True, "num_kv_heads": 1}, {}),
    "biases": ("Llama", {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "num_kv_heads": 4},
               {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 10}, {"sliding_window": 10}),
    "qwen2": ("Qwen2", {"qkv_bias": True, "norm_eps": 1e-6}, {}),
    "qwen2_window": ("Qwen2", {"qkv_bias": True, "sliding_window": 10, "sliding_window_from_layer": 2},
                     {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_size": 32, "norm_eps": 1e-6}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str) -> None:
    kind, changes, values = CASES[case]
    ours = make(**changes)
    theirs = their_model(kind, ours, **values)
    ids = draw_ids(3, 40)
    logits, expected = ours(ids)[..., :VOCABULARY], theirs(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel()
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = as_transformers({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    theirs_by_name = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == theirs_by_name.keys()
    for name, gradient in gradients.items():
        gradient = gradient[:VOCABULARY] if name in ("lm_head.weight", "model.embed_tokens.weight") else gradient
        torch.testing.assert_close(gradient, theirs_by_name[name], atol=1e-6, rtol=1e-4)


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"rope_factor": 3.0, "rope_original_context_length": 20},
                {"factor": 3.0, "original_max_position_embeddings": 20}),
    "llama3": (
        {"rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
         "rope_original_context_length": 32},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "yarn": ({"rope_factor": 4.0, "rope_original_context_length": 32},
             {"factor": 4.0, "original_max_position_embeddings": 32}),
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_positions_equal_transformers(scaling: str) -> None:
    keys, values = SCALINGS[scaling]
    ours = make(**(keys | {"rope_scaling": Scaling[scaling], "head_size": 32})).eval()
    # transformers takes the original context of dynamic scaling from here
    context = {"max_position_embeddings": 20} if scaling == "dynamic" else {}
    parameters = {"rope_type": scaling, "rope_theta": 10000.0, **values}
    theirs = their_model("Llama", ours, rope_parameters=parameters, **context)
    plain = make(head_size=32).eval()
    for length in (16, 64):
        ids = draw_ids(2, length)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids)[..., :VOCABULARY], theirs(ids).logits, atol=1e-5, rtol=0)
            if length == 64:
                assert not torch.allclose(ours(ids), plain(ids), atol=1e-2)


def test_frequencies_of_llama_3_1_are_transformers_to_the_bit_or_nearly() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = yaml.safe_load((CONF / "llama3_1_8b.yaml").read_text())
    ours = build(values, ModelConfig)  # type: ignore[type-abstract]
    assert isinstance(ours, LlamaConfig)
    assert ours.rotary is not None
    theirs = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    torch.testing.assert_close(ours.rotary.frequencies(CPU), LlamaRotaryEmbedding(theirs).inv_freq, atol=0, rtol=2e-7)


def test_right_padding_changes_nothing_before_it() -> None:
    ours = make().eval()
    theirs = their_model("Llama", ours)
    ids, lengths = draw_ids(3, 20), (20, 13, 4)
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        logits = ours(ids.masked_fill(~mask, 0))[..., :VOCABULARY]
        expected = theirs(ids.masked_fill(~mask, 0), attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-5, rtol=0)
    assert logits.isfinite().all()


# --- Baichuan 2, whose code is not in transformers ---------------------------------------------------------------


def baichuan(model: Llama, ids: Tensor) -> Tensor:
    """Logits of ``ids`` ``(sequence,)`` in float64, from the formulas of Baichuan 2's own code."""
    c, state = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    length, size = len(ids), c.hidden_size // c.num_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * state[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:  # (heads, sequence, head_size) as complex numbers
        angles = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(0, size, 2).double() / size)
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), -1)

    bias = torch.full((c.num_heads, length, length), -math.inf, dtype=torch.float64)
    for head in range(c.num_heads):
        nearest = 2 ** math.floor(math.log2(c.num_heads))
        exponent = 8 * (head + 1) / nearest if head < nearest else 8 * (2 * (head - nearest) + 1) / (2 * nearest)
        slope = 2**-exponent if c.position is Position.alibi else 0.0
        for i in range(length):
            for j in range(i + 1):
                bias[head, i, j] = slope * (j - i)

    x = state["token_embedding.weight"][ids]
    for layer in range(c.num_layers):
        block = f"blocks.{layer}"
        packed = norm(x, f"{block}.attention_norm") @ state[f"{block}.attention.qkv.weight"].T
        query, key, value = packed.view(length, 3, c.num_heads, size).permute(1, 2, 0, 3)
        if c.position is Position.rope:
            query, key = turn(query), turn(key)
        scores = (query @ key.transpose(1, 2) / size**0.5 + bias).softmax(-1)
        x = x + (scores @ value).transpose(0, 1).reshape(length, -1) @ state[f"{block}.attention.projection.weight"].T
        y = norm(x, f"{block}.mlp_norm")
        gate, up, down = (state[f"{block}.mlp.{name}.weight"] for name in ("gate", "up", "down"))
        x = x + (y @ gate.T / (1 + (-(y @ gate.T)).exp()) * (y @ up.T)) @ down.T
    head = state["head.weight"]
    return norm(x, "final_norm") @ (head / head.square().sum(-1, keepdim=True).sqrt()).T


@pytest.mark.parametrize("changes", [BAICHUAN_7B, BAICHUAN_13B], ids=["7b", "13b"])
def test_logits_equal_baichuans_formulas(changes: dict[str, Any]) -> None:
    model = make(**changes).eval()
    ids = draw_ids(2, 30)
    with torch.no_grad():
        logits = model(ids)[..., :VOCABULARY]
    for row, found in zip(ids, logits, strict=True):
        torch.testing.assert_close(found.double(), baichuan(model, row), atol=1e-5, rtol=0)


def test_the_normalised_head_is_the_same_from_logits_and_from_its_matrix() -> None:
    model = make(**BAICHUAN_7B)
    assert model.head_weight[:VOCABULARY].norm(dim=-1).tolist() == pytest.approx([1.0] * VOCABULARY, rel=1e-5)
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    targets = draw_ids(10)
    gradients = []
    for logits in (model.logits(hidden), F.linear(hidden, model.head_weight, model.head_bias)):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets), model.head.weight)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    assert (gradients[1][VOCABULARY:] == 0).all()


# --- examples in one row, and the cache --------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"sliding_window": 5, "sliding_window_from_layer": 1},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 1},
    "baichuan_7b": BAICHUAN_7B,
    "baichuan_13b": BAICHUAN_13B | {"sliding_window": 9},
}


def make_any(variant: str) -> LanguageModel:
    if variant != "gpt":
        return make(**VARIANTS[variant])
    gpt = GPTConfig(
        num_layers=3, hidden_size=48, num_heads=4, context_length=64, vocab_size=None, dropout=0.0, qkv_bias=True,
        tie_embeddings=True, logit_softcap=None, initialisation=Initialisation.torch,
    )  # fmt: skip
    return gpt.create(VOCABULARY, CPU, NamedGenerators(0))


@pytest.mark.parametrize("variant", [*VARIANTS, "gpt"])
def test_packed_examples_give_the_logits_of_single_ones(variant: str) -> None:
    """Logits and gradients, in float64 to tell a leak from rounding."""
    model = make_any(variant).double()
    examples = [draw_ids(n, seed=n) for n in (11, 1, 17, 6)]
    row = torch.cat([*examples, torch.zeros(5, dtype=torch.long)])[None]
    segments = torch.tensor([number for number, ids in enumerate(examples, 1) for _ in ids] + [0] * 5)[None].int()
    tokens = sum(map(len, examples))

    def losses(logits: Tensor, ids: Tensor) -> Tensor:  # each token from its own position: one number a token
        return F.cross_entropy(logits, ids, reduction="sum")

    packed = model(row, segments=segments)[0]
    assert packed[..., :VOCABULARY].isfinite().all()  # the padding's too
    losses(packed[:tokens], row[0, :tokens]).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    apart = torch.cat([model(ids[None])[0] for ids in examples])
    losses(apart, row[0, :tokens]).backward()
    # cosines and sines are fp32, and so are those of the same positions
    torch.testing.assert_close(packed[:tokens, :VOCABULARY], apart[:, :VOCABULARY], atol=1e-9, rtol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_gives_the_same_logits(variant: str) -> None:
    model = make(**VARIANTS[variant]).eval()
    ids = draw_ids(2, 40)
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(2, torch.float32)
        pieces = [model(piece, cache) for piece in ids.split([7, 1, 1, 15, 1, 15], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)
    assert cache.length == 40
    assert cache.keys[0].shape[1] == model.config.num_kv_heads


def test_the_cache_grows_with_its_tokens() -> None:
    model = make(context_length=4000).eval()
    cache = model.new_cache(1, torch.float32)
    assert cache.capacity == 4000
    rooms = []
    with torch.no_grad():
        for length in (10, 246, 1, 300, 2900):
            model.hidden(draw_ids(1, length), cache)
            rooms.append(cache.keys[0].shape[2])
    assert rooms == [256, 256, 512, 1024, 3457]


# --- arithmetic, recomputation, compiling ------------------------------------------------------------------------


def train(
    model: LanguageModel, dtype: torch.dtype = torch.float32, segments: Tensor | None = None
) -> tuple[list, list]:
    """Losses of three steps of SGD, and the last gradients."""
    torch.manual_seed(3)
    losses, ids = [], draw_ids(2, 24)
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model.hidden(ids, segments=segments)
            assert hidden.dtype == torch.float32  # the residual stream's
            logits = F.linear(hidden, model.head_weight, model.head_bias)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
    return losses, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_learns_as_fp32_does(variant: str) -> None:
    segments = torch.tensor([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4])
    rough, _ = train(make(**VARIANTS[variant]), torch.bfloat16, segments)
    exact, _ = train(make(**VARIANTS[variant]), torch.float32, segments)
    assert rough == pytest.approx(exact, rel=1e-2)
    assert rough[2] < rough[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["llama", "window", "baichuan_13b"])
@pytest.mark.parametrize("way", [Full(offload=False), Selective(By.operation, every=1, offload=False)])
def test_recomputing_gives_the_same_bits(way: Any, variant: str, packed: bool) -> None:
    segments = torch.tensor([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4]) if packed else None
    model = make(**VARIANTS[variant], dropout=0.1)
    way.apply(model)
    (losses, gradients), (expected, theirs) = (
        train(one, segments=segments) for one in (model, make(**VARIANTS[variant], dropout=0.1))
    )
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["window", "baichuan_13b"])
def test_compiled_blocks_give_the_same_gradients(variant: str) -> None:
    segments = torch.tensor([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4])
    model, plain = make(**VARIANTS[variant]), make(**VARIANTS[variant])
    model.compiled_blocks = [torch.compile(block, dynamic=False, fullgraph=True) for block in model.blocks]
    losses, _ = train(model, segments=segments)
    assert losses == pytest.approx(train(plain, segments=segments)[0], rel=1e-5)


def test_positions_stay_exact_in_a_model_of_few_bits() -> None:
    model = make()
    exact = model.positions.value.clone()
    model.to(torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.positions.value, exact)
    assert model(draw_ids(1, 8)).dtype == torch.bfloat16


# --- what the program asks of a model ----------------------------------------------------------------------------

PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248, "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400, "llama3_2_3b": 3_212_749_824, "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008, "smollm2_360m": 361_821_120, "smollm2_1_7b": 1_711_376_384,
    "baichuan2_7b": 7_505_973_248, "baichuan2_13b": 13_896_668_160,
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size: str) -> None:
    text = (CONF / f"{size}.yaml").read_text()
    settings = build(yaml.safe_load(text), ModelConfig)  # type: ignore[type-abstract]
    assert settings.vocab_size is not None
    with torch.device("meta"):
        model = settings.build(settings.vocab_size)
    assert model.num_parameters() == PUBLISHED[size]
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[size]  # no vocabulary is padded
    assert f"{PUBLISHED[size]:,} parameters" in text.splitlines()[0]


def test_every_size_lists_every_key_with_the_same_comment() -> None:
    comments = set()
    for path in CONF.glob("*.yaml"):
        lines = path.read_text().splitlines()
        if lines[1].endswith("LlamaConfig"):
            comments.add(tuple((line.split(":")[0], line.partition(" # ")[2]) for line in lines[2:]))
    assert len(comments) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_num_parameters_counts_the_parameters(variant: str) -> None:
    model = make(vocab_size=128, **VARIANTS[variant], qkv_bias=True)  # 128: nothing is padded
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_layer_index_counts_from_the_embedding_to_the_head() -> None:
    model = make(qk_norm=True)
    depths = {name: model.layer_index(name) for name, _ in model.named_parameters()}
    assert depths["token_embedding.weight"] == 0
    assert depths["blocks.0.mlp.gate.weight"] == depths["blocks.0.attention.key_norm.weight"] == 1
    assert depths["blocks.2.attention.projection.weight"] == 3
    assert depths["final_norm.weight"] == depths["head.weight"] == 4


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "head_size": 32}, {"fused_qkv": True}])
def test_flops_per_token_counts_the_matrix_products(changes: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make(vocab_size=128, **changes)
    ids = draw_ids(2, 32)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(ids).sum().backward()
    # the formula counts norms, which are no matrix products
    assert model.flops_per_token(32) * 64 == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_per_token_follow_the_sliding_window() -> None:
    whole, windowed = make(), make(sliding_window=8, sliding_window_from_layer=1)
    saved = 12 * 48 * 2 * (32 - 8)  # of two layers
    assert whole.flops_per_token(32) - windowed.flops_per_token(32) == saved
    assert whole.flops_per_token(8) == windowed.flops_per_token(8)


def test_initialisation_has_the_standard_deviation_of_its_key() -> None:
    settings = replace(SMALL, hidden_size=256, vocab_size=1024, initial_std=0.03, qkv_bias=True, qk_norm=True)
    state = settings.create(1000, CPU, NamedGenerators(0)).state_dict()
    for name, tensor in state.items():
        if "norm" in name:
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            assert tensor.std().item() == pytest.approx(0.03, rel=0.03), name
    assert not [name for name in state if "position" in name or "logit_bias" in name]
    assert state["head.weight"].shape == (1000, 256)
    again = settings.create(1000, CPU, NamedGenerators(0)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "hidden_size=50: must be divisible by num_heads=4; model.num_heads=5 would do"),
        ({"num_heads": 6}, "num_kv_heads=4: num_heads=6 must be divisible by it; 3 would do"),
        ({"head_size": 15}, "head_size=15: must be even"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sliding_window_from_layer": 2}, "sliding_window_from_layer=2: there is no window"),
        ({"rope_theta": None}, "rope_theta=null: position=rope needs it"),
        ({"rope_scaling": Scaling.linear}, "rope_factor=null: rope_scaling=linear needs it"),
        ({"rope_factor": 2.0}, "rope_factor=2.0: rope_scaling=none does not read it"),
        ({"rope_scaling": Scaling.yarn, "rope_factor": 0.5, "rope_original_context_length": 8}, "rope_factor=0.5"),
        ({"position": Position.alibi}, "rope_theta=10000.0: position=alibi has no rotary positions; take null"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **({"num_kv_heads": 4} | changes))


# --- the command -------------------------------------------------------------------------------------------------

TINY = (
    "model=llama_tiny", "tokenizer=byte", "data.sequence_length=64", "runtime.num_threads=1",
    "accumulation.batch_size=8", "accumulation.micro_batch_size=4", "loop.eval_every=0", "loop.sample_every=0",
)  # fmt: skip


def test_a_llama_trains_through_the_command(tmp_path: Path) -> None:
    llmtrain("train", *TINY, "loop.max_steps=60", "metrics.log_every=1", "optimizer.lr=1e-2", cwd=tmp_path)
    losses = [row["loss"] for row in rows(only_run(tmp_path / "runs")) if "loss" in row and "event" not in row]
    assert losses[0] == pytest.approx(math.log(257), rel=0.02)
    assert losses[-1] < losses[0] - 2


def test_a_llama_is_planned(tmp_path: Path) -> None:
    planned = llmtrain("plan", *TINY, "model.sliding_window=8", "probe=false", "device=h100-80gb", cwd=tmp_path).stdout
    assert "31,424" in planned
    assert "activations" in planned
    assert "fits:" in planned
