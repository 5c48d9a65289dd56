"""Weights and architecture from a directory, through the real command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from llmtrain import Run
from llmtrain.base.tensor_files import read_tensors
from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.cli.main import main
from llmtrain.hf.directory import SAMPLE, CheckpointDirectory, download, fingerprint, locate_directory
from tests.helpers.cli import TINY, rows

TRAIN = (*(override for override in TINY if not override.startswith("model=")), "loop.max_steps=1")
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2: dict[str, Any] = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2} | NO_TOKENS
# The same sizes as a model of ours
GPT = (
    "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.context_length=64",
)  # fmt: skip


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(folder / "gpt2")
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    } | NO_TOKENS  # fmt: skip
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    llama.save_pretrained(folder / "llama")
    llama.save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.fixture
def gpt2(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test can harm."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved / "gpt2", tmp_path / "gpt2"))


def refused(*arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What the command says as it refuses, having made no run."""
    assert main(["train", *TRAIN, *arguments]) == 2
    assert not Path("runs").exists()
    (line,) = capfd.readouterr().err.strip().splitlines()
    return line


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of a ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retouch(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a checkpoint; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


# --- a run --------------------------------------------------------------------------------------------------------


def test_the_architecture_is_stored_and_the_checkpoint_needed_no_longer(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "llama", "base")
    base = ("model=auto", "weights=huggingface", "weights.path=base", "run_dir=run")
    assert main(["train", *TRAIN, *base, "model.dropout=0.1"]) == 0
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["model"]["_target_"] == "llmtrain.model.llama.LlamaConfig"
    expected = {"num_layers": 2, "hidden_size": 32, "num_kv_heads": 2, "context_length": 4096, "vocab_size": 300,
                "dropout": 0.1, "tie_embeddings": False}  # fmt: skip
    assert stored["model"] == stored["model"] | expected
    assert stored["data"]["sequence_length"] == 32
    shutil.rmtree("base")
    assert main(["generate", "run", "prompt=It is", "max_tokens=3", "device=cpu"]) == 0
    assert main(["resume", "run", "loop.max_steps=2"]) == 0
    assert len([row for row in rows(Path("run")) if "loss" in row]) == 2


def test_sequences_are_no_longer_than_1024_unless_asked_for(saved: Path) -> None:
    auto = ("model=auto", "tokenizer=byte", f"model.path={saved / 'llama'}")
    run = Run.compose(*auto)
    assert (run.model.context_length, run.data.sequence_length) == (4096, 1024)
    assert Run.compose(*auto, "data.sequence_length=2000").data.sequence_length == 2000
    assert Run.compose(*auto, "model.context_length=100").data.sequence_length == 100
    assert Run.compose(*auto[:2], f"model.path={saved / 'gpt2'}").data.sequence_length == 64


def test_the_first_step_starts_from_the_weights(saved: Path, tmp_path: Path) -> None:
    """A run whose learning rate is next to nothing ends with the weights that it began with."""
    for name in ("gpt2", "llama", "shards"):
        run = Run.compose(
            *TRAIN, "model=auto", "weights=huggingface", f"weights.path={saved / name}", f"run_dir={tmp_path / name}",
            "optimizer.lr=1e-12", "schedule=constant", "optimizer.weight_decay=0",
        )  # fmt: skip
        run.train()
        ours = read_tensors(locate_checkpoint(tmp_path / name) / "model.safetensors")
        theirs = load_file(saved / ("gpt2" if name == "gpt2" else "llama") / "model.safetensors")
        pairs = {"gpt2": ("blocks.1.mlp.up.weight", "transformer.h.1.mlp.c_fc.weight"),
                 "llama": ("blocks.1.mlp.up.weight", "model.layers.1.mlp.up_proj.weight")}  # fmt: skip
        our, their = pairs["gpt2" if name == "gpt2" else "llama"]
        expected = theirs[their].T if name == "gpt2" else theirs[their]
        torch.testing.assert_close(ours[our], expected, atol=1e-9, rtol=0)
        assert len(ours["token_embedding.weight"]) == (257 if name == "gpt2" else 300)


def test_fewer_positions_are_taken_and_reported(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=auto", "model.context_length=32", "weights=huggingface", "weights.path=gpt2", "run_dir=run"]
    assert main(["train", *TRAIN, *arguments]) == 0
    assert "of its 64 positions the first 32 are used" in capfd.readouterr().err


def test_an_untied_model_starts_from_the_embedding(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=auto", "model.tie_embeddings=false", "weights=huggingface", "weights.path=gpt2", "run_dir=run"]
    assert main(["train", *TRAIN, *arguments, "optimizer.lr=1e-12", "schedule=constant"]) == 0
    assert "it starts as a copy" in capfd.readouterr().err
    ours = read_tensors(locate_checkpoint(Path("run")) / "model.safetensors")
    torch.testing.assert_close(ours["head.weight"], ours["token_embedding.weight"], atol=1e-9, rtol=0)


def test_settings_other_than_the_checkpoints_are_reported(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "llama", "base")
    assert main(["train", *TRAIN, "model=auto", "model.path=base", "weights=scratch", "run_dir=sizes"]) == 0
    sizes = yaml.safe_load(Path("sizes/config.yaml").read_text())["model"]
    edit(Path("base"), rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, strange=7)
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/mine.yaml").write_text(yaml.safe_dump(sizes))
    arguments = ["--config-dir", "conf", "model=mine", "weights=huggingface", "weights.path=base", "run_dir=run"]
    assert main(["train", *TRAIN, *arguments]) == 0
    told = capfd.readouterr().err
    assert "model.rope_theta=10000.0, in base/config.json it is 500000.0" in told
    assert "base/config.json: strange=7 is unknown and was ignored" in told


# --- refused ------------------------------------------------------------------------------------------------------

WEIGHTS = ("weights=huggingface", "weights.path=gpt2")


def test_tensors_that_do_not_fit_are_listed(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    retouch(
        gpt2, transformer__ln_f__bias=None, transformer__h__0__ln_1__weight=torch.ones(31), extra=torch.ones(2),
        another=torch.ones(2),
    )  # fmt: skip
    line = refused(*GPT, *WEIGHTS, capfd=capfd)
    assert line.startswith("llmtrain: weights.path=gpt2: does not fit the model: ")
    assert "transformer.h.0.ln_1.weight is (31,), the model's is (32,)" in line
    assert "transformer.ln_f.bias is missing" in line
    assert "another is unknown (and 1 more)" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=4", "model.num_heads=4 (2 there): not as in gpt2/config.json; take model=auto"),
        ("model.num_layers=3", "model.num_layers=3 (2 there)"),
        ("model.context_length=128", "transformer.wpe.weight has 64 positions, model.context_length=128: the model is "
         "longer than its positions; take model.context_length=64"),
        ("model.vocab_size=300", "is (257, 32), the model's is (300, 32); model.vocab_size=257, or model=auto"),
        ("model.qkv_bias=false", "c_attn.bias is not 0, and the model has no such bias"),
    ],
)  # fmt: skip
def test_weights_of_another_size_are_refused(
    gpt2: Path, override: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    retouch(gpt2, transformer__h__0__attn__c_attn__bias=torch.ones(96))
    key, _ = override.split("=")
    ours = (each for each in GPT if not each.startswith(f"{key}="))
    assert message in refused(*ours, override, *WEIGHTS, capfd=capfd)


def test_weights_of_another_family_are_refused(saved: Path, gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(*GPT, "weights=huggingface", f"weights.path={saved / 'llama'}", capfd=capfd)
    assert "model_type=llama, and the model is a GPT; take model=auto" in line


def test_an_untied_head_is_not_lost(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    embedding = load_file(gpt2 / "model.safetensors")["transformer.wte.weight"]
    retouch(gpt2, lm_head__weight=embedding + 1)
    assert "take model.tie_embeddings=false" in refused("model=auto", *WEIGHTS, capfd=capfd)
    assert main(["train", *TRAIN, "model=auto", "model.tie_embeddings=false", *WEIGHTS, "run_dir=run"]) == 0
    retouch(gpt2, lm_head__weight=embedding.clone())  # the embedding once more
    assert main(["train", *TRAIN, "model=auto", *WEIGHTS, "run_dir=run2"]) == 0


def test_a_context_longer_than_the_positions_is_refused(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused("model=auto", "model.context_length=100", *WEIGHTS, capfd=capfd)
    assert "model.context_length=100: the model would be longer than its positions, 64 in gpt2/config.json" in line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused(gpt2: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (gpt2 / "model.safetensors").rename(gpt2 / name)
    line = refused("model=auto", *WEIGHTS, capfd=capfd)
    assert f"gpt2/{name}: a pickle" in line
    assert "M.from_pretrained('gpt2').save_pretrained('gpt2-safetensors', safe_serialization=True)" in line


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_cut_file_is_refused(gpt2: Path, size: int, capfd: pytest.CaptureFixture[str]) -> None:
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "gpt2/model.safetensors: cut or damaged" in refused("model=auto", *WEIGHTS, capfd=capfd)


def test_a_file_cut_while_it_is_read_is_refused(gpt2: Path) -> None:
    """It is read and not mapped: an error, where a map would end the process."""
    with CheckpointDirectory(gpt2) as directory:
        last = max(directory.shapes, key=lambda name: directory._where[name].start)
        file = gpt2 / "model.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 4)
        with pytest.raises(ValueError, match=f"{last} cannot be read, the file was cut meanwhile"):
            directory.read(last)


def test_quantised_weights_are_refused(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    retouch(gpt2, transformer__ln_f__bias=torch.ones(32, dtype=torch.int8))
    assert "transformer.ln_f.bias is I8, not a floating-point" in refused("model=auto", *WEIGHTS, capfd=capfd)


def test_damaged_shards_are_refused(saved: Path, gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(saved / "shards", "shards"))
    weights = ("model=auto", "weights=huggingface", "weights.path=shards")
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    text = index.read_text()
    (folder / names[0]).rename(folder / "aside")
    line = refused(*weights, capfd=capfd)
    assert f"shards/{names[0]}: missing; model.safetensors.index.json lists {len(names)} files" in line
    (folder / "aside").rename(folder / names[0])

    listed = json.loads(text)
    listed["weight_map"]["model.phantom.weight"] = names[0]
    index.write_text(json.dumps(listed))
    assert "lists model.phantom.weight, which is in no file" in refused(*weights, capfd=capfd)
    listed["weight_map"] = {"lm_head.weight": "../outside.safetensors"}
    index.write_text(json.dumps(listed))
    assert "'../outside.safetensors' is not the name of a safetensors file" in refused(*weights, capfd=capfd)
    index.write_text(text[:100])
    assert "model.safetensors.index.json: cut or damaged" in refused(*weights, capfd=capfd)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, 'gpt2/config.json: model_type="mamba": not a known family; the known ones are: '),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "architectures="),
        ({"activation_function": "relu"}, 'activation_function="relu": must be gelu_new'),
    ],
)
def test_unknown_architectures_are_refused(
    gpt2: Path, changes: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(gpt2, **changes)
    assert message in refused("model=auto", *WEIGHTS, capfd=capfd)
    assert message in refused(*GPT, *WEIGHTS, capfd=capfd)


def test_a_folder_without_weights_is_refused(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path, message in (
        ("empty", "empty: there is no config.json in it"),
        ("gpt2/config.json", "gpt2/config.json: a file; give its directory"),
        ("nowhere", f"nowhere: no such directory in {Path.cwd()}, and no name of a model on the hub either"),
        ("../no/where", "../no/where: no such directory in "),
        ("nobody/nothing", "nobody/nothing: no such directory, and the download from the Hugging Face hub failed"),
    ):
        assert message in refused("model=auto", "weights=huggingface", f"weights.path={path}", capfd=capfd), path
    assert "or published weights, weights=huggingface weights.path=DIR" in refused("model=auto", capfd=capfd)
    assert "weights.path" in refused("model=auto", "weights=huggingface", capfd=capfd)
    (gpt2 / "model.safetensors").unlink()
    assert "gpt2: it holds neither model.safetensors nor" in refused("model=auto", *WEIGHTS, capfd=capfd)


def test_from_the_hub_only_data_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of huggingface_hub: the one call that a machine without a network cannot make."""
    import huggingface_hub

    asked = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate_directory("org/name@v1.0") == tmp_path
    assert asked["name"] == "org/name"
    assert asked["revision"] == "v1.0"
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])
    download.cache_clear()


# --- the fingerprint ----------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content_alone(gpt2: Path, saved: Path) -> None:
    before = fingerprint(gpt2)
    gpt2.rename("elsewhere")
    folder = Path("elsewhere")
    assert fingerprint(folder) == before
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(folder) != before
    assert len({fingerprint(saved / name) for name in ("gpt2", "llama", "shards")}) == 3


def test_the_fingerprint_of_a_large_file_follows_its_parts(gpt2: Path) -> None:
    """The first and the last byte count, and every 64 KiB block that is looked at in between."""
    file = gpt2 / "model.safetensors"
    size = 70 * SAMPLE
    file.write_bytes(bytes(size))
    before = fingerprint(gpt2)
    found = set()
    for place in (0, size - 1, (size - SAMPLE) * 31 // 63):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"\1")
        found.add(fingerprint(gpt2))
        file.write_bytes(bytes(size))
    assert len(found - {before}) == 3
    file.write_bytes(bytes(size + 1))
    assert fingerprint(gpt2) != before


def test_buffers_of_old_versions_are_dropped_whatever_their_type(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Causal masks and positions that transformers once saved: booleans, bytes, 64-bit integers."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "gpt2", tmp_path / "masked")
    path = tmp_path / "masked" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
    tensors["transformer.h.1.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["transformer.position_ids"] = torch.arange(8)
    tensors["transformer.h.1.attn.rotary_emb.inv_freq"] = torch.arange(8)
    save_file(tensors, path, metadata={"format": "pt"})
    base = ("model=auto", "weights=huggingface", f"weights.path={tmp_path / 'masked'}", "run_dir=run")
    assert main(["train", *TRAIN, *base]) == 0
    save_file(tensors | {"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2).byte()}, path)
    assert main(["train", *TRAIN, *base[:-1], "run_dir=other"]) == 2
    assert "transformer.h.0.attn.c_attn.weight is U8" in capfd.readouterr().err
