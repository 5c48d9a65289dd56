"""GPT-2 against transformers' implementation and the published sizes."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.model.gpt import GPT, GPTConfig, Initialisation
from tests.helpers.adapted import make as make_lora

CONF = Path(__file__).parents[2] / "conf" / "model"
SMALL = {
    "num_layers": 3, "hidden_size": 48, "num_heads": 4, "context_length": 32, "vocab_size": None, "dropout": 0.0,
    "qkv_bias": True, "tie_embeddings": True, "logit_softcap": None,
    "initialisation": Initialisation.gpt2,
}  # fmt: skip


def make(vocab_size: int = 101, seed: int = 0, **changes: object) -> GPT:
    config = GPTConfig(**(SMALL | changes))
    model = config.create(vocab_size, torch.device("cpu"), NamedGenerators(seed))
    assert isinstance(model, GPT)
    return model


def randomised(model: GPT) -> GPT:
    """Values that make every parameter matter, biases and norms too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
        for name in ("token_embedding", "head"):
            if hasattr(model, name):
                getattr(model, name).weight[model.vocab_size :] = 0.0
    return model


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of ``GPT2LMHeadModel``, whose linear layers are transposed."""
    names = {
        "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.qkv": "attn.c_attn",
        "attention.projection": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    }  # fmt: skip
    result = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("blocks.", "h.").replace("final_norm", "ln_f")
        name = name.replace("token_embedding", "wte").replace("position_embedding", "wpe")
        transposed = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        result["lm_head.weight" if name == "head.weight" else f"transformer.{name}"] = (
            tensor.T if transposed else tensor
        )
    return result


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = randomised(make(tie_embeddings=tied)).eval()
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4, tie_word_embeddings=tied
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    missing = theirs.load_state_dict(as_transformers(ours.state_dict()), strict=False).missing_keys
    assert all(
        name.endswith((".attn.bias", ".attn.masked_bias")) or (tied and name == "lm_head.weight") for name in missing
    )
    ids = torch.randint(0, 101, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[..., :101], theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_full_size_logits_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    values = yaml.safe_load((CONF / "gpt124m.yaml").read_text())
    values.pop("_target_")
    values["initialisation"] = Initialisation.gpt2
    config = GPTConfig(**values)
    ours = config.create(50257, torch.device("cpu"), NamedGenerators(0)).eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    theirs.load_state_dict(as_transformers(ours.state_dict()), strict=False)
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    ids = torch.randint(0, 50257, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[..., :50257], theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "published"),
    [("gpt124m", 124_439_808), ("gpt355m", 354_823_168), ("gpt774m", 774_030_080), ("gpt1558m", 1_557_611_200)],
)
def test_published_parameter_counts(size: str, published: int) -> None:
    values = yaml.safe_load((CONF / f"{size}.yaml").read_text())
    values.pop("_target_")
    with torch.device("meta"):
        model = GPTConfig(**values).build(50257)
    assert model.num_parameters() == published
    assert sum(model.parameters_by_part().values()) == published
    assert all(parameter.is_meta for parameter in model.parameters())


def test_num_parameters_counts_the_parameters() -> None:
    for tied in (True, False):
        model = make(vocab_size=128, tie_embeddings=tied, qkv_bias=False)  # 128: nothing is padded
        assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_padding_of_the_vocabulary_is_invisible() -> None:
    model = make(vocab_size=101)
    assert model.padded_vocab_size == 128
    assert model.state_dict()["token_embedding.weight"].shape == (101, 48)
    ids = torch.randint(0, 101, (2, 8))
    logits = model(ids)
    assert torch.isinf(logits[..., 101:]).all()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert (gradient[101:] == 0).all()


def test_a_padded_model_survives_a_round_trip() -> None:
    source, target = randomised(make()), make(seed=7)
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_initialisation_is_that_of_gpt2() -> None:
    model = make(num_layers=4, hidden_size=256, context_length=256, vocab_size=1024)
    state = model.state_dict()
    assert state["blocks.0.attention.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["blocks.3.mlp.down.weight"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert state["blocks.3.attention.projection.weight"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert state["token_embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert (state["final_norm.weight"] == 1).all()
    assert all((tensor == 0).all() for name, tensor in state.items() if name.endswith("bias"))
    again = make(num_layers=4, hidden_size=256, context_length=256, vocab_size=1024)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())


def test_cache_gives_the_same_logits() -> None:
    model = randomised(make()).eval()
    ids = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(2, torch.float32)
        pieces = [model(piece, cache) for piece in ids.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)
    assert cache.length == 20


def test_dropout_acts_only_in_training() -> None:
    model = randomised(make(dropout=0.5))
    ids = torch.randint(0, 101, (1, 8))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_layer_index_counts_from_the_embedding_to_the_head() -> None:
    model = make(tie_embeddings=False)
    depths = {name: model.layer_index(name) for name, _ in model.named_parameters()}
    assert depths["token_embedding.weight"] == depths["position_embedding.weight"] == 0
    assert depths["blocks.0.mlp.up.weight"] == 1
    assert depths["blocks.2.attention_norm.bias"] == 3
    assert depths["final_norm.weight"] == depths["head.weight"] == 4


def counted_flops(model: GPT) -> int:
    """Of forward and backward over 64 tokens, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(torch.randint(0, 128, (2, 32))).sum().backward()
    return counter.get_total_flops()


def test_flops_per_token_counts_the_matrix_products() -> None:
    """6 N + 12 L H S, against torch's own counter over forward and backward."""
    for tied in (True, False):
        model = make(vocab_size=128, tie_embeddings=tied)
        # the formula counts norms and biases, which are no matrix products: 2% at this size
        assert model.flops_per_token(32) * 64 == pytest.approx(counted_flops(model), rel=0.03)


@pytest.mark.parametrize("trained", ["blocks.5.", "final_norm.", "lora_"])
def test_flops_per_token_of_frozen_weights(trained: str) -> None:
    """4 N where gradients pass through, 2 N where none does, 6 N of adapters: against torch's own counter."""
    model = make(vocab_size=128, num_layers=6)
    whole = model.flops_per_token(32)
    if trained == "lora_":
        make_lora().apply(model, NamedGenerators(0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    # the first products that gradients come back to need none for their input: 3% at this size
    assert model.flops_per_token(32) * 64 == pytest.approx(counted_flops(model), rel=0.05)
    assert model.flops_per_token(32) < 0.85 * whole


def test_initialisation_torch_equals_torchs() -> None:
    """The same ranges as freshly made torch modules have."""
    torch.manual_seed(0)
    state = make(hidden_size=256, vocab_size=1024, initialisation=Initialisation.torch).state_dict()
    assert state["token_embedding.weight"].std().item() == pytest.approx(1.0, rel=0.02)
    reference = torch.nn.Linear(1024, 256)
    for ours, theirs in (("weight", reference.weight), ("bias", reference.bias)):
        tensor = state[f"blocks.0.mlp.down.{ours}"]
        assert tensor.std().item() == pytest.approx(theirs.std().item(), rel=0.15)
        assert tensor.abs().max() <= 1 / 32
    assert (state["blocks.0.mlp_norm.weight"] == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "hidden_size=50: must be divisible by num_heads=4; model.num_heads=5 would do"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(SMALL | changes))
