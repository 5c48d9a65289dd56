"""``tokenizer=sentencepiece`` against the library."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from llmtrain.tokenizer.sentencepiece import SentencePiece, SentencePieceTokenizer
from llmtrain.tokenizer.sentencepiece_model import PieceKind
from tests.helpers.tokenizers import CORPUS, random_texts, train_sentencepiece

OTHERS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram", "allow_whitespace_only_pieces": False},
    "defaults": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},  # of the library
    "no_space": {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>"]},
    "no_bytes": {"byte_fallback": False},
    "suffix": {"treat_whitespace_as_suffix": True},
}


@pytest.fixture(scope="module")
def paths(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    trained = {name: train_sentencepiece(folder / f"{name}.model", **options) for name, options in OTHERS.items()}
    return {"llama": llama, **trained}


def load(path: Path, end_of_text: str | None = None) -> SentencePieceTokenizer:
    return SentencePiece(path=str(path), end_of_text=end_of_text, version=2).build()


NAMES = ["llama", *OTHERS]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_librarys(paths: dict[str, Path], name: str) -> None:
    ours, theirs = load(paths[name]), sentencepiece.SentencePieceProcessor(model_file=str(paths[name]))
    for text in ["", " ", *random_texts(600), CORPUS[:100_000], "a <s></s><unk><sep><0x41>"]:
        ids = ours.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == theirs.encode(text)
    assert ours.vocab_size == theirs.get_piece_size()


def test_the_file_is_read_as_the_library_reads_it(paths: dict[str, Path]) -> None:
    for path in paths.values():
        model, theirs = load(path).model, sentencepiece.SentencePieceProcessor(model_file=str(path))
        for id, piece in enumerate(model.pieces):
            assert (piece.text, piece.score) == (theirs.id_to_piece(id), theirs.get_score(id))
            kinds = (piece.kind is PieceKind.CONTROL, piece.kind is PieceKind.UNKNOWN, piece.kind is PieceKind.BYTE)
            assert kinds == (theirs.is_control(id), theirs.is_unknown(id), theirs.is_byte(id))


def test_vocabulary_end_of_text_and_special_tokens_are_those_of_the_file(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load(paths["llama"])
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.bos) == (700, 2, None)
    assert dict(tokenizer.special_tokens) == {"<unk>": 0, "<s>": 1, "</s>": 2, "<ctl>": 3}
    assert load(paths["llama"].parent).fingerprint == tokenizer.fingerprint  # a directory that holds tokenizer.model
    others = [load(paths["unigram"]), load(paths["llama"], "<ctl>")]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert others[1].end_of_text == 3
    path = tmp_path / "tokenizer.model"
    path.write_bytes(paths["llama"].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load(path).chat_template == "{{ messages }}"
    assert tokenizer.chat_template is None


def test_control_symbols_in_a_text_are_ordinary_characters(paths: dict[str, Path]) -> None:
    tokenizer = load(paths["llama"])
    text = "<s>[INST] Hi [/INST] <ctl></s>"
    ordinary = tokenizer.encode(text).tolist()
    assert not set(ordinary) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ordinary) == f" {text}"
    assert tokenizer.decode([1, 3, 2, 0]) == "<s><ctl></s><unk>"


@pytest.mark.parametrize("name", ["llama", "unigram", "no_space"])
def test_text_streamed_by_token_equals_the_whole(paths: dict[str, Path], name: str) -> None:
    tokenizer = load(paths[name])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(paths[name]))
    for text in random_texts(600, seed=1):
        ids = tokenizer.encode(text).tolist()
        assert b"".join(tokenizer.decode_bytes([id]) for id in ids) == tokenizer.decode_bytes(ids)
        begins = "" if name == "no_space" else " "
        assert tokenizer.decode(ids) == begins + text
        assert processor.decode(ids) == text
    assert tokenizer.decode_bytes(tokenizer.encode("🙂").tolist()[-1:]) == "🙂".encode()[-1:]  # stays cut
    assert tokenizer.decode([5000]) == "\ufffd"


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("llama", 2), ("unigram", 2), ("defaults", 1), ("no_space", 1), ("no_bytes", 0), ("suffix", 0)],
)
def test_texts_cut_in_pieces_have_the_same_ids(paths: dict[str, Path], name: str, cuts: int) -> None:
    tokenizer = load(paths[name])
    assert len(tokenizer.cuts) == cuts
    made = ties = 0
    for text in random_texts(1500, seed=2):
        for cut in tokenizer.cuts:
            if match := cut.match(text):
                left, right = text[: match.end()], text[match.end() :]
                parts = [*tokenizer.encode(left).tolist(), *tokenizer.encode_continuation(right).tolist()]
                whole = tokenizer.encode(text).tolist()
                if name == "unigram":  # of several with one score rounding decides
                    scores = [sum(tokenizer.model.pieces[id].score for id in ids) for ids in (parts, whole)]
                    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
                    ties += parts != whole
                else:
                    assert parts == whole, (left, right)
                made += 1
    assert made >= 600 * cuts
    assert ties < 20


def test_several_threads_encode_the_same(paths: dict[str, Path]) -> None:
    tokenizer = load(paths["llama"])
    texts = list(random_texts(200, seed=3))
    expected = [tokenizer.encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(tokenizer.encode, texts)] == expected


def test_damaged_files_are_refused(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    whole = llama.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], whole[:-3], b"\x80" * 40, b'{"model": {}}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.model: (cut or damaged, )?not a SentencePiece model"):
            load(path)


def test_end_of_text_must_be_a_symbol_of_the_file(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end_of_text=<end>: not a symbol of .*; there are </s>, <ctl>, <s>, <unk>"):
        load(llama, "<end>")
    without = train_sentencepiece(tmp_path / "without.model", eos_id=-1)
    with pytest.raises(ValueError, match=r"end_of_text=null: .* without an end-of-sentence symbol; .* <ctl>, <s>"):
        load(without)
    assert load(without, "<ctl>").end_of_text == 2


def test_missing_files_and_a_missing_library_are_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*nowhere: no such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is no tokenizer\.model in it; .*tokenizer=huggingface"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"tokenizer=sentencepiece: .* pip install 'llmtrain\[sentencepiece\]'"):
        load(llama)
