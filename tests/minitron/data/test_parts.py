"""Packing in parts, in any number of processes and after interruptions, gives the rows of packing in one go."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from helpers import tiny

from minitron.data import (
    InParts,
    TextSource,
    pack,
    part_files,
    part_placing,
    parts,
    shard_plans,
    shard_writing,
    tokenising,
)
from minitron.data.documents import LeftOut, part_documents
from minitron.data.in_parts import in_this_process
from minitron.errors import InputError
from minitron.storage import manifest, read_json, verify

SIZES = {"seq_length": 24, "train_rows": 400, "heldout_rows": 40, "heldout_fraction": None, "shard_rows": 64}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<eos>"
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts in several forms; a tenth of the documents occur twice."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for name in ("web", "code", "held"):
        (folder / name).mkdir()
        texts = tiny.texts(400, seed=len(name))
        texts = [text if draw.random() > 0.1 else texts[0] for text in texts]
        for start in range(0, len(texts), 150):
            rows = [{"text": text} if draw.random() > 0.1 else {"text": None} for text in texts[start : start + 150]]
            lines = [json.dumps(row) for row in rows]
            (folder / name / f"{start}.jsonl").write_text("\n".join(lines) + "\n" * (start % 2))
    texts = tiny.texts(600, seed=9)
    table = pyarrow.table({"chat": [[{"role": "user", "content": text}] for text in texts]})
    pyarrow.parquet.write_table(table, folder / "chat.parquet", row_group_size=50)
    long = ["\n".join(tiny.texts(40, seed=seed)) for seed in range(12)]
    (folder / "long.txt").write_text("\n\n".join([*long, *texts]))
    return folder


def _cases(folder: Path) -> dict[str, tuple[list[TextSource], dict[str, Any]]]:
    web = TextSource("jsonl", f"{folder}/web", on_missing="skip", min_characters=150)
    code = TextSource("jsonl", f"{folder}/code", on_missing="skip", weight=0.25)
    held = TextSource("jsonl", f"{folder}/held/0.jsonl", on_missing="skip")
    return {
        "lines": ([web], {}),
        "beginning of sequence": ([web], {"add_bos": True}),
        "without duplicates": ([web], {"drop_duplicates": True, "train_rows": 300}),
        "blend": ([web, code], {"drop_duplicates": True}),
        "held-out text of its own": ([web], {"heldout": held}),
        "chats in parquet": ([TextSource("parquet", f"{folder}/chat.parquet", messages="chat")], {}),
        "long documents": ([TextSource("text", f"{folder}/long.txt", separator="blank-line")], {}),
        "hub": ([TextSource("hub", f"{folder}/web", on_missing="skip")], {}),
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, files, batches and pieces so small that there are many of each."""
    monkeypatch.setattr(parts, "PART_BYTES", 2500)
    monkeypatch.setattr(part_files, "BLOCK_TOKENS", 700)
    monkeypatch.setattr(tokenising, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(tokenising, "LONGEST_PIECE", 1500)


@pytest.mark.parametrize("name", _cases(Path()))
def test_parts_give_the_same_rows(
    corpus: Path, tokenizer: Any, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sources, options = _cases(corpus)[name]
    options = SIZES | options
    with ThreadPoolExecutor(3) as pool:

        def run(function: Any, common: Any, jobs: Any) -> Iterator[Any]:
            ahead = list(jobs)  # more than needed, in another order of completion
            yield from pool.map(lambda part: function(common, part), ahead)

        counts = {}
        for way, in_parts in {
            "one go": None,
            "one process": InParts(f"{tmp_path}/parts", in_this_process),
            "three": InParts(f"memory://{tmp_path}/parts", run),
        }.items():
            pack(sources, tokenizer, f"{tmp_path}/{way}", in_parts=in_parts, **options)
            counts[way] = manifest(f"{tmp_path}/{way}")["files"]
            monkeypatch.setattr(tokenising, "BATCH_CHARACTERS", 3333)
    assert counts["one go"] == counts["one process"] == counts["three"]
    assert not (tmp_path / "parts").exists(), "parts are deleted once the rows are written"


@pytest.mark.parametrize("length", [99, 100, 101, 7000])
def test_ranges_of_a_file_have_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 2500)  # ranges begin with a line, near one, and inside long ones
    lines = [json.dumps({"text": f"{number:{length - 13}}"}) for number in range(60)]
    assert {len(line) + 1 for line in lines} == {length}
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = TextSource("jsonl", f"{tmp_path}/a.jsonl")
    divided = list(parts.source_parts(source))
    found = [document.text for part in divided for document in part_documents(source, part, None, LeftOut())]
    assert len(divided) > 2
    assert [int(text) for text in found] == list(range(60))


def test_a_blend_has_the_shares_of_its_weights(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    sources, options = _cases(corpus)["blend"]
    rows = pack(sources, tokenizer, str(tmp_path / "rows"), **(SIZES | options))
    tokens = [source["tokens"] for source in rows.index["sources"]]
    assert sum(source["train"] + source["heldout"] for source in tokens) == 440 * 24
    longest = 1 + max(len(tokenizer(text)["input_ids"]) for text in tiny.texts(400, seed=3) + tiny.texts(400, seed=4))
    assert tokens[0]["train"] == pytest.approx(0.8 * 400 * 24, abs=longest)
    assert rows.index["left_out"]["duplicates"] > 5
    assert rows.index["left_out"]["missing"] > 5


def test_held_out_text_of_its_own_is_in_no_training_row(tokenizer: Any, tmp_path: Path) -> None:
    texts = tiny.texts(60, seed=3)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"text": f" {text}\n"}) for text in texts[:5]))
    source, held = (TextSource("jsonl", f"{tmp_path}/{name}.jsonl") for name in ("train", "held"))
    count = sum(1 + len(tokenizer(text)["input_ids"]) for text in texts[:5])
    sizes = {"seq_length": 16, "train_rows": 100, "heldout_rows": count // 16}
    rows = pack(source, tokenizer, str(tmp_path / "rows"), heldout=held, **sizes)
    assert rows.index["left_out"] == {"in_heldout": 5}
    found = str(rows.take(range(len(rows))).flatten().tolist())
    ids = [str(tokenizer(text)["input_ids"])[1:-1] for text in texts]
    assert ids[5] in found
    assert not any(text in found for text in ids[:5])
    with pytest.raises(InputError, match=r"the held-out text ends after \d+ of 900 held-out rows") as error:
        pack(source, tokenizer, str(tmp_path / "more"), heldout=held, **(sizes | {"heldout_rows": 900}))
    assert "lower heldout_rows to" in error.value.remedy


@pytest.mark.parametrize("drop_duplicates", [True, False])
def test_held_out_text_that_is_not_needed_leaves_nothing_out(
    tokenizer: Any, tmp_path: Path, *, drop_duplicates: bool
) -> None:
    texts = tiny.texts(60, seed=3)
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[:5], None]]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = TextSource("jsonl", f"{tmp_path}/text.jsonl", on_missing="skip")
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    held = len([*chain(*ids[:3])]) // 16  # its last row ends inside the third document, or with it
    expected = [*chain(*ids[3:])]
    sizes = {"seq_length": 16, "train_rows": len(expected) // 16, "heldout_rows": held}
    for name, in_parts in (("one", None), ("parts", InParts(f"{tmp_path}/kept"))):
        options = {"heldout": source, "drop_duplicates": drop_duplicates, "in_parts": in_parts}
        rows = pack(source, tokenizer, f"{tmp_path}/{name}", **sizes, **options)
        assert rows.take(range(len(rows))).flatten().tolist() == expected[: len(rows) * 16], name
        assert rows.index["left_out"] == {"in_heldout": 3}


def _pack_until_killed(corpus: Path, tokenizer: Any, target: str, calls: Path, limit: int) -> None:
    """Pack in parts, and note each part that is tokenised; the process kills itself when it has begun `limit` parts."""
    sources, options = _cases(corpus)["lines"]

    def counted(how: Any, part: Any) -> Iterator[Any]:
        with calls.open("a") as file:
            file.write(f"{part}\n")
        if len(calls.read_text().splitlines()) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenising.tokenise(how, part)

    with mock.patch.object(part_files, "tokenise", counted):
        pack(sources, tokenizer, target, in_parts=InParts(f"{target}-parts"), **(SIZES | options))


def test_finished_parts_are_not_tokenised_again_after_a_kill(
    corpus: Path, tokenizer: Any, tmp_path: Path, small_parts: None
) -> None:
    calls, target = tmp_path / "calls", str(tmp_path / "rows")
    arguments = (corpus, tokenizer, target, calls)
    killed = multiprocessing.get_context("fork").Process(target=_pack_until_killed, args=(*arguments, 6))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    _pack_until_killed(*arguments, limit=-1)
    begun = calls.read_text().splitlines()
    assert len(begun) > 8
    assert sorted(begun) == sorted([*set(begun), begun[5]]), "only the part that was interrupted is done twice"
    source, options = _cases(corpus)["lines"]
    pack(source, tokenizer, str(tmp_path / "undisturbed"), **(SIZES | options))
    assert manifest(target)["files"] == manifest(str(tmp_path / "undisturbed"))["files"]


def _write_until_killed(
    corpus: Path, tokenizer: Any, case: str, target: str, calls: Path, kill: tuple[str, int]
) -> None:
    """Pack in parts, and note each shard that is begun and each table of pieces that is read. kill: the process kills itself
    before it reads tokens of the shard with that name for the given time, counted from 0."""
    sources, options = _cases(corpus)[case]
    reads: dict[str, int] = {}
    begun = [""]

    def noted(name: str) -> None:
        with calls.open("a") as file:
            file.write(f"{name}\n")

    def plan(path: str) -> Any:
        begun[0] = Path(path).name.rsplit("-", 1)[0]
        noted(begun[0])
        return read_plan(path)

    def ranges(path: str, wanted: Any) -> Any:
        reads[begun[0]] = reads.get(begun[0], -1) + 1
        if (begun[0], reads[begun[0]]) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_ranges(path, wanted)

    def pieces(*arguments: Any) -> Any:
        noted("pieces")
        return part_files.part_pieces(*arguments)

    read_plan, read_ranges = shard_plans.ShardPlan.read, shard_writing.read_ranges
    with (
        mock.patch.object(shard_plans.ShardPlan, "read", plan),
        mock.patch.object(shard_writing, "read_ranges", ranges),
        mock.patch.object(part_placing, "part_pieces", pieces),
    ):
        pack(sources, tokenizer, target, in_parts=InParts(f"{target}-parts"), **(SIZES | options))


@pytest.mark.parametrize("case", ["without duplicates", "blend", "held-out text of its own"])
def test_finished_shards_are_not_written_again_after_a_kill(
    corpus: Path, tokenizer: Any, tmp_path: Path, small_parts: None, case: str
) -> None:
    calls, target = tmp_path / "calls", tmp_path / "rows"
    process = multiprocessing.get_context("fork").Process(
        target=_write_until_killed, args=(corpus, tokenizer, case, str(target), calls, ("train-00002.bin", 1))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = calls.read_text().splitlines()
    written = [name for name in before if name != "pieces"]
    assert written == ["heldout-00000.bin", "train-00000.bin", "train-00001.bin", "train-00002.bin"]
    assert not target.exists(), "nobody sees rows that are not complete"
    assert {path.name for path in (tmp_path / "rows-parts/rows").iterdir()} == set(written[:3])
    _write_until_killed(corpus, tokenizer, case, str(target), calls, ("", 0))
    after = calls.read_text().splitlines()[len(before) :]
    assert after[0] == "train-00002.bin", "documents are not placed again"
    assert not set(after) & set(written[:3])
    assert len(after) == len(set(after)) > 2
    sources, options = _cases(corpus)[case]
    pack(sources, tokenizer, str(tmp_path / "undisturbed"), **(SIZES | options))
    assert manifest(str(target))["files"] == manifest(str(tmp_path / "undisturbed"))["files"]
    assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "undisturbed").iterdir()}
    verify(str(target))


