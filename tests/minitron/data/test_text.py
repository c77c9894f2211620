"""Odd text: missing values, nested keys, templates, chats, arrays, CSV, tar files, encodings, separators, lengths."""

from __future__ import annotations

import codecs
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import tiny

from minitron.data import TextSource, check_first_row, documents, pack, readers
from minitron.data.fields import RowText
from minitron.errors import InputError

SIZES = {"seq_length": 16, "train_rows": 10, "heldout_rows": 2}


def _texts(source: TextSource, tokenizer: Any = None) -> list[str]:
    return [document.text for document in documents(source, tokenizer)]


def _write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_without_a_value_end_the_run_or_are_left_out_and_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", {"text": "one"}, {"text": None}, {"body": "x"}, {"meta": None}, {"text": "two"})
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: 'text' is null") as error:
        _texts(TextSource("jsonl", path))
    assert "on_missing: skip" in error.value.remedy
    assert _texts(TextSource("jsonl", path, on_missing="skip")) == ["one", "two"]
    with pytest.raises(InputError, match=r"no text is left \(5 rows have no value"):
        _texts(TextSource("jsonl", path, key="meta.text", on_missing="skip"))
    table = pyarrow.table({"text": ["one", None, "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1: 'text' is null"):
        _texts(TextSource("parquet", f"{tmp_path}/a.parquet"))
    assert _texts(TextSource("parquet", f"{tmp_path}/a.parquet", on_missing="skip")) == ["one", "two"]


def test_a_text_is_made_of_nested_keys_or_a_template(tmp_path: Path) -> None:
    row = {"title": "T", "meta": {"text": "inner", "n": 3}, "a.b": "dotted"}
    path = _write(tmp_path / "a.jsonl", row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        at = {"kind": kind, "path": f"{tmp_path}/a.{kind}"}
        assert _texts(TextSource(**at, key="meta.text")) == ["inner"]
        assert _texts(TextSource(**at, key="a.b")) == ["dotted"]
        assert _texts(TextSource(**at, template="{title}: {meta.text} {{{meta.n}}}")) == ["T: inner {3}"]
        with pytest.raises(InputError, match=r"no (key|column) 'nothing'"):
            _texts(TextSource(**at, template="{title}{nothing}"))
    for template, problem in (("{title", "a single '{'"), ("}", "a single '}'"), ("plain", "names no field")):
        with pytest.raises(InputError, match=problem):
            TextSource("jsonl", path, template=template)
    with pytest.raises(InputError, match="template: given beside messages"):
        TextSource("jsonl", path, template="{a}", messages="b")


def test_chats_become_text_by_the_tokenizers_template(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    chat = [{"role": "user", "content": "the model"}, {"role": "assistant", "content": "reads"}]
    source = TextSource("jsonl", _write(tmp_path / "a.jsonl", {"chat": chat}), messages="chat")
    with pytest.raises(InputError, match="messages: chat, but the tokenizer has no chat template"):
        pack(source, tokenizer, str(tmp_path / "rows"), **SIZES)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert _texts(source, tokenizer) == ["user: the model\nassistant: reads\n"]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        InputError, match=r"line 1: the tokenizer's chat template refuses 'chat' \(roles must alternate\)"
    ):
        _texts(source, tokenizer)
    with pytest.raises(InputError, match="'chat' is hello, not a list of messages"):
        RowText(source, tokenizer)({"chat": "hello"}, "row 1")


def test_an_array_gives_the_documents_of_lines_whatever_its_size(tmp_path: Path) -> None:
    texts = [f"number {n} " + "x" * (n * 37 % 5000) for n in range(1200)]
    rows = [{"text": text} for text in texts]
    for name, content in (("small.json", json.dumps(rows[:3], indent=2)), ("large.json", json.dumps(rows))):
        (tmp_path / name).write_text(content + "\n")
        assert _texts(TextSource("jsonl", f"{tmp_path}/{name}")) == texts[: 3 if name == "small.json" else None]
    for content, problem in (('[{"text": "a"}, {"text"', r"element 1: not JSON"), ('[{"text": "a"}', "has no end")):
        (tmp_path / "cut.json").write_text(content)
        with pytest.raises(InputError, match=problem):
            _texts(TextSource("jsonl", f"{tmp_path}/cut.json"))


def test_csv_and_tsv_are_read_by_their_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one, ""quoted""\ntwo lines"\n2,two\n\n3,\n4\n')
    (tmp_path / "b.tsv").write_text("text\tid\nthree\t1\n")
    assert _texts(TextSource("csv", f"{tmp_path}/b.tsv")) == ["three"]
    assert _texts(TextSource("csv", f"{tmp_path}/a.csv", on_missing="skip")) == ['one, "quoted"\ntwo lines', "two"]
    for content, problem in (
        ("text,id\na, b,1\n", r"row 1 \(line 2\): 3 fields, but the header has 2"),
        ("body\nx\n", "no column 'text'"),
        ("text,id,text\na,1,b\n", "2 columns are called 'text'"),
        ('text\n"open\n', "not valid CSV"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(InputError, match=problem):
            _texts(TextSource("csv", f"{tmp_path}/bad.csv"))


def test_a_tar_of_the_webdataset_kind_is_read_by_the_suffix_of_its_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for n in range(3):
            for suffix, data in (("txt", f"text {n}"), ("json", json.dumps({"text": f"json {n}"}))):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data.encode()))
    assert _texts(TextSource("hub", str(tmp_path), key="txt")) == ["text 0", "text 1", "text 2"]
    assert _texts(TextSource("hub", str(tmp_path), key="json.text")) == ["json 0", "json 1", "json 2"]


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
    ],
)
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, mark: bytes) -> None:
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_bytes(mark + content.encode(encoding))
        return f"{tmp_path}/{name}"

    line = json.dumps({"text": "žluť\u2028😀"}, ensure_ascii=False)
    assert _texts(TextSource("text", write("a.txt", "žluť 😀"))) == ["žluť 😀"]
    assert _texts(TextSource("text", write("b.txt", "ž\n\nluť"), separator="blank-line")) == ["ž", "luť"]
    assert _texts(TextSource("jsonl", write("a.jsonl", f"{line}\n{line}\n"))) == ["žluť\u2028😀"] * 2
    assert _texts(TextSource("jsonl", write("b.json", f"[{line}]"))) == ["žluť\u2028😀"]
    assert _texts(TextSource("csv", write("a.csv", "text\nžluť\n"))) == ["žluť"]


