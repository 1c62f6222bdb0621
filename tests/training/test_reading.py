"""Samples are read from tables, texts and feeds, and what does not fit is said."""

import json
from pathlib import Path

import numpy as np
import onnx
import pyarrow
import pytest
from onnx import helper
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import onnx_adapt as oa
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Dataset
from onnx_adapt.training.reading import read_dataset
from onnx_adapt.training.texts import Texts, texts_for

INT64 = onnx.TensorProto.INT64


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def _table(tmp_path: Path, text: str, name: str = "data.csv") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def _by_number(data: Dataset) -> dict[int, dict[str, list[int]]]:
    return {
        int(number): {
            "labels": group.labels[row].tolist(),
            **{name: value[row].tolist() for name, value in group.inputs.items()},
        }
        for group in data.groups
        for row, number in enumerate(group.numbers)
    }


def test_a_parquet_gives_the_samples_that_its_csv_gives(tmp_path: Path) -> None:
    rows = _table(tmp_path, "x,labels\n1.5,0\n-2,1\n0.25,1\n")
    columns = {"x": [1.5, -2.0, 0.25], "labels": [0, 1, 1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    written, read = (read_dataset(path) for path in (rows, tmp_path / "data.parquet"))
    assert _by_number(written) == _by_number(read)
    lacking = {"x": [1.5, None], "labels": [0, 1]}
    parquet.write_table(pyarrow.table(lacking), tmp_path / "lacking.parquet")
    with pytest.raises(TrainingError, match=r"row 1 of .* has no 'x'"):
        read_dataset(tmp_path / "lacking.parquet")
    broken = _table(tmp_path, "no parquet", "broken.parquet")
    with pytest.raises(TrainingError, match="cannot read"):
        read_dataset(broken)


def test_a_csv_of_texts_becomes_tokens_and_classes(tmp_path: Path, tokenizer: Path) -> None:
    path = _table(tmp_path, 'text,labels\na b,good\n"c, d",bad\n\na b c d e f g h,good\n')
    data = read_dataset(path, text=Texts(tokenizer))
    assert data.classes == ("bad", "good")
    assert [group.inputs["input_ids"].shape for group in data.groups] == [(2, 8), (1, 16)]
    rows = _by_number(data)
    assert rows[0]["input_ids"] == [1, 4, 5, 2, 0, 0, 0, 0]
    assert rows[0]["attention_mask"] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert rows[0]["token_type_ids"] == [0] * 8
    assert [rows[i]["labels"] for i in range(3)] == [1, 0, 1]
    assert rows[2]["input_ids"][:3] == [1, 4, 5]


def test_pairs_are_read_in_the_order_they_are_named(tmp_path: Path, tokenizer: Path) -> None:
    path = _table(tmp_path, "id,one,two,labels\nx,a,b,0\ny,c,d,1\n")
    data = read_dataset(path, text=Texts(tokenizer, columns=("two", "one")))
    row = _by_number(data)[0]
    assert row["input_ids"] == [1, 5, 2, 4, 2, 0, 0, 0]
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 0, 0, 0]
    with pytest.raises(TrainingError, match="3 columns with texts: id, one, two"):
        read_dataset(path, text=Texts(tokenizer))
    with pytest.raises(TrainingError, match="no column 'three'"):
        read_dataset(path, text=Texts(tokenizer, columns=("three",)))


def test_the_tokens_can_be_the_labels_of_a_language_model(
    tmp_path: Path, tokenizer: Path
) -> None:
    data = read_dataset(_table(tmp_path, "text\na b\n"), "input_ids", text=Texts(tokenizer))
    row = _by_number(data)[0]
    assert row["labels"] == [1, 4, 5, 2, -100, -100, -100, -100]
    assert row["input_ids"] == [1, 4, 5, 2, 0, 0, 0, 0]


def _model(*inputs: tuple[str, list[int | str]]) -> oa.Model:
    values = [helper.make_tensor_value_info(name, INT64, shape) for name, shape in inputs]
    out = helper.make_tensor_value_info("y", INT64, None)
    node = helper.make_node("Identity", [inputs[0][0]], ["y"])
    return oa.Model(helper.make_model(helper.make_graph([node], "g", values, [out])))


def test_texts_take_the_inputs_and_the_length_of_the_model(tokenizer: Path) -> None:
    fixed = texts_for(_model(("input_ids", ["n", 5]), ("attention_mask", ["n", 5])), tokenizer)
    assert (fixed.inputs, fixed.length) == (("input_ids", "attention_mask"), 5)
    long, short = fixed.encode([["a b c d e"], ["a"]])
    assert long["input_ids"].tolist() == [1, 4, 5, 6, 2]
    assert short["input_ids"].tolist() == [1, 4, 2, 0, 0]
    # Without a mask padding would be read as words.
    bare = texts_for(_model(("input_ids", ["n", "t"])), tokenizer)
    assert bare.encode([["a"]])[0]["input_ids"].tolist() == [1, 4, 2]
    with pytest.raises(TrainingError, match="no input 'input_ids'"):
        texts_for(_model(("x", ["n", 5])), tokenizer)


def test_texts_are_cut_to_the_most_tokens_and_it_is_said_how_many(
    tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(("input_ids", ["n", "t"]), ("attention_mask", ["n", "t"]))
    long, short = texts_for(model, tokenizer, most=5).encode([["a b c d e"], ["a"]])
    assert long["input_ids"].tolist() == [1, 4, 5, 6, 2]
    assert short["input_ids"].tolist() == [1, 4, 2, 0, 0]
    assert "cut 1 of 2 texts to 5 tokens" in caplog.text
    fixed = _model(("input_ids", ["n", 5]))
    with pytest.raises(TrainingError, match="takes 5 tokens, and texts are to be cut to 6"):
        texts_for(fixed, tokenizer, most=6)
    with pytest.raises(TrainingError, match=r"cut to 1 token: tokenizer.json adds 2"):
        texts_for(model, tokenizer, most=1).encode([["a b"]])


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    path = _table(tmp_path, "text,labels\na,0\n")
    with pytest.raises(TrainingError, match="no file"):
        read_dataset(path, text=Texts(tmp_path / "nowhere.json"))
    with pytest.raises(TrainingError, match=r"cannot read .*data\.csv"):
        read_dataset(path, text=Texts(path))


def test_lines_of_json_hold_lists_of_any_length(tmp_path: Path) -> None:
    rows = [
        {"x": [1, 2], "labels": 0},
        {"x": [3, 4, 5], "labels": 1},
        {"x": [6, 7], "labels": 2},
    ]
    path = _table(tmp_path, "\n".join(map(json.dumps, rows)), "data.jsonl")
    data = read_dataset(path)
    assert [group.inputs["x"].tolist() for group in data.groups] == [
        [[1, 2], [6, 7]],
        [[3, 4, 5]],
    ]
    assert [group.numbers.tolist() for group in data.groups] == [[0, 2], [1]]


def test_feeds_of_batches_are_joined_by_shape() -> None:
    feeds = ({"x": np.full((2, n), n), "labels": np.full(2, n)} for n in (3, 4, 3))
    data = read_dataset(feeds)
    assert data.size == 6
    assert [group.inputs["x"].shape for group in data.groups] == [(4, 3), (2, 4)]
    assert data.groups[0].numbers.tolist() == [0, 1, 4, 5]


BAD = {
    "another number of cells": ("a.csv", "x,labels\n1,2\n3\n", "line 3 of .* has 1 cells"),
    "an empty cell": ("a.csv", "x,labels\n1,\n", "line 2 of .* has no 'labels'"),
    "no rows": ("a.csv", "x,labels\n", "has no rows"),
    "nothing": ("a.csv", "", "has no rows"),
    "a column twice": ("a.csv", "x,x,labels\n1,2,3\n", "have one name"),
    "texts": ("a.csv", "x,labels\na,1\n", "column 'x' of .* holds texts"),
    "no labels": ("a.csv", "x\n1\n", "has no 'labels'"),
    "an open quote": ("a.csv", 'x,labels\n"1,2\n', "cannot read"),
    "no JSON": ("a.jsonl", "{]", "cannot read"),
    "a list": ("a.jsonl", "[1]", "no JSON object"),
    "another key": ("a.jsonl", '{"x": 1, "labels": 2}\n{"y": 1, "labels": 2}', "has no"),
    "a key that comes later": (
        "a.jsonl",
        '{"labels": 2}\n{"x": 1, "labels": 2}',
        "line 2 of .* has no 'x'",
    ),
    "crooked lists": ("a.jsonl", '{"x": [[1], [1, 2]], "labels": 2}', "different lengths"),
    "an object": ("a.jsonl", '{"x": {"a": 1}, "labels": 2}', "not numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_table_is_said_to_be_one(what: str, tmp_path: Path) -> None:
    name, text, words = BAD[what]
    with pytest.raises(TrainingError, match=words):
        read_dataset(_table(tmp_path, text, name))


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes("text,labels\nschön,0\n".encode("latin-1"))
    with pytest.raises(TrainingError, match="cannot read"):
        read_dataset(path)


def test_classes_of_other_data_keep_their_numbers(tmp_path: Path, tokenizer: Path) -> None:
    path = _table(tmp_path, "text,labels\na,good\n")
    data = read_dataset(path, text=Texts(tokenizer), classes=("bad", "good"))
    assert data.groups[0].labels.tolist() == [1]
    with pytest.raises(TrainingError, match=r"sample 0 of .* is of class 'good'"):
        read_dataset(path, text=Texts(tokenizer), classes=("bad", "ugly"))


def test_a_damaged_npz_or_npy_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros(500), labels=np.zeros(500))
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[:-300])
    with pytest.raises(TrainingError, match=r"cannot read .*data\.npz"):
        read_dataset(tmp_path / "data.npz")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(TrainingError, match="has no 'labels'"):
        read_dataset(folder)
    (folder / "labels.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(TrainingError, match=r"cannot read .*labels\.npy"):
        read_dataset(folder)
