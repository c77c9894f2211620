"""Text sources, packing into rows, reading rows, and the order of rows in training."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minitron.data.documents import Document, documents
from minitron.data.packing import pack, tokenizer_identity
from minitron.data.rows import Rows, rows_for_step
from minitron.data.source_files import source_identity
from minitron.data.sources import TextSource
from minitron.errors import InputError, StorageError
from minitron.storage import manifest

ROOT = Path(__file__).resolve().parents[3]


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox", "jumps over the lazy dog", "document 1 says"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(300)


@pytest.fixture
def corpus(tmp_path: Path) -> TextSource:
    """200 short documents, each of them twice with different ids."""
    lines = [{"text": f"<{n}> document {n} says " + "the quick brown fox " * (1 + n % 7)} for n in range(200)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *reversed(lines)]))
    return TextSource("jsonl", str(path))


@pytest.fixture
def packed(corpus: TextSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    target = str(tmp_path / "rows")
    pack(corpus, tokenizer, target, seq_length=16, train_rows=300, heldout_rows=40, heldout_fraction=0.2, shard_rows=64)
    return target


def _texts(rows: Rows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    ids = rows.take(range(len(rows))).flatten().tolist()
    return tokenizer.decode(ids).split("<eos>")


# --- sources


def test_jsonl_plain_and_compressed_give_the_same_documents(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "  "}\n{"text": "three \xc3\xa9", "n": 3}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    plain = list(documents(TextSource("jsonl", str(tmp_path / "a.jsonl"))))
    assert plain == [Document("a.jsonl:1", "one"), Document("a.jsonl:4", "three é")]
    packed = list(documents(TextSource("jsonl", str(tmp_path / "a.jsonl.gz"))))
    assert [document.text for document in packed] == ["one", "three é"]


def test_text_of_a_file_a_folder_or_a_glob_is_read_in_an_order_that_does_not_follow_file_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for n in range(12):
        (tmp_path / "deep" / f"{n:02d}.txt").write_text(f"text {n}")
    (tmp_path / "note.md").write_text("a note")
    (tmp_path / ".hidden").write_text("not this")
    folder = list(documents(TextSource("text", str(tmp_path))))
    assert {document.id for document in folder} == {"note.md", *(f"deep/{n:02d}.txt" for n in range(12))}
    assert [document.id for document in folder] != sorted(document.id for document in folder)
    assert folder == list(documents(TextSource("text", str(tmp_path))))
    assert len(list(documents(TextSource("text", f"{tmp_path}/deep/0*.txt")))) == 10
    assert list(documents(TextSource("text", f"file://{tmp_path}/note.md"))) == [Document("note.md", "a note")]


def test_text_is_read_from_an_object_store() -> None:
    folder = f"memory://{uuid.uuid4().hex}"
    for name in ("a.txt", "b.txt"):
        fsspec.filesystem("memory").pipe_file(f"{folder}/{name}", f"this is {name}".encode())
    assert {document.text for document in documents(TextSource("text", folder))} == {"this is a.txt", "this is b.txt"}
    before = source_identity(TextSource("text", folder))
    fsspec.filesystem("memory").pipe_file(f"{folder}/a.txt", b"this is a.tyt")
    assert source_identity(TextSource("text", folder)) != before


def test_parquet_files_and_a_hub_folder_are_read_by_the_given_column(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table({"body": [f"row {n}" for n in range(2500)], "n": list(range(2500))})
    parquet.write_table(table, tmp_path / "part.parquet")
    rows = list(documents(TextSource("parquet", str(tmp_path), key="body")))
    assert [row.text for row in rows] == [f"row {n}" for n in range(2500)]
    assert rows[2000].id == "part.parquet:2000"
    hub = TextSource("hub", str(tmp_path), key="body")
    assert [row.text for row in documents(hub)] == [f"row {n}" for n in range(2500)]
    with pytest.raises(InputError, match="no column 'text'") as error:
        list(documents(TextSource("parquet", str(tmp_path))))
    assert "body, n" in error.value.remedy
    with pytest.raises(InputError, match="split 'nothere'"):
        list(documents(TextSource("hub", str(tmp_path), key="body", split="nothere")))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"body": "x"}', r"line 2: no key 'text'"),
        ('{"text": "cut', r"line 2: not JSON"),
        ('{"text": 7}', r"line 2: 'text' is 7, not a string"),
        ('["x"]', r"line 2: \['x'\] is not an object"),
        ('{"text": "\\ud800"}', r"line 2: 'text' has half a surrogate"),
    ],
)
def test_an_invalid_line_is_named_with_its_file(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=problem) as error:
        list(documents(TextSource("jsonl", str(tmp_path / "bad.jsonl"))))
    assert "bad.jsonl" in error.value.problem
    assert error.value.remedy


def test_invalid_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    (tmp_path / "fake.parquet").write_text("not parquet at all")
    (tmp_path / "empty").mkdir()
    for kind, name, problem in (
        ("text", "latin.txt", "latin.txt: not UTF-8"),
        ("text", "blank.txt", "contains no text"),
        ("jsonl", "short.jsonl.gz", "short.jsonl.gz: cannot be read completely"),
        ("parquet", "fake.parquet", "fake.parquet: not a readable parquet file"),
        ("text", "empty", "no files in"),
        ("text", "missing.txt", "does not exist"),
        ("text", "", "path: empty"),
        ("tsv", "latin.txt", "kind: 'tsv' is not supported"),
    ):
        with pytest.raises((InputError, StorageError), match=problem):
            list(documents(TextSource(kind, str(tmp_path / name) if name else "")))  # type: ignore[arg-type]
    for source in (TextSource("jsonl", str(tmp_path / "missing.jsonl")), TextSource("text", str(tmp_path / "empty"))):
        with pytest.raises(InputError):
            source_identity(source)


def test_the_identity_of_a_source_changes_with_its_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = source_identity(TextSource("text", str(tmp_path)))
    assert first == source_identity(TextSource("text", str(tmp_path))) == json.loads(json.dumps(first))
    file.chmod(0o600)
    assert source_identity(TextSource("text", str(tmp_path))) == first, "permissions do not change the text"
    os.utime(file, (1, 1))
    second = source_identity(TextSource("text", str(tmp_path)))
    file.write_text("longer")
    os.utime(file, (1, 1))
    assert first != second != source_identity(TextSource("text", str(tmp_path)))


def test_python_docs_are_the_docstrings_of_installed_modules() -> None:
    import argparse
    import inspect

    from minitron.data.python_docs import module_files, module_text

    reader = documents(TextSource("python-docs"))
    first = [next(reader) for _ in range(40)]
    again = documents(TextSource("python-docs"))
    assert first == [next(again) for _ in range(40)]
    names = module_files()
    assert {"json.decoder", "argparse", "torch.nn.functional"} <= set(names)
    assert not [name for name in names if name.split(".")[0].startswith("minitron") or "tests" in name.split(".")]
    for document in first:
        assert len(document.text) >= 200
        assert all(part.replace("-", "_").isidentifier() for part in document.id.split("."))
    assert len({document.id.split(".")[0] for document in first}) > 5, "the documents come from several packages"
    text = module_text(names["argparse"])
    assert "ArgumentParser.add_subparsers" not in text, "functions without a docstring are skipped"
    assert "class ArgumentParser(_AttributeHolder, _ActionsContainer)" in text
    assert inspect.cleandoc(argparse.HelpFormatter.__doc__ or "") in text
    assert "torch" in dict(source_identity(TextSource("python-docs"))["distributions"])


# --- packing


def test_no_text_is_in_both_splits(packed: str, tokenizer: PreTrainedTokenizerFast) -> None:
    # Every text is in the source twice, with different ids. The last text of each split is cut at the end of the rows.
    train = set(_texts(Rows.open(packed, "train"), tokenizer)[:-1])
    heldout = set(_texts(Rows.open(packed, "heldout"), tokenizer)[:-1])
    assert len(train) > 50
    assert len(heldout) > 10
    assert not train & heldout


def test_rows_contain_complete_documents_in_order_each_with_an_end_token(
    packed: str, corpus: TextSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = Rows.open(packed, "train", verify=True)
    assert rows.take([]).shape == (0, 16)
    assert (len(rows), rows.seq_length) == (300, 16)
    texts = [document.text for document in documents(corpus)]
    found = _texts(rows, tokenizer)
    places = [texts.index(text) for text in found[:-1]]
    assert places == sorted(places)
    assert len(found) > 50
    assert texts[places[-1] + 1 :], "reading stops when both splits are full"


def test_packing_twice_gives_the_same_content(
    packed: str, corpus: TextSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = str(tmp_path / "again")
    calls: list[tuple[int, int]] = []
    rows = pack(
        corpus,
        tokenizer,
        other,
        seq_length=16,
        train_rows=300,
        heldout_rows=40,
        heldout_fraction=0.2,
        shard_rows=64,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert manifest(other)["files"] == manifest(packed)["files"]
    assert "index.json" in manifest(other)["files"]
    assert rows.fingerprint == Rows.open(packed, "train").fingerprint != Rows.open(packed, "heldout").fingerprint
    assert calls[-1] == (340 * 16, 340 * 16)


def test_the_same_request_is_not_packed_again_and_a_different_one_is_refused(
    packed: str, corpus: TextSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {"seq_length": 16, "heldout_rows": 40, "heldout_fraction": 0.2, "shard_rows": 64}
    calls: list[tuple[int, int]] = []
    again = pack(corpus, tokenizer, packed, train_rows=300, progress=lambda *call: calls.append(call), **sizes)
    assert len(again) == 300
    assert not calls
    with pytest.raises(StorageError, match="packed from another source"):
        pack(corpus, tokenizer, packed, train_rows=299, **sizes)


def test_a_source_with_too_little_text_is_refused_with_the_amount_that_it_has(
    corpus: TextSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"seq_length": 16, "train_rows": 10_000, "heldout_rows": 5, "heldout_fraction": 0.2}
    with pytest.raises(InputError, match=r"ends after \d+ of 10000 train rows and 5 of 5 heldout rows"):
        pack(corpus, tokenizer, str(tmp_path / "rows"), **sizes)
    one = tmp_path / "one.txt"
    one.write_text("the quick brown fox " * 1000)
    with pytest.raises(InputError, match=r"0 of 5 (train|heldout) rows") as error:
        pack(TextSource("text", str(one)), tokenizer, str(tmp_path / "rows"), **(sizes | {"train_rows": 5}))
    assert "divide the text into documents" in error.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "one.txt"], "no partial files"


def test_reading_stops_when_both_splits_are_full(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} the quick brown fox " * 500}) for n in range(100)]
    (tmp_path / "long.jsonl").write_text("\n".join([*lines, "not JSON, and never reached"]))
    source = TextSource("jsonl", str(tmp_path / "long.jsonl"))
    pack(source, tokenizer, str(tmp_path / "few"), seq_length=16, train_rows=20, heldout_rows=10, heldout_fraction=None)
    with pytest.raises(InputError, match="line 101: not JSON"):
        pack(source, tokenizer, str(tmp_path / "many"), seq_length=16, train_rows=10**6, heldout_rows=10)


def test_a_long_text_is_tokenised_in_pieces_without_losing_any(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = "".join(f"line {n} of the lazy dog\n" for n in range(60_000))
    assert len(text) > 2**20
    (tmp_path / "long.txt").write_text(text)
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    sizes = {"train_rows": (count + 1) // 512, "heldout_rows": 0, "heldout_fraction": 0.0}
    rows = pack(TextSource("text", str(tmp_path)), tokenizer, str(tmp_path / "rows"), seq_length=512, **sizes)
    decoded = tokenizer.decode(rows.take(range(len(rows))).flatten().tolist())
    assert text.startswith(decoded)
    assert len(decoded) > len(text) - 5000


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"seq_length": 1}, "seq_length is 1"),
        ({"train_rows": 0}, "train_rows is 0"),
        ({"heldout_rows": -1}, "heldout_rows is -1"),
        ({"heldout_fraction": 0.0}, "heldout_fraction is 0"),
        ({"heldout_fraction": 1.5}, "heldout_fraction is 1.5"),
    ],
)
def test_invalid_sizes_are_refused(
    corpus: TextSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: dict[str, float], problem: str
) -> None:
    sizes = {"seq_length": 16, "train_rows": 5, "heldout_rows": 5} | change
    with pytest.raises(InputError, match=problem):
        pack(corpus, tokenizer, str(tmp_path / "rows"), **sizes)  # type: ignore[arg-type]


def test_a_tokenizer_without_an_end_of_text_token_is_refused(corpus: TextSource, tmp_path: Path) -> None:
    endless = _tokenizer(300)
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        pack(corpus, endless, str(tmp_path / "rows"), seq_length=16, train_rows=5, heldout_rows=5)


def test_the_identity_of_a_tokenizer_changes_with_its_tokenisation(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "b c d"], truncation=True, max_length=4)
    assert tokenizer_identity(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_identity(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before
    assert tokenizer_identity(_tokenizer(290)) != before


def test_a_vocabulary_above_sixteen_bits_is_stored_in_wider_integers(corpus: TextSource, tmp_path: Path) -> None:
    wide = _tokenizer(300)
    wide.add_tokens([f"<{n}>" for n in range(70_000)])
    rows = pack(corpus, wide, str(tmp_path / "rows"), seq_length=16, train_rows=20, heldout_rows=0)
    assert rows.index["dtype"] == "<u4"
    assert rows.vocab_size == len(wide) > 2**16
    ids = rows.take(range(20))
    assert int(ids.max()) < rows.vocab_size
    assert set(_texts(rows, wide)[:-1]) <= {document.text for document in documents(corpus)}


# --- rows


def test_take_gives_rows_by_number_across_shards_and_processes(packed: str) -> None:
    rows = Rows.open(packed, "train")
    everything = rows.take(range(300))
    assert everything.dtype == torch.int64
    numbers = [299, 0, 63, 64, 65, 64, 200]
    assert torch.equal(rows.take(numbers), everything[numbers])
    assert torch.equal(rows.take(torch.tensor(numbers)), everything[numbers])
    assert len({tuple(row) for row in everything.tolist()}) > 200
    copy = pickle.dumps(rows)
    assert len(copy) < 1000
    assert torch.equal(pickle.loads(copy).take(numbers), everything[numbers])  # noqa: S301 - pickled by this test
    for bad in (-1, 300):
        with pytest.raises(IndexError, match=f"row {bad} "):
            rows.take([0, bad])


def test_rows_on_an_object_store_are_the_same(
    packed: str, corpus: TextSource, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = f"memory://{uuid.uuid4().hex}/rows"
    sizes = {"seq_length": 16, "train_rows": 300, "heldout_rows": 40, "heldout_fraction": 0.2, "shard_rows": 64}
    remote = pack(corpus, tokenizer, target, **sizes)
    here = Rows.open(packed, "train")
    assert remote.fingerprint == here.fingerprint
    assert torch.equal(remote.take([5, 250]), here.take([5, 250]))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "verify"),
    [(_flip, True), (lambda file: file.write_bytes(file.read_bytes()[:-2]), False), (Path.unlink, False)],
    ids=["one wrong bit", "cut short", "missing"],
)
def test_a_damaged_shard_is_refused_and_named(packed: str, damage: Callable[[Path], None], verify: bool) -> None:
    damage(Path(packed, "train-00002.bin"))
    with pytest.raises(StorageError, match=r"train-00002\.bin"):
        Rows.open(packed, "train", verify=verify)


def test_a_missing_folder_or_split_is_refused(
    packed: str, corpus: TextSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="contains no packed rows"):
        Rows.open(str(tmp_path / "nothing"), "train")
    with pytest.raises(InputError, match="split: 'test'"):
        Rows.open(packed, "test")  # type: ignore[arg-type]
    other = str(tmp_path / "train-only")
    pack(corpus, tokenizer, other, seq_length=16, train_rows=5, heldout_rows=0)
    with pytest.raises(InputError, match="without heldout rows"):
        Rows.open(other, "heldout")


# --- order


@pytest.mark.parametrize(("num_rows", "batch_rows"), [(10, 4), (7, 7), (5, 12), (1, 3)])
def test_every_epoch_trains_every_row_once(num_rows: int, batch_rows: int) -> None:
    steps = 3 * num_rows
    batches = [rows_for_step(num_rows, batch_rows, step, seed=3) for step in range(steps)]
    assert {len(batch) for batch in batches} == {batch_rows}
    order = [row for batch in batches for row in batch]
    epochs = [order[start : start + num_rows] for start in range(0, len(order), num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    if num_rows == 10:
        assert len({tuple(epoch) for epoch in epochs}) > 5, "epochs differ"
        assert order[:10] != [row for step in range(3) for row in rows_for_step(10, 4, step, seed=4)][:10]


def test_any_step_is_the_same_in_another_process_and_in_any_order() -> None:
    far = rows_for_step(1000, 48, 10**6, seed=7)
    assert len(far) == 48
    rows_for_step(1000, 48, 3, seed=7)
    code = "from minitron.data.rows import rows_for_step; print(rows_for_step(1000, 48, 10**6, seed=7))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == far
    # Fixed values, because a change of the order would silently break every resumed training.
    assert rows_for_step(10, 10, 0, seed=0) == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]


@pytest.mark.parametrize("bad", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_an_invalid_order_is_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="num_rows"):
        rows_for_step(*bad)