@pytest.mark.parametrize("codec", ["zst", "lz4", "gz"])
def test_compressed_text_is_read_without_further_packages(tmp_path: Path, codec: str) -> None:
    names = {"zst": "zstd", "gz": "gzip"}
    line = b'{"text": "one"}\n'
    with pyarrow.CompressedOutputStream(f"{tmp_path}/a.jsonl.{codec}", names.get(codec, codec)) as file:
        file.write(line * 3)
    assert _texts(TextSource("jsonl", str(tmp_path))) == ["one"] * 3


@pytest.mark.parametrize(
    ("separator", "before", "after", "last"),
    [("blank-line", "\n\n ", "\nb", "b"), ("/^#/", "\n##", "b", "#b"), (r"/\n(?!bc)/", "\nb", "c\nd", "d")],
)
def test_a_separator_at_the_end_of_a_block_is_found_as_anywhere(
    tmp_path: Path, separator: str, before: str, after: str, last: str
) -> None:
    text = "a" * (readers.BLOCK - len(before)) + before + after
    (tmp_path / "a.txt").write_text(text)
    found = _texts(TextSource("text", f"{tmp_path}/a.txt", separator=separator))
    assert found[1:] == [last]


def test_separators_divide_a_file_of_any_size_into_documents(tmp_path: Path) -> None:
    texts = [f"document {n}\n" + "line of it\n" * (n % 300) for n in range(900)]  # more than a block
    for separator, between in (("<|end|>", "<|end|>"), ("blank-line", "\n \n\n"), (r"/^-{5,}(\n|$)/", "\n-------\n")):
        (tmp_path / "a.txt").write_text(between.join(text.strip() for text in texts))
        found = _texts(TextSource("text", f"{tmp_path}/a.txt", separator=separator))
        assert [text.strip() for text in found] == [text.strip() for text in texts]
    for separator, problem in (("/(/", "not a valid regular expression"), ("/x*/", "matches an empty text")):
        with pytest.raises(InputError, match=problem):
            TextSource("text", f"{tmp_path}/a.txt", separator=separator)
    with pytest.raises(InputError, match="separator: 'x' with kind 'jsonl'"):
        TextSource("jsonl", "a", separator="x")


