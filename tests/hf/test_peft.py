"""Adapters that PEFT made and those that it reads, against PEFT's own models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.hf.peft import CONFIG, TENSORS, export_adapter, import_adapter, shortest_suffixes
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.objective.classification import Classification, Part
from llmtrain.weights.adapters import start_from
from tests.helpers.adapted import FAMILIES, IDS, Pair, edit, logits, make, make_pair, seeded, stir
from tests.helpers.units import as_unit

peft = pytest.importorskip("peft")

TARGETS = {
    "all": (["all-linear"], "all-linear"),
    "some": (["attention.projection", "mlp.up"], ["attn.c_proj", "c_fc", "o_proj", "up_proj"]),
    "one block": (["blocks.1.mlp.down"], r".*(transformer\.h|model\.layers)\.1\.mlp\.(c_proj|down_proj)"),
    "head and embeddings": (["all-linear", "head", "embeddings"], [
        "c_attn", "c_proj", "c_fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "lm_head", "wte", "embed_tokens",
    ]),
}  # fmt: skip
CASES = [
    (family, kind, what)
    for family in FAMILIES
    for kind in ("lora", "rslora", "dora")
    for what in TARGETS
    if not (family == "gpt2" and what == "head and embeddings")  # tied: tested apart
]


def peft_config(kind: str, targets: Any, **keys: Any) -> Any:
    return peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.0, target_modules=targets, use_rslora=kind == "rslora",
        use_dora=kind == "dora", task_type="CAUSAL_LM", **keys,
    )  # fmt: skip


def adapted(pair: Pair, kind: str, targets: list[str], **keys: Any) -> LowRankAdaptation:
    """Adapters in our model that change what it computes."""
    lora = make(kind, targets=targets, **keys)
    lora.apply(pair.ours, seeded())
    stir(pair.ours)
    return lora


def export(pair: Pair, lora: LowRankAdaptation, to: Path) -> Any:
    export_adapter(as_unit(pair.ours), lora, pair.names, to, base=str(pair.directory), fan_in_fan_out=pair.transposed)
    return peft.PeftModel.from_pretrained(pair.theirs, to, is_trainable=True).eval()


@pytest.mark.parametrize(("family", "kind", "what"), CASES)
@pytest.mark.filterwarnings("ignore")  # PEFT's about embeddings and Conv1D
def test_peft_computes_what_we_export(family: str, kind: str, what: str, tmp_path: Path) -> None:
    pair = make_pair(family, tmp_path)
    base = logits(pair.ours)
    lora = adapted(pair, kind, TARGETS[what][0])
    theirs = export(pair, lora, tmp_path / "adapter")
    expected = theirs(IDS).logits
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(logits(pair.ours), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "kind", "what"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_gives_the_same_logits_and_gradients(
    family: str, kind: str, what: str, tmp_path: Path
) -> None:
    """Logits and the gradient of every adapter."""
    pair = make_pair(family, tmp_path)
    ours, theirs = TARGETS[what]
    model = peft.get_peft_model(pair.theirs, peft_config(kind, theirs)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    lora = make(kind, targets=ours)
    lora.apply(pair.ours, seeded())
    start_from(as_unit(pair.ours), lora, tmp_path / "adapter")
    expected, found = model(IDS).logits, logits(pair.ours)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    gradients = by_our_names(model, pair)
    trained = {name: p.grad for name, p in pair.ours.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, gradient in trained.items():
        assert gradient is not None
        scale = gradients[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5 * float(scale), rtol=1e-4, msg=name)


def by_our_names(model: Any, pair: Pair) -> dict[str, Tensor]:
    """The gradients of PEFT's adapters."""
    ours = {their: our for our, their in pair.names.items()}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            part = part.removeprefix("embedding_").removesuffix(".weight").removesuffix(".default")
            found[f"{ours[module]}.lora_{part.removesuffix('_vector')}"] = parameter.grad
    return found


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_tied_embeddings_are_exported(tmp_path: Path) -> None:
    """The adapter is for the input alone, there and here."""
    pair = make_pair("gpt2", tmp_path)
    lora = adapted(pair, "lora", ["embeddings"])
    theirs = export(pair, lora, tmp_path / "adapter")
    torch.testing.assert_close(logits(pair.ours), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "also"), [("gpt2", ["norm"]), ("gpt2 untied", ["norm", "head"]), ("gpt2", [r"1\.mlp\.up"])]
)
@pytest.mark.filterwarnings("ignore")
def test_wholly_trained_modules_are_exported(family: str, also: list[str], tmp_path: Path) -> None:
    pair = make_pair(family, tmp_path)
    lora = adapted(pair, "lora", ["c_attn"], also_train=also)
    theirs = export(pair, lora, tmp_path / "adapter")
    expected = theirs(IDS).logits
    torch.testing.assert_close(logits(pair.ours), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    other = make_pair(family, tmp_path / "other")
    lora.apply(other.ours, seeded())
    import_adapter(as_unit(other.ours), lora, pair.names, tmp_path / "again")
    assert torch.equal(logits(other.ours), logits(pair.ours))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("gpt2", {"also_train": ["token_embedding"]}, "token_embedding is the output layer too"),
        ("gpt2", {"also_train": ["final_norm.weight"]}, "other parameters of final_norm are not"),
        ("gpt2", {"also_train": ["qkv.bias"]}, "other parameters of blocks.0.attention.qkv are not"),
    ],
)
def test_adapters_that_peft_cannot_hold_are_refused(
    family: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pair = make_pair(family, tmp_path)
    lora = adapted(pair, "lora", ["all-linear"], **keys)
    with pytest.raises(ValueError, match=message):
        export_adapter(as_unit(pair.ours), lora, pair.names, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_of_a_classifier_gives_the_same_logits_in_peft(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pair = make_pair("gpt2", tmp_path)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        pair.directory, num_labels=3, pad_token_id=0, dtype=torch.float32
    ).eval()
    unit = Classification(Part.all, 1, False, True).build(pair.ours, ["a", "b", "c"], seeded())
    lora = adapted(pair, "lora", ["all-linear"])
    names = pair.names | {"classifier": "score"}
    export_adapter(unit, lora, names, tmp_path / "adapter", fan_in_fan_out=True)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    theirs = peft.PeftModel.from_pretrained(classifier, tmp_path / "adapter").eval()
    ids = IDS.clamp(min=1)
    torch.testing.assert_close(unit.classifier(pair.ours.hidden(ids)[:, -1]), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "lora.rank=4: .* have 8; lora.rank=8"),
        ({"lora_alpha": 8}, "lora.alpha=6: .* have 8; lora.alpha=8"),
        ({"use_rslora": True}, "lora=lora: .* of another kind; lora=rslora"),
        ({"use_dora": True}, "lora=lora: .* of another kind; lora=dora"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern={'c_attn': 2}: all layers share one rank"),
        ({"bias": "all"}, "bias=all: has no counterpart"),
        ({"lora_bias": True}, "lora_bias=True: has no counterpart"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA: only LORA"),
    ],
)
def test_adapter_settings_that_do_not_match_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    pair = make_pair("gpt2", tmp_path)
    lora = adapted(pair, "lora", ["all-linear"])
    export_adapter(as_unit(pair.ours), lora, pair.names, tmp_path / "adapter", fan_in_fan_out=True)
    edit(tmp_path / "adapter" / CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        import_adapter(as_unit(pair.ours), lora, pair.names, tmp_path / "adapter")


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    pair = make_pair("gpt2", tmp_path)
    lora = adapted(pair, "lora", ["all-linear"])
    folder = tmp_path / "adapter"
    export_adapter(as_unit(pair.ours), lora, pair.names, folder, fan_in_fan_out=True)
    whole = load_file(folder / TENSORS)
    before = {name: p.detach().clone() for name, p in pair.ours.named_parameters()}
    first = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"

    def message(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, folder / TENSORS)
        with pytest.raises(ValueError, match="does not fit") as error:
            import_adapter(as_unit(pair.ours), lora, pair.names, folder)
        return str(error.value)

    assert f"{first} (blocks.0.attention.qkv.lora_A) is missing" in message(
        {name: tensor for name, tensor in whole.items() if name != first}
    )
    assert f"{first} is (3, 48), blocks.0.attention.qkv.lora_A here is (4, 48)" in message(
        whole | {first: whole[first][:3].contiguous()}
    )
    strange = "base_model.model.transformer.h.9.attn.c_attn.lora_A.weight"
    assert f"{strange} has no place in this model" in message(whole | {strange: whole[first].clone()})
    base = "base_model.model.transformer.wte.base_layer.weight"
    assert "the adapter was made for another base" in message(whole | {base: torch.zeros(101, 48)})
    assert all(torch.equal(before[name], p) for name, p in pair.ours.named_parameters())  # nothing by halves


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    pair = make_pair("gpt2", tmp_path)
    lora = adapted(pair, "lora", ["all-linear"])
    folder = tmp_path / "adapter"
    export_adapter(as_unit(pair.ours), lora, pair.names, folder)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: a pickle, which could run code; .*save_pretrained"):
        import_adapter(as_unit(pair.ours), lora, pair.names, folder)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore")
def test_dropout_is_applied_as_in_peft(kind: str, tmp_path: Path) -> None:
    """With the same random numbers the same is dropped, of the same inputs."""
    pair = make_pair("gpt2", tmp_path)
    lora = adapted(pair, kind, ["all-linear"], dropout=0.5)
    theirs = export(pair, lora, tmp_path / "adapter").train()
    pair.ours.train()
    torch.manual_seed(1)
    expected = theirs(IDS).logits
    torch.manual_seed(1)
    torch.testing.assert_close(logits(pair.ours), expected, atol=1e-5, rtol=1e-5)
    assert (logits(pair.ours.eval()) - expected).abs().max() > 0.1


def test_target_modules_have_the_shortest_names_that_match_nothing_else() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj"]
    assert shortest_suffixes(names, []) == ["c_proj"]
    assert shortest_suffixes(names[::2], names[1::2]) == ["attn.c_proj"]
    assert shortest_suffixes(names[:1], names[1:]) == ["0.attn.c_proj"]
