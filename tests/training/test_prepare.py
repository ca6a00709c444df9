import itertools
import json

import numpy as np
import pytest

import training.data.text as text_module
from jaxattn.tokenizer_files import get_tokenizer
from tests.training.conftest import DOCUMENTS, write_documents
from training.data import DataError, open_tokens, prepare

EOS = 256


@pytest.fixture
def text_folder(tmp_path):
    """One of its own for each test: some of them change it."""
    folder = tmp_path / "text"
    folder.mkdir()
    return write_documents(folder)


def documents_of(stream: np.ndarray, eos: int) -> list[bytes]:
    """The texts between end-of-text tokens; the stream must open and close with one."""
    borders = np.flatnonzero(stream == eos)
    assert borders[0] == 0
    assert borders[-1] == len(stream) - 1
    return [bytes(stream[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(borders)]


def test_a_folder_becomes_documents_split_between_train_and_validation(text_folder, tmp_path):
    tokens = prepare(text_folder, tmp_path / "tokens", validation_fraction=0.25, progress=False)
    train = documents_of(tokens.splits["train"], EOS)
    validation = documents_of(tokens.splits["validation"], EOS)
    assert (len(train), len(validation)) == (3, 1)
    assert sorted(train + validation) == sorted(text.encode() for text in DOCUMENTS.values())
    counts = tokens.meta["splits"]["train"]
    assert counts["num_documents"] == 3 == tokens.num_documents
    assert counts["num_bytes"] == sum(map(len, train))
    assert counts["num_tokens"] == len(tokens.splits["train"])
    assert tokens.bytes_per_token("train") == counts["num_bytes"] / (counts["num_bytes"] + 4)


def test_the_seed_chooses_what_is_held_out(text_folder, tmp_path):
    held_out = {
        documents_of(
            prepare(text_folder, tmp_path / f"tokens{seed}", seed=seed, progress=False).splits["validation"],
            EOS,
        )[0]
        for seed in range(8)
    }
    assert len(held_out) > 1


def test_a_single_file_is_split_by_position(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("0123456789" * 10, encoding="utf-8")
    tokens = prepare(path, tmp_path / "tokens", validation_fraction=0.2, progress=False)
    assert documents_of(tokens.splits["train"], EOS) == [b"0123456789" * 8]
    assert documents_of(tokens.splits["validation"], EOS) == [b"0123456789" * 2]


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\nd\xc3\xa9" + b"e" * 10)
    tokens = prepare(path, tmp_path / "tokens", validation_fraction=0.5, progress=False)
    both = [documents_of(tokens.splits[split], EOS)[0] for split in ("train", "validation")]
    assert b"".join(both) == b"a\r\nb\rc\nd\xc3\xa9eeeeeeeeee"


def test_long_texts_are_encoded_in_pieces_without_a_trace(tmp_path, text_folder, monkeypatch):
    text = "It's   1999 -- the cat's\n\n  mat\tisn't (really) o'clock; don't… über-straße " * 40
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 37)
    assert len(list(text_module.split_pieces(text))) > 40
    tokens = prepare(path, tmp_path / "tokens", tokenizer="gpt2", validation_fraction=0.5, progress=False)
    tokenizer = get_tokenizer("gpt2")
    assert tokens.splits["train"].dtype == np.uint16
    train = text[: round(len(text) * 0.5)]
    eos = tokenizer.eos_token_id
    assert tokens.splits["train"].tolist() == [eos, *tokenizer.encode(train, add_special_tokens=False), eos]


def test_a_text_without_spaces_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 10)
    pieces = list(text_module.split_pieces("x" * 35))
    assert "".join(pieces) == "x" * 35
    assert max(map(len, pieces)) == 10


def test_broken_utf8_is_an_error_or_counted(text_folder, tmp_path):
    (text_folder / "e.txt").write_bytes(b"fine so far \xff\xfe and on \xef\xbf\xbd with it " * 3)
    with pytest.raises(DataError, match=r"e\.txt: not UTF-8 at byte 12 \(0xff\)"):
        prepare(text_folder, tmp_path / "tokens", progress=False)
    assert not (tmp_path / "tokens").exists()
    tokens = prepare(text_folder, tmp_path / "tokens", invalid_utf8="replace", progress=False)
    assert sum(split["num_replaced"] for split in tokens.meta["splits"].values()) == 6


def test_same_source_is_used_again_and_another_is_refused(text_folder, tmp_path):
    out = tmp_path / "tokens"
    prepare(text_folder, out, progress=False)
    time = (out / "train.bin").stat().st_mtime_ns
    prepare(text_folder, out, progress=False)
    assert (out / "train.bin").stat().st_mtime_ns == time
    with pytest.raises(DataError, match="holds tokens of seed=0, not 1"):
        prepare(text_folder, out, seed=1, progress=False)
    (text_folder / "a.txt").write_text("changed", encoding="utf-8")
    with pytest.raises(DataError, match="holds tokens of num_bytes="):
        prepare(text_folder, out, progress=False)


def test_other_files_in_the_way_are_not_touched(text_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match="holds other files"):
        prepare(text_folder, tmp_path / "mine", progress=False)
    with pytest.raises(DataError, match="is a file"):
        prepare(text_folder, text_folder / "a.txt", progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "no such file or folder"),
        (lambda folder: "package:no_such_package_1/x", "package 'no_such_package_1' is not installed"),
        (lambda folder: folder, r"no files that match \*\*/\*\.txt"),
        (lambda folder: (folder / "e.txt").write_text("") or folder, "no text for the train split"),
        (lambda folder: (folder / "e.txt").write_text("ab") and folder, "no text for the validation split"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, make, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(DataError, match=message):
        prepare(make(folder), tmp_path / "tokens", progress=False)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), "broken"),
        (lambda folder: (folder / "meta.json").write_text(json.dumps({"format": 99})), "token format 99"),
        (lambda folder: (folder / "train.bin").unlink(), "train.bin is missing"),
        (lambda folder: (folder / "train.bin").write_bytes(b"123"), "3 bytes, but meta.json says"),
    ],
)
def test_broken_token_folders_are_named(text_folder, tmp_path, spoil, message):
    folder = prepare(text_folder, tmp_path / "tokens", progress=False).folder
    spoil(folder)
    with pytest.raises(DataError, match=message):
        open_tokens(folder)
