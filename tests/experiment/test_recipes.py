"""The recipes for Hugging Face models, on a small one with a tokenizer and a chat template of its own."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmtrain.cli.main import main
from tests.helpers.cli import rows

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT = (
    "loop.epochs=null", "loop.max_steps=2", "accumulation.batch_size=4", "accumulation.micro_batch_size=4",
    "loop.eval_batches=1", "precision=fp32", "runtime.num_threads=1",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as ``save_pretrained`` writes it; the working directory is the folder around it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(byte_level / "tokenizer.json"), eos_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained("model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
        )
    ).save_pretrained("model")  # fmt: skip
    return tmp_path / "model"


def test_chat_trains_in_the_models_own_template(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = f"data.path={ROOT / 'data/chats.jsonl'}"
    assert main(["train", "experiment=chat", f"weights.path={model}", path, *SHORT, "run_dir=run"]) == 0
    header = capfd.readouterr().out
    assert "template   the tokenizer's own (data.template=auto)" in header
    assert "warning: data" not in header
    assert main(["generate", "run", "prompt=Hi", "template=run", "max_tokens=3"]) == 0


def test_classification_trains_and_predicts(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = f"data.path={ROOT / 'data/messages.csv'}"
    assert main(["train", "experiment=classification", f"weights.path={model}", path, *SHORT, "run_dir=run"]) == 0
    assert rows(Path("run"))[-1]["labels"] == ["ham", "spam"]
    Path("some.csv").write_text("label,text\nspam,Win a prize\nham,See you at eight\n")
    capfd.readouterr()
    assert main(["predict", "run", "file=some.csv"]) == 0
    output = capfd.readouterr()
    assert [json.loads(line)["text"] for line in output.out.splitlines()] == ["Win a prize", "See you at eight"]
    assert "of 2 with a label), macro-F1" in output.err
    assert "true \\ predicted" in output.err