@pytest.mark.parametrize("last", ["lines", "without duplicates"])
def test_shards_of_other_rows_are_not_taken(
    corpus: Path, tokenizer: Any, tmp_path: Path, small_parts: None, last: str
) -> None:
    """The folder has shards of the same names and sizes that two packings left which were killed, and one that is truncated."""
    calls = tmp_path / "calls"
    for case in ("lines", "without duplicates"):
        process = multiprocessing.get_context("fork").Process(
            target=_write_until_killed,
            args=(corpus, tokenizer, case, f"{tmp_path}/rows", calls, ("train-00003.bin", 0)),
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (tmp_path / "rows-parts/rows/train-00001.bin").write_bytes(b"truncated")
    sources, options = _cases(corpus)[last]
    for target, in_parts in (("rows", InParts(f"{tmp_path}/rows-parts")), ("undisturbed", None)):
        pack(sources, tokenizer, f"{tmp_path}/{target}", in_parts=in_parts, **(SIZES | options))
    assert manifest(f"{tmp_path}/rows")["files"] == manifest(f"{tmp_path}/undisturbed")["files"]
    verify(f"{tmp_path}/rows")


def test_tokens_and_documents_of_every_source_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    texts = tiny.texts(60, seed=3)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts[20:23], *texts[:30]]))
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [None, *texts[30:32], *texts[30:]])
    )
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:8]))
    a, b, held = (TextSource("jsonl", f"{tmp_path}/{name}.jsonl", on_missing="skip") for name in ("a", "b", "held"))

    def tokens(texts: list[str]) -> int:
        return sum(1 + len(tokenizer(text)["input_ids"]) for text in texts)

    sizes = {"seq_length": 16, "train_rows": tokens(texts[8:30]) // 16, "heldout_rows": tokens(texts[:8]) // 16}
    one = pack(a, tokenizer, f"{tmp_path}/one", heldout=held, drop_duplicates=True, **sizes).sources
    assert [(counts.source, counts.heldout) for counts in one] == [(a.label, False), (held.label, True)]
    assert one[0].tokens == {"train": sizes["train_rows"] * 16, "heldout": 0}
    assert one[1].tokens == {"train": 0, "heldout": sizes["heldout_rows"] * 16}
    assert one[1].documents == {"train": 0, "heldout": 8}
    assert one[0].documents == {"train": 22, "heldout": 0}
    assert one[0].left_out == {"in_heldout": 8, "duplicates": 3}

    sizes = {"seq_length": 16, "train_rows": 2 * tokens(texts) // 3 // 16, "heldout_rows": 3}
    rows = pack([a, b], tokenizer, f"{tmp_path}/two", drop_duplicates=True, heldout_fraction=0.2, **sizes)
    two = rows.sources
    for split in ("train", "heldout"):
        assert sum(counts.tokens[split] for counts in two) == sizes[f"{split}_rows"] * 16
        assert sum(counts.documents[split] for counts in two) == rows.index["splits"][split]["documents"]
    duplicates = [counts.left_out["duplicates"] for counts in two]  # those of a split that is full are not counted
    assert 1 <= duplicates[0] <= 3
    assert 1 <= duplicates[1] <= 2
    assert [counts.left_out.get("missing") for counts in two] == [None, 1]
    assert rows.index["left_out"] == {"duplicates": sum(duplicates), "missing": 1}


def test_a_long_document_whose_end_is_not_needed_is_counted(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.data.tokenising.LONGEST_PIECE", 100)
    (tmp_path / "long.txt").write_text("\n".join(tiny.texts(60)))
    source = TextSource("text", f"{tmp_path}/long.txt")
    sizes = {"seq_length": 16, "train_rows": 4, "heldout_rows": 0, "heldout_fraction": 0.0}
    for name, in_parts in (("here", None), ("parts", InParts(f"{tmp_path}/work"))):
        rows = pack(source, tokenizer, f"{tmp_path}/{name}", **sizes, in_parts=in_parts)
        assert rows.sources[0].documents == {"train": 1, "heldout": 0}
        assert rows.index["splits"]["train"]["documents"] == 1


def test_an_error_in_text_that_is_not_needed_stops_nothing(tokenizer: Any, tmp_path: Path, small_parts: None) -> None:
    lines = [json.dumps({"text": text}) for text in tiny.texts(100)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, "not JSON", *lines]))
    source = TextSource("jsonl", f"{tmp_path}/text.jsonl")
    sizes = {"seq_length": 24, "train_rows": 100, "heldout_rows": 5}
    for name, in_parts in (("one", None), ("parts", InParts(f"{tmp_path}/kept"))):
        pack(source, tokenizer, f"{tmp_path}/{name}", in_parts=in_parts, **sizes)
        with pytest.raises(InputError, match=r"text\.jsonl, line 101: not JSON"):
            pack(source, tokenizer, f"{tmp_path}/{name}-more", in_parts=in_parts, **(sizes | {"train_rows": 900}))
    assert manifest(f"{tmp_path}/one")["files"] == manifest(f"{tmp_path}/parts")["files"]
    assert read_json(f"{tmp_path}/one/index.json")["splits"]["train"]["rows"] == 100
