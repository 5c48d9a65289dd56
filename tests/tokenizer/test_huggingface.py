"""``tokenizer=huggingface`` against transformers, and where it goes further."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtrain.tokenizer import CUTS
from llmtrain.tokenizer import huggingface as module
from llmtrain.tokenizer.huggingface import HuggingFace, HuggingFaceTokenizer
from tests.helpers.cli import TINY, llmtrain, only_run
from tests.helpers.tokenizers import CORPUS, random_texts, save


def load(path: Path, end_of_text: str | None = None, *, version: int = 2) -> HuggingFaceTokenizer:
    return HuggingFace(path=str(path), end_of_text=end_of_text, version=version).build()


@pytest.fixture(params=["byte_level", "unigram"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def changed(byte_level: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the small GPT-2's file with other parts."""

    def change(**parts: Any) -> Path:
        spec = json.loads((byte_level / "tokenizer.json").read_text())
        spec["model"] |= parts.pop("model", {})
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(spec | parts))
        return path

    return change


# --- ids ---------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ["", *random_texts(1500), CORPUS[:200_000]]:
        ids = ours.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text


def test_special_tokens_in_a_text_are_ordinary_characters(folder: Path) -> None:
    tokenizer = load(folder)
    special = set(tokenizer.special_tokens.values())
    for name in tokenizer.special_tokens:
        text = f"a {name}b{name} {name}"
        ids = tokenizer.encode(text).tolist()
        assert not special & set(ids)
        assert tokenizer.decode(ids).lstrip(" ") == text


def test_special_tokens_of_a_template_have_their_ids(folder: Path) -> None:
    tokenizer, theirs = load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.special_tokens
    for name, id in tokenizer.special_tokens.items():
        assert theirs(name, add_special_tokens=False)["input_ids"] == [id]


def test_added_tokens_that_are_text_stay_tokens(byte_level: Path) -> None:
    tokenizer = load(byte_level)
    assert "<think>" not in tokenizer.special_tokens
    assert len(tokenizer.encode("<think>")) == 1


def test_vocabulary_end_of_text_and_special_tokens_are_those_of_the_file(byte_level: Path, unigram: Path) -> None:
    one, other = load(byte_level), load(unigram)
    assert (one.vocab_size, one.end_of_text, one.bos) == (701, 0, None)
    assert dict(one.special_tokens) == {"<|endoftext|>": 0, "<|im_start|>": 1}
    assert (other.end_of_text, other.bos, other.prefix) == (2, None, ())  # it has a <s>, and puts it before no text
    assert other.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert dict(other.special_tokens) == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert load(byte_level / "tokenizer.json").fingerprint == one.fingerprint


def test_the_vocabulary_reaches_to_the_largest_id(changed: Callable[..., Path]) -> None:
    path = changed()
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["zz"] = 900  # files leave ids out
    path.write_text(json.dumps(spec))
    tokenizer = load(path, "<|endoftext|>")
    assert tokenizer.vocab_size == 901
    assert tokenizer.decode([800, 900, 5000]) == "\ufffdzz\ufffd"


def test_truncation_padding_and_template_of_a_file_are_ignored(changed: Callable[..., Path], byte_level: Path) -> None:
    """Files are saved with truncation, padding and dropout; none is part of a text's ids."""
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    spec = json.loads(tokenizer.to_str())
    path = changed(model={"dropout": 0.5}, **{key: spec[key] for key in ("truncation", "padding")})
    one, other = load(path, "<|endoftext|>"), load(byte_level)
    assert one.encode(CORPUS[:2000]).tolist() == other.encode(CORPUS[:2000]).tolist()
    assert one.fingerprint == other.fingerprint


def test_several_threads_encode_the_same(folder: Path) -> None:
    tokenizer = load(folder)
    texts = list(random_texts(200, seed=3))
    expected = [tokenizer.encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(tokenizer.encode, texts)] == expected


# --- long texts --------------------------------------------------------------------------------------------------


