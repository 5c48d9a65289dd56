"""``llmtrain export``: what comes out is what was trained, in transformers and PEFT too, or nothing comes out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file

from llmtrain import Run
from llmtrain.base.runtime import Runtime
from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.cli.main import main
from llmtrain.commands import export
from llmtrain.commands.export import DType, Export, Format
from llmtrain.run.load import MovedFiles, load_model
from tests.helpers.cli import TINY
from tests.helpers.tokenizers import pieces as pieces

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
AUTO = (*(override for override in TINY if not override.startswith("model=")), "model=auto", "loop.max_steps=3")
LLAMA: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
} | NO_TOKENS  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2,
} | NO_TOKENS  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(folder / "gpt2")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    llama.save_pretrained(folder / "llama")
    llama.bfloat16().save_pretrained(folder / "llama bf16")
    return folder


@pytest.fixture(scope="session")
def runs(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that trained all weights and runs that trained adapters."""
    folder = tmp_path_factory.mktemp("runs")
    Run.compose(*TINY, "loop.max_steps=3", f"run_dir={folder / 'gpt'}").train()
    for name, *overrides in (
        ("full", "weights.path=llama"),
        ("lora", "weights.path=gpt2", "lora=lora", "optimizer.lr=1e-2"),
        ("dora", "weights.path='llama bf16'", "lora=dora", "lora.targets=[q_proj,mlp.down]", "optimizer.lr=1e-2"),
    ):
        path = overrides[0].replace("weights.path=", "").strip("'")
        others = ["weights=huggingface", f"weights.path='{bases / path}'", *overrides[1:]]
        Run.compose(*AUTO, *others, f"run_dir={folder / name}").train()
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def difference(run: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> float:
    """Of the logits of a run's model and of what transformers makes of an exported directory, and of greedy texts."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with load_model(locate_checkpoint(run), Runtime.for_inference("cpu")) as trained, torch.no_grad():
        ids = torch.from_numpy(trained.tokenizer.encode("So it goes, and goes").astype(np.int64))[None]
        model = trained.model
        export.merge(model, has_output=trained.unit.uses_output_layer)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        ours = model(ids)[..., : model.vocab_size]
        assert ours.argmax(-1).equal(theirs(ids).logits.argmax(-1))
        return (ours - theirs(ids).logits).abs().max().item()


def left_over(folder: Path = Path()) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("name", ["gpt", "full", "lora", "dora"])
def test_an_exported_model_gives_the_same_logits_in_transformers(
    name: str, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / name), "to=out", "dtype=fp32"]) == 0
    told = capfd.readouterr().out
    assert "loaded by this program: logits differ by up to 0\n" in told
    assert "loaded by transformers: logits differ by up to " in told
    assert difference(runs / name, Path("out")) < 1e-5
    assert left_over() == ["out"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        left_over(Path("out"))
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    text = "It's 12 o'clock — été, 你好 🙂"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.eos_token_id == 256
    assert json.loads(Path("out/generation_config.json").read_text())["eos_token_id"] == 256


def test_an_exported_model_can_be_trained_from(runs: Path) -> None:
    assert main(["export", str(runs / "lora"), "to=out"]) == 0
    first = ("weights=huggingface", "weights.path=out", "optimizer.lr=1e-12", "schedule=constant", "run_dir=again")
    assert main(["train", *AUTO, *first]) == 0
    assert main(["export", "again", "to=out2"]) == 0
    before, after = load_file("out/model.safetensors"), load_file("out2/model.safetensors")
    assert before.keys() == after.keys()
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-9


def test_the_exported_dtype_is_the_bases_unless_named(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That of the base where there were adapters, unless one is named; the rounding is told."""
    assert main(["export", str(runs / "dora"), "to=a"]) == 0
    assert "rounded to bfloat16: logits change by up to 0." in capfd.readouterr().out
    assert {tensor.dtype for tensor in load_file("a/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads(Path("a/config.json").read_text())["dtype"] == "bfloat16"
    assert difference(runs / "dora", Path("a"), dtype=torch.bfloat16) < 1e-5
    assert main(["export", str(runs / "full"), "to=b"]) == 0
    assert {tensor.dtype for tensor in load_file("b/model.safetensors").values()} == {torch.float32}
    assert "rounded" not in capfd.readouterr().out


def test_an_export_is_split_into_shards_of_the_size_asked(runs: Path) -> None:
    assert main(["export", str(runs / "gpt"), "to=out", "shard_gb=4e-5"]) == 0
    files = sorted(Path("out").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert difference(runs / "gpt", Path("out")) < 1e-5


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_exported_adapters_give_the_same_logits_in_peft(
    name: str, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import peft

    assert main(["export", str(runs / name), "to=out", "format=peft"]) == 0
    assert "loaded by PEFT: logits differ by up to " in capfd.readouterr().out
    named = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    base = transformers.AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, "out").eval()
    with load_model(locate_checkpoint(runs / name), Runtime.for_inference("cpu")) as trained:
        ids = torch.arange(40)[None]
        with torch.no_grad():
            ours = trained.model(ids)[..., : trained.model.vocab_size]
            assert (ours - theirs(ids).logits).abs().max() < 1e-5
            with theirs.disable_adapter():
                assert (ours - theirs(ids).logits).abs().max() > 1e-2  # it was not the base all the while


def test_the_adapter_of_a_tied_embedding_is_exported(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ("weights=huggingface", f"weights.path={bases / 'gpt2'}")
    lora = ("lora=lora", "lora.targets=[all-linear,embeddings]", "optimizer.lr=1e-2")
    assert main(["train", *AUTO, *base, *lora, "run_dir=run"]) == 0
    assert main(["export", "run", "to=out"]) == 0
    assert "is now a separate matrix: the adapter is for the input alone" in capfd.readouterr().out
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False
    assert difference(Path("run"), Path("out")) < 1e-5


def test_export_takes_a_base_that_has_moved(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bases / "gpt2", "here")
    assert main(["train", *AUTO, "weights=huggingface", "weights.path=here", "lora=lora", "run_dir=run"]) == 0
    Path("here").rename("there")
    assert main(["export", "run", "to=out"]) == 2
    assert "here" in capfd.readouterr().err
    assert sorted(left_over()) == ["run", "there"]
    assert main(["export", "run", "to=out", "weights.path=there"]) == 0


# --- a classifier -------------------------------------------------------------------------------------------------

TEXTS = ["a short one", "and one that is rather longer: été", "!"]


def train_classifier(base: Path, *overrides: str, multi_label: bool = False) -> Path:
    """A run that tells three classes apart."""
    words = ["no", "yes", "maybe|yes" if multi_label else "maybe"]
    lines = [f'"{words[index % 3]} {index} indeed",{words[index % 3]}' for index in range(30)]
    Path("texts.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    assert main([
        "train", *AUTO, f"weights.path={base}", "weights=huggingface", "objective=classification", "data=labelled",
        "data.path=texts.csv", f"data.multi_label={multi_label}", f"objective.multi_label={multi_label}",
        "optimizer.lr=1e-2", "precision=fp32", "run_dir=run", *overrides,
    ]) == 0  # fmt: skip
    return Path("run")


def classes_of(run: Path, texts: list[str]) -> torch.Tensor:
    """Probabilities as ``llmtrain predict`` has them."""
    from llmtrain.commands.predict import Predictor

    with load_model(locate_checkpoint(run), Runtime.for_inference("cpu")) as trained:
        return Predictor.of(trained, 0.5, run).probabilities(texts)


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("gpt2", []),
        ("llama", []),
        ("gpt2", ["data.append_end_of_text=false", "objective.train=all"]),
        ("gpt2", ["data.multi_label=true", "objective.multi_label=true"]),
        ("llama", ["lora=lora", "objective.train=all"]),
    ],
)
def test_an_exported_classifier_predicts_the_same_in_transformers(
    base: str, overrides: list[str], bases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    multi_label = "data.multi_label=true" in overrides
    run = train_classifier(bases / base, *overrides, multi_label=multi_label)
    assert main(["export", str(run), "to=out"]) == 0
    assert "loaded by transformers: logits differ" in capfd.readouterr().out
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert theirs.config.label2id == {"maybe": 0, "no": 1, "yes": 2}
    assert theirs.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert theirs.config.problem_type == f"{'multi' if multi_label else 'single'}_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    expected = classes_of(run, TEXTS)
    for texts in (TEXTS, TEXTS[:1]):  # a batch: neither what ends a text nor what pads it is mistaken for the other
        with torch.no_grad():
            logits = theirs(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits
        found = logits.sigmoid() if multi_label else logits.softmax(1)
        torch.testing.assert_close(found, expected[: len(texts)], atol=1e-5, rtol=0)
    long = "word " * 50  # is cut as in training: its end is still marked
    ids = tokenizer(long, truncation=True)["input_ids"]
    assert len(ids) == 32
    assert (ids[-1] == 256) == ("data.append_end_of_text=false" not in overrides)


def test_exported_adapters_of_a_classifier_predict_the_same_in_peft(
    bases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import peft

    run = train_classifier(bases / "gpt2", "lora=lora", "objective.train=all")
    assert main(["export", str(run), "to=out", "format=peft"]) == 0
    told = capfd.readouterr().out
    assert "loaded by PEFT: logits differ" in told
    assert "classified one at a time" in told  # GPT-2 has one special token, and it ends a text
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bases / "gpt2", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(base, "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    for text, expected in zip(TEXTS, classes_of(run, TEXTS), strict=True):
        with torch.no_grad():
            found = theirs(**tokenizer(text, truncation=True, return_tensors="pt")).logits.softmax(1)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_classifier_without_counterpart_in_transformers_is_refused(
    bases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.model import LanguageModel

    run = train_classifier(bases / "llama")
    with load_model(locate_checkpoint(run), Runtime.for_inference("cpu")) as trained:
        model: Any = trained.model
        assert isinstance(model, LanguageModel)
        model.config = replace(model.config, normalised_head=True, fused_qkv=True, num_kv_heads=4)
        Path("out").mkdir()
        settings = Export("elsewhere", Format.huggingface, None, 5.0, MovedFiles(None), MovedFiles(None), [])
        with pytest.raises(ValueError, match="objective=classification: baichuan has no classifier in transformers"):
            export.write_model(settings, trained, Path("out"))


# --- what it was taught -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["Q: {prompt}\nA: {response}\n", "chatml"])
def test_an_export_holds_the_chat_template(template: str, bases: Path) -> None:
    """``apply_chat_template`` gives the ids that ``chat`` asks with."""
    from llmtrain.data.chat.encoder import ConversationEncoder
    from llmtrain.data.chat.template import Message
    from llmtrain.run.text_generation import template_of

    rows = [{"instruction": f"Say {index}.", "input": "", "output": str(index)} for index in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ("objective=instruction", "data=instruction", "data.path=rows.jsonl", f"data.template={template}",
                 "data.sequence_length=64", "weights=huggingface", f"weights.path={bases / 'gpt2'}")  # fmt: skip
    assert main(["train", *AUTO, *overrides, "run_dir=run"]) == 0
    assert main(["export", "run", "to=out"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    asked = [{"role": "user", "content": "Say 7."}]
    theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    with load_model(locate_checkpoint(Path("run")), Runtime.for_inference("cpu")) as trained:
        encoder = ConversationEncoder(trained.tokenizer)
        parts = template_of(trained, None, None).render([Message("user", "Say 7.")], add_generation_prompt=True)
        assert encoder.prompt(parts) == theirs


def instructed(base: Path, *overrides: str, length: int = 128) -> None:
    """Train a run on a few conversations, from the checkpoint ``base``."""
    turns = [["Say {}.", "{} it is."], ["And again?", "{}, again."]]
    rows = [
        {"messages": [{"role": role, "content": text.format(index)} for turn in turns[: 1 + index % 2]
                      for role, text in zip(("user", "assistant"), turn, strict=True)]}
        for index in range(12)
    ]  # fmt: skip
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [override for override in AUTO if not override.startswith(("tokenizer=", "data."))]
    data = ("objective=instruction", "data=instruction", "data.path=rows.jsonl", f"data.sequence_length={length}")
    assert main(["train", *plain, *data, "weights=huggingface", f"weights.path={base}", "run_dir=run", *overrides]) == 0


@pytest.fixture
def chat_base(pieces: Path, tmp_path: Path) -> Path:
    """A base with its tokenizer, whose files say more than an export would by itself."""
    shutil.copytree(pieces, tmp_path / "base")
    sizes = LLAMA | {"vocab_size": 800, "bos_token_id": 1, "eos_token_id": [2, 7], "max_position_embeddings": 128}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    generation = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9,
                  "do_sample": True}  # fmt: skip
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path / "base"


def test_an_export_keeps_the_files_of_its_base(chat_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tokenizer is the base's, since none was named; conversations have the ids of training in transformers."""
    instructed(chat_base, "data.template=tokenizer", "model.context_length=64", length=64)
    stored = yaml.safe_load(Path("run/config.yaml").read_text())["tokenizer"]
    assert stored["_target_"].endswith("HuggingFace")
    assert stored["path"] == str(chat_base)
    assert f"tokenizer  huggingface, {chat_base}" in capfd.readouterr().out
    assert main(["export", "run", "to=out"]) == 0
    out = capfd.readouterr().out
    assert "texts, and conversations of 1 to 3 turns, have the tokens of training" in out
    assert "in the base" not in out  # nothing has changed
    kept = json.loads((chat_base / "generation_config.json").read_text())
    written = json.loads(Path("out/generation_config.json").read_text())
    assert {key: written[key] for key in kept} == kept
    config = json.loads(Path("out/config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (128, [2, 7])
    assert Path("out/tokenizer.json").read_bytes() == (chat_base / "tokenizer.json").read_bytes()
    template = json.loads((chat_base / "tokenizer_config.json").read_text())["chat_template"]
    assert Path("out/chat_template.jinja").read_text() == template


def test_an_export_says_what_it_changes_of_its_base(chat_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    template = "data.template='{prompt}\\n\\n{response}'"
    instructed(chat_base, template, "tokenizer=huggingface", f"tokenizer.path={chat_base}",
               "tokenizer.end_of_text='<unk>'")  # fmt: skip
    assert main(["export", "run", "to=out"]) == 0
    out = capfd.readouterr().out
    assert "config.json: eos_token_id=0, in the base [2, 7]" in out
    assert "generation_config.json: eos_token_id=[2, 7, 0], in the base [2, 7]" in out
    assert "chat_template.jinja: data.template=" in out
    assert "which the run was trained in; no longer the tokenizer's own" in out


def test_an_export_whose_conversations_differ_is_refused(chat_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    instructed(chat_base, "data.template=tokenizer", "data.split_at_responses=true")
    what = "a conversation of 1 turn: from token 2 on training sees '[' "
    assert "data.split_at_responses=true: transformers would give the trained model other tokens" in (
        capfd.readouterr().err + Path("run/train.log").read_text()
    )
    assert main(["export", "run", "to=out"]) == 1
    error = capfd.readouterr().err
    assert what.replace(":", " becomes other tokens in transformers:") in error
    assert "transformers ' [' " in error
    assert not Path("out").exists()


def test_text_is_served_as_it_was_trained(pieces: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Documents begin with the token that the tokenizer puts before a text, and so do prompts."""
    plain = [override for override in TINY if not override.startswith(("tokenizer=", "model="))]
    overrides = ("model=llama_tiny", "tokenizer=huggingface", f"tokenizer.path={pieces}", "loop.max_steps=2")
    run = Run.compose(*plain, *overrides, "run_dir=run")
    tokenizer = run.build_tokenizer()
    stream = run.data.build(tokenizer).train.gather(np.arange(500)).inputs.ravel()
    assert stream[0] == tokenizer.bos == 1
    assert {1} == set(stream[1:][stream[:-1] == tokenizer.end_of_text].tolist())  # each document
    run.train()
    assert main(["export", "run", "to=out"]) == 0
    assert "texts have the tokens of training" in capfd.readouterr().out
    assert transformers.AutoTokenizer.from_pretrained("out")("So it goes")["input_ids"] == tokenizer.encode_prompt(
        "So it goes"
    )


def test_a_tokenizer_may_have_more_special_tokens_than_the_model_has_rows(
    chat_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = tokenizers.Tokenizer.from_file(str(chat_base / "tokenizer.json"))
    library.add_special_tokens(["<|im_end|>"])
    library.save(str(chat_base / "tokenizer.json"))
    instructed(chat_base, "data.template=tokenizer")
    capfd.readouterr()
    assert main(["export", "run", "to=out"]) == 0
    data = ("objective=instruction", "data=instruction", "data.path=rows.jsonl", "data.template=chatml",
            "data.sequence_length=128")  # fmt: skip
    plain = [override for override in AUTO if not override.startswith(("tokenizer=", "data."))]
    weights = ("weights=huggingface", f"weights.path={chat_base}")
    assert main(["train", *plain, *data, *weights, "run_dir=other"]) == 2
    error = capfd.readouterr().err
    assert (
        "rows.jsonl:1: model.vocab_size=800: the token '<|im_end|>' has the id 800, for which the model has no" in error
    )
    assert not Path("other").exists()
    assert main(["train", *plain, *data, *weights, "tokenizer=gpt2", "run_dir=other"]) == 2
    error = capfd.readouterr().err
    assert "tokenizer=gpt2 has 50257 ids; the weights are of another tokenizer" in error
    assert "tokenizer=huggingface tokenizer.path=DIR" in error


@pytest.mark.parametrize("windowed", [False, True])
def test_a_qwen_with_another_tokenizer_is_exported_or_warned_of(
    windowed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Transformers reads any tokenizer beside a ``qwen2`` as Qwen's."""
    overrides = ["model=llama_tiny", "model.qkv_bias=true", "loop.max_steps=1", "run_dir=run"]
    plain = [override for override in TINY if not override.startswith("model=")]
    assert main(["train", *plain, *overrides, *["model.sliding_window=8"] * windowed]) == 0
    captured = capfd.readouterr()
    warned = "llmtrain export will refuse this run: model.qkv_bias=true" in captured.out + captured.err
    assert warned == windowed
    assert main(["export", "run", "to=out"]) == 2 * windowed
    if not windowed:
        assert json.loads(Path("out/config.json").read_text())["model_type"] == "llama"
        assert "conversations" not in capfd.readouterr().out


# --- nothing comes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "to: name the directory to write, as in: llmtrain export RUN to=my-model"),
        (["to=full"], "to=full: not empty, and nothing is overwritten; name a new directory"),
        (["to=file"], "to=file: something that is not a directory has this name"),
        (["to=link"], "to=link: something that is not a directory has this name"),
        (["to=out", "format=gguf"], "format"),
        (["to=out", "format=peft"], "format=peft: this run trained the weights themselves"),
        (["to=out", "format=peft", "dtype=bf16"], "dtype=bf16: adapters are written as they were trained"),
        (["to=out", "dtype=int8"], "dtype"),
        (["to=out", "shard_gb=0"], "shard_gb=0.0: must be positive"),
        (["to=out", "weights.path=there"], "weights.path=there: "),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(
    arguments: list[str], message: str, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full/mine").touch()
    Path("file").touch()
    Path("link").symlink_to("elsewhere")
    before = sorted(left_over())
    assert main(["export", str(runs / "gpt"), *arguments]) == 2
    assert message in capfd.readouterr().err
    assert sorted(left_over()) == before
    assert left_over(Path("full")) == ["mine"]


def test_a_model_that_transformers_cannot_compute_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    Run.compose(*TINY, "model.logit_softcap=30", "loop.max_steps=1", "run_dir=run").train()
    assert main(["export", "run", "to=out"]) == 2
    assert "model.logit_softcap=30.0: GPT-2 in transformers has none" in capfd.readouterr().err
    assert left_over() == ["run"]


def test_an_empty_directory_is_written_to(runs: Path) -> None:
    Path("out").mkdir()
    assert main(["export", str(runs / "gpt"), "to=out"]) == 0
    assert (Path("out") / "model.safetensors").is_file()


@pytest.mark.parametrize("harm", ["weights", "names", "nan"])
def test_an_export_that_differs_is_removed(
    harm: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A disk that flips a bit of a weight, two layers under one another's names, a model that is broken itself."""
    write = export.write_checkpoint

    def harmed(unit: Any, folder: Path, *arguments: Any, **options: Any) -> None:
        from safetensors.torch import save_file

        if harm == "nan":
            with torch.no_grad():
                unit.model.final_norm.weight.fill_(torch.nan)
        write(unit, folder, *arguments, **options)
        tensors = load_file(folder / "model.safetensors")
        one, other = "transformer.h.0.attn.c_proj.weight", "transformer.h.1.attn.c_proj.weight"
        if harm == "weights":
            tensors[one][3, 5] += 1.0
        elif harm == "names":
            tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "write_checkpoint", harmed)
    assert main(["export", str(runs / "gpt"), "to=out"]) == 1
    captured = capfd.readouterr()
    assert "not written: loaded by this program, its logits differ by up to " in captured.out + captured.err
    assert left_over() == []


def test_the_keys_are_those_of_its_yaml() -> None:
    assert set(export.STORED.values()) == set(DType)
    assert yaml.safe_load((Path(__file__).parents[2] / "conf" / "export.yaml").read_text()).keys() == {
        "_target_", *Export.__dataclass_fields__
    }  # fmt: skip