def test_documents_of_other_lengths_are_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *({"text": "x" * n} for n in (1, 5, 10, 20)))
    source = TextSource("jsonl", path, min_characters=5, max_characters=10)
    assert [len(text) for text in _texts(source)] == [5, 10]
    with pytest.raises(InputError, match="max_characters: 3 is below min_characters 5"):
        TextSource("jsonl", path, min_characters=5, max_characters=3)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: not JSON"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2: not JSON"),
        ('{"text": 7}', "line 2: 'text' is 7, not a string"),
        ('{"text": {"a": 1}}', "line 2: 'text' is {'a': 1}, not a string"),
        ('{"text": "\\u001b[31m", "n": \x1b[31m}', r"line 2: not JSON .*\\x1b\[31m"),
    ],
    ids=["nested deeply", "long integer", "another type", "an object", "control characters"],
)
def test_a_line_that_cannot_be_used_is_named_in_a_sentence(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=problem) as error:
        _texts(TextSource("jsonl", f"{tmp_path}/a.jsonl"))
    assert len(str(error.value)) < 600
    assert "\x1b" not in str(error.value)


def test_equal_documents_and_too_little_text_are_refused_for_the_right_reason(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    same = TextSource("jsonl", _write(tmp_path / "same.jsonl", *([{"text": "the model reads a row " * 20}] * 50)))
    with pytest.raises(InputError, match="all 50 documents have the same text"):
        pack(same, tokenizer, str(tmp_path / "rows"), **(SIZES | {"train_rows": 9000}))
    white = TextSource("jsonl", _write(tmp_path / "white.jsonl", *([{"text": " \n"}] * 50)))
    with pytest.raises(InputError, match="there is no document with text in it"):
        pack(white, tokenizer, str(tmp_path / "rows"), **SIZES)
    few = TextSource("jsonl", _write(tmp_path / "few.jsonl", *({"text": text} for text in tiny.texts(60))))
    with pytest.raises(InputError, match=r"ends after (\d+) of 9000 train rows") as error:
        pack(few, tokenizer, str(tmp_path / "rows"), **(SIZES | {"train_rows": 9000, "heldout_fraction": 0.3}))
    rows = int(error.value.problem.split("ends after ")[1].split()[0])
    assert f"lower train_rows to {rows}" in error.value.remedy
    pack(few, tokenizer, str(tmp_path / "rows"), **(SIZES | {"train_rows": rows, "heldout_fraction": 0.3}))


def test_the_first_row_shows_a_wrong_key_before_a_run(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", {"body": "x"}, {"text": "never read"})
    for source in (TextSource("jsonl", path), TextSource("jsonl", str(tmp_path), key="body.inner")):
        with pytest.raises(InputError, match="line 1: no key"):
            check_first_row(source)
    check_first_row(TextSource("jsonl", path, key="body"))
    check_first_row(TextSource("jsonl", path, on_missing="skip"))