def test_long_texts_are_cut_without_a_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(folder)
    assert tokenizer.cuts
    texts = [*random_texts(300, seed=1), CORPUS[:100_000], "x" * 500]
    whole = [tokenizer.encode(text).tolist() for text in texts]
    has_ties = json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "Unigram"
    for stretch in (10, 77):
        monkeypatch.setattr(module, "STRETCH", stretch)
        for text, ids in zip(texts, whole, strict=True):
            cut = tokenizer.encode(text).tolist()
            if not has_ties:
                assert cut == ids
                continue
            # Two splits of a word may have the same score, and its sum in fp32, over all before it, then decides.
            assert tokenizer.decode(cut) == tokenizer.decode(ids)
            assert abs(len(cut) - len(ids)) <= len(ids) // 1000 + 1


def test_a_continued_text_has_no_space_before_it(unigram: Path, byte_level: Path) -> None:
    tokenizer = load(unigram)
    assert tokenizer.decode(tokenizer.encode("the word")) == " the word"
    assert tokenizer.decode(tokenizer.encode_continuation("the word")) == "the word"
    same = load(byte_level)
    assert same.encode_continuation("the").tolist() == same.encode("the").tolist()


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": pattern}}, BYTES]}


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
}


@pytest.mark.parametrize(
    ("parts", "safe"),
    [
        ({}, True),
        ({"pre_tokenizer": split_by(LLAMA_3)}, True),
        ({"pre_tokenizer": split_by(LLAMA_3.replace("{1,3}", "")), "normalizer": {"type": "NFC"}}, True),
        ({"pre_tokenizer": DIGITS}, True),  # as of SmolLM
        ({"pre_tokenizer": split_by(r".{5}|.+")}, False),
        ({"pre_tokenizer": BYTES | {"use_regex": True, "add_prefix_space": True}}, False),  # after <think> as well
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, False),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "e "}, "content": "e"}}, False),
    ],
)
def test_texts_are_cut_where_that_is_known_to_be_safe(
    changed: Callable[..., Path], parts: dict[str, Any], safe: bool
) -> None:
    tokenizer = load(changed(**parts), "<|endoftext|>")
    assert bool(tokenizer.cuts) == safe
    differ = cuts = 0
    for text in random_texts(1500, seed=2):
        text = text.replace("!?", "<think>x")
        for cut in tokenizer.cuts or CUTS:
            if match := cut.match(text):
                cuts += 1
                parts_ids = [tokenizer.encode(text[: match.end()]), tokenizer.encode_continuation(text[match.end() :])]
                differ += np.concatenate(parts_ids).tolist() != tokenizer.encode(text).tolist()
    assert cuts > 1000
    assert (differ == 0) == safe  # what is called unsafe is


@pytest.mark.parametrize(("content", "cuts"), [("x y", 0), ("[1.]", 1), ("[1", 1), ("  ", 1)])
def test_tokens_that_span_words_are_never_cut(byte_level: Path, tmp_path: Path, content: str, cuts: int) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    tokenizer.add_tokens([content])  # beside <think>, which has an end of a word before its last character
    assert len(load(save(tmp_path, tokenizer, eos_token="<|endoftext|>")).cuts) == cuts
    tokenizer.add_tokens([tokenizers.AddedToken("abc", single_word=True)])
    assert load(save(tmp_path, tokenizer, eos_token="<|endoftext|>")).cuts == ()


# --- and back ----------------------------------------------------------------------------------------------------


def test_text_streamed_by_token_equals_the_whole(folder: Path) -> None:
    """Token by token, bytes join to the decode of the whole, and that is the text."""
    tokenizer = load(folder)
    for text in random_texts(800, seed=4):
        ids = tokenizer.encode(text).tolist()
        pieces = [tokenizer.decode_bytes([id]) for id in ids]
        assert b"".join(pieces) == tokenizer.decode_bytes(ids)
        begins = " " if folder.name.startswith("unigram") and not text.startswith((" ", "▁")) else ""
        composed = tokenizers.normalizers.NFC().normalize_str(text) if begins or "unigram" in folder.name else text
        assert tokenizer.decode(ids) == begins + composed.replace("▁", " ")


def test_text_is_put_together_as_by_the_library(folder: Path) -> None:
    tokenizer, theirs = load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in random_texts(800, seed=5):
        ids = tokenizer.encode(text).tolist()
        decoded = theirs.decode(ids, skip_special_tokens=False)
        text = tokenizer.decode(ids)
        assert (text.removeprefix(" ") if folder.name.startswith("unigram") else text) == decoded


def test_special_tokens_are_their_names(folder: Path) -> None:
    tokenizer = load(folder)
    names, ids = zip(*tokenizer.special_tokens.items(), strict=True)
    assert tokenizer.decode(list(ids)) == "".join(names)


def test_a_wordpiece_decoder_streams(tmp_path: Path) -> None:
    """BERT's, whose tokens tell whether a space comes before them."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        [CORPUS[:60_000].lower()],
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[SEP]"], show_progress=False),
    )
    ours = load(save(tmp_path, tokenizer, eos_token="[SEP]"))
    ids = ours.encode("It's the value, don't convert!").tolist()
    assert "".join(ours.decode([id]) for id in ids) == f" {tokenizer.decode(ids)}"
    assert ours.cuts is CUTS


def test_a_decoder_that_cannot_stream_is_refused(changed: Callable[..., Path]) -> None:
    path = changed(decoder={"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True})
    with pytest.raises(ValueError, match=r"tokenizer\.json: its decoder has a step CTC"):
        load(path, "<|endoftext|>").decode([5])


# --- the files beside it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "end", "bos"),
    [
        ("tokenizer_config.json", {"eos_token": "<|im_start|>"}, 1, None),
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_start|>"}, "bos_token": "<|endoftext|>"}, 1, 0),
        ("special_tokens_map.json", {"eos_token": "<|im_start|>"}, 1, None),
        ("config.json", {"eos_token_id": 1, "bos_token_id": 0}, 1, 0),
        ("generation_config.json", {"eos_token_id": [1, 0]}, 1, None),
        ("tokenizer_config.json", {"eos_token": "the"}, None, None),  # an ordinary word made special
    ],
)
def test_the_end_of_text_is_found_in_the_files_beside_it(
    changed: Callable[..., Path], tmp_path: Path, name: str, content: dict[str, Any], end: int | None, bos: int | None
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load(changed(), version=1)
    assert tokenizer.bos == bos  # named; of this version, put before conversations even if the tokenizer does not
    assert load(changed()).bos is None
    if end is not None:
        assert tokenizer.end_of_text == end
    assert tokenizer.end_of_text in tokenizer.special_tokens.values()


@pytest.mark.parametrize("behind", ["", " <|endoftext|>"])
def test_the_tokens_that_the_tokenizer_puts_before_a_text_begin_it(
    behind: str, changed: Callable[..., Path], tmp_path: Path
) -> None:
    special = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    around = tokenizers.processors.TemplateProcessing("<|im_start|> $A" + behind, special_tokens=special)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}')
    path = changed(post_processor=json.loads(around.__getstate__()))
    tokenizer, former = load(path), load(path, version=1)
    assert (tokenizer.bos, tokenizer.prefix, tokenizer.begin) == (1, (1,), (1,))
    assert tokenizer.encode_prompt("The") == [1, *tokenizer.encode("The").tolist()]
    assert tokenizer.named_tokens["bos_token"] == "<|endoftext|>"
    assert (former.bos, former.prefix, former.begin) == (0, (), (0,))
    assert tokenizer.fingerprint != former.fingerprint  # documents have other ids
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json({})))
    assert theirs("The")["input_ids"] == tokenizer.encode_prompt("The")  # an export puts nothing behind it
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(former.to_json({})))
    assert theirs("The")["input_ids"] == former.encode_prompt("The")


def test_a_null_bos_of_the_tokenizer_comes_before_the_id_of_the_model(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    path = changed()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": null}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    assert load(path).bos is None


def test_a_token_declared_special_beside_the_file_is_special(unigram: Path, tmp_path: Path) -> None:
    """Some files list no special tokens, and the configuration names them: then they are."""
    spec = json.loads((unigram / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    tokenizer = load(tmp_path)
    assert dict(tokenizer.special_tokens) == {"<s>": 1, "</s>": 2}
    assert 2 not in tokenizer.encode("a</s>").tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}"})),
        ("tokenizer_config.json", json.dumps({"chat_template": [
            {"name": "tool", "template": "x"}, {"name": "default", "template": "{{ messages }}"},
        ]})),
        ("chat_template.jinja", "{{ messages }}"),
    ],
)  # fmt: skip
def test_the_chat_template_is_found_in_either_file(
    changed: Callable[..., Path], tmp_path: Path, name: str, content: str
) -> None:
    path = changed()
    assert load(path, "<|endoftext|>").chat_template is None
    (tmp_path / name).write_text(content)
    assert load(path, "<|endoftext|>").chat_template == "{{ messages }}"


def test_fingerprint_follows_whatever_decides_the_ids(changed: Callable[..., Path], byte_level: Path) -> None:
    fingerprint = load(byte_level).fingerprint
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    merges = spec["model"]["merges"]
    assert (
        load(changed(model={"merges": [" ".join(pair) for pair in merges]}), "<|endoftext|>").fingerprint == fingerprint
    )
    vocabulary = dict(spec["model"]["vocab"])
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    others = {
        load(changed(), "<|im_start|>").fingerprint,
        load(changed(model={"merges": merges[:-1]}), "<|endoftext|>").fingerprint,
        load(changed(model={"vocab": vocabulary}), "<|endoftext|>").fingerprint,
        load(changed(normalizer={"type": "NFC"}), "<|endoftext|>").fingerprint,
        load(changed(pre_tokenizer=BYTES), "<|endoftext|>").fingerprint,
        load(changed(added_tokens=spec["added_tokens"][:-1]), "<|endoftext|>").fingerprint,
    }
    assert len({fingerprint, *others}) == 7


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_missing_end_of_text_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    path = changed()
    with pytest.raises(
        ValueError, match=r"end_of_text=null: no file in .* special tokens .*: <\|endoftext\|>, <\|im_st"
    ):
        load(path)
    with pytest.raises(ValueError, match=r"tokenizer\.end_of_text=<end>: not a token of .*; special tokens: <\|endoft"):
        load(path, "<end>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 5000}')
    with pytest.raises(ValueError, match=r"end_of_text=5000, which a file in .* names as eos_token: not a token"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut or damaged, not JSON"),
        (b'{"model": {"type": "BPE"', "cut or damaged, not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "it has no model with a vocabulary"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "tokenizers 0.* can read"),
        (b'{"model": {"type": "Unheard", "vocab": {}}}', "tokenizers 0.* can read"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        load(path, "a")


def test_a_damaged_config_beside_the_file_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    path = changed()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: cut or damaged"):
        load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*nowhere: no such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in it; .* tokenizer=sentencepiece"):
        load(tmp_path)


def test_a_missing_library_is_named(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer=huggingface: .* pip install 'llmtrain\[huggingface\]'"):
        load(byte_level)


# --- through the command line ------------------------------------------------------------------------------------


def test_a_model_is_trained_and_generates(byte_level: Path, tmp_path: Path) -> None:
    arguments = [item for item in TINY if item != "tokenizer=byte"]
    llmtrain(
        "train", *arguments, "tokenizer=huggingface", f"tokenizer.path={byte_level}", "loop.max_steps=2", cwd=tmp_path
    )
    said = llmtrain("generate", str(only_run(tmp_path / "runs")), "prompt=the value", "max_tokens=5", cwd=tmp_path)
    assert said.stdout.startswith("the value")
