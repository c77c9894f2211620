"""Documents of which a task's questions cannot be made are refused by file, line and field, by a plan as by an evaluation."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.evaluating import arc_documents, byte_tokenizer, sums, tiny_model, write_jsonl

from minitron.errors import InputError
from minitron.evaluation import Task, check_ready, check_requirements, evaluate_documents


@pytest.fixture(scope="module")
def asked():
    """A function that evaluates a task with a tiny model."""
    model, tokenizer = tiny_model(0), byte_tokenizer()
    return lambda task: evaluate_documents(model, tokenizer, [task])


def refused_alike(asked, task):
    """The error of a plan, which is that of an evaluation."""
    errors = []
    for run in (check_requirements, asked):
        with pytest.raises(InputError) as refused:
            run(task)
        errors.append(str(refused.value))
    assert errors[0] == errors[1]
    return errors[0]


def without(documents, number, *keys):
    """`documents` with one that lacks a field, or one inside a field."""
    documents = json.loads(json.dumps(documents))
    inner = documents[number]
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return documents


def changed(documents, number, **fields):
    return [document | fields if each == number else document for each, document in enumerate(documents)]


ENDINGS = [
    {
        "activity_label": "Walking",
        "ctx_a": f"Someone {n}",
        "ctx_b": "goes",
        "endings": ["a", "b", "c", "d"],
        "label": "1",
    }
    for n in range(6)
]
ARC, SUMS = arc_documents(6), sums(4)
MISSING = {
    "a field": (
        "arc_easy",
        without(ARC, 2, "question"),
        "test.jsonl, line 3: .*: there is no field 'question'; its fields",
    ),
    "one of the first": ("arc_easy", without(ARC, 0, "question"), "line 1: .*: there is no field 'question'"),
    "one of all": (
        "arc_easy",
        [{"answerKey": "A"}] * 3,
        "line 1: .*there is no field '(question|choices)'; .*are answerKey",
    ),
    "all fields": ("arc_easy", [ARC[0], {}, *ARC], "line 2: .*; its fields are none"),
    "one inside a field": ("arc_easy", without(ARC, 3, "choices", "text"), "line 4: .*: there is no field 'text'"),
    "the answer": ("gsm8k", without(SUMS, 2, "answer"), "line 3: .*: there is no field 'answer'"),
    "one that a function reads": ("hellaswag", without(ENDINGS, 4, "ctx_b"), "line 5: .*: there is no field 'ctx_b'"),
    "one that a function reads, of all": ("hellaswag", without(ENDINGS[:1], 0, "label"), "line 1: .*no field 'label'"),
    "a value": ("arc_easy", changed(ARC, 3, question=None), "line 4: .*: null in question would be written as None"),
    "a choice": (
        "arc_easy",
        changed(ARC, 5, answerKey="Z"),
        "line 6: .*ValueError: 'Z' is not in list \\(from answerKey\\)",
    ),
    "a number": ("hellaswag", changed(ENDINGS, 2, label="two"), "line 3: .*ValueError: .*'two'"),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_document_that_lacks_what_its_question_needs_is_named(asked, tmp_path, what):
    name, documents, problem = MISSING[what]
    split = "validation" if name == "hellaswag" else "test"
    task = Task(name, str(write_jsonl(tmp_path / f"{split}.jsonl", documents).parent))
    with pytest.raises(InputError, match=problem) as refused:
        check_requirements(task)
    assert str(refused.value) == refused_alike(asked, task)
    assert f"task {name!r}: {tmp_path}/{split}.jsonl, line" in refused.value.problem
    assert f"{name.split('_')[0]}" in refused.value.remedy


def test_documents_and_fields_that_are_not_used_may_lack_something(asked, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", without(without(ARC, 4, "question"), 1, "id"))
    write_jsonl(tmp_path / "train.jsonl", without(ARC, 1, "question"))
    few = Task("arc_easy", str(tmp_path), limit=4)
    check_requirements(few)
    assert asked(few)["arc_easy"].score.num_documents == 4
    shots = Task("arc_easy", str(tmp_path), limit=4, num_fewshot=3)
    assert f"{tmp_path}/train.jsonl, line 2: " in refused_alike(asked, shots)
    write_jsonl(tmp_path / "train.jsonl", changed(ARC, 4, answerKey="Z"))
    assert f"{tmp_path}/train.jsonl, line 5: " in refused_alike(asked, shots)


def test_lines_are_counted_with_the_empty_ones_and_shards_by_themselves(tmp_path):
    lines = [json.dumps(document) for document in without(ARC, 2, "question")]
    (tmp_path / "test-00000-of-00002.jsonl").write_text("\n".join(map(json.dumps, ARC)))
    (tmp_path / "test-00001-of-00002.jsonl").write_text("\n\n".join(lines))
    with pytest.raises(InputError, match=r"test-00001-of-00002\.jsonl, line 5: .*no field 'question'"):
        check_requirements(Task("arc_easy", str(tmp_path)))


def test_a_null_of_a_parquet_file_is_named_by_its_document(asked, tmp_path):
    table = pyarrow.Table.from_pylist(changed(ARC, 3, question=None))
    pyarrow.parquet.write_table(table, tmp_path / "test.parquet")
    assert "test.parquet, document 4: " in refused_alike(asked, Task("arc_easy", str(tmp_path)))


def test_the_number_of_an_answer_that_is_none_of_the_choices_is_refused(tmp_path):
    short = changed(ARC, 3, choices={"text": ["a"], "label": ["A", "B"]}, answerKey="B")
    write_jsonl(tmp_path / "test.jsonl", short)
    with pytest.raises(InputError, match=r"test\.jsonl, line 4: .*the answer is choice 2 of 1; its fields are"):
        check_requirements(Task("arc_easy", str(tmp_path)))


def test_a_choice_without_text_is_refused(tmp_path):
    """Not scored as lm-eval does: it divides by the choice's length for acc_norm, warns, and never chooses it. None of the real
    documents of ARC, HellaSwag, PIQA and the like has one, so that no published score is out of reach."""
    texts = {"text": ["green", "", "blue", "red"], "label": ["A", "B", "C", "D"]}
    write_jsonl(tmp_path / "test.jsonl", changed(ARC, 3, choices=texts))
    with pytest.raises(InputError, match=r"test\.jsonl, line 4: .*choice 2 of 4 is empty \(from choices\.text\); its"):
        check_requirements(Task("arc_challenge", str(tmp_path)))
    check_requirements(Task("arc_challenge", str(tmp_path), limit=3))
    whole = json.dumps(changed(ARC, 3, question="\U0001f600")[3])  # a pair of surrogates in JSON
    (tmp_path / "test.jsonl").write_text(whole)
    check_requirements(Task("arc_challenge", str(tmp_path)))


LINES = b"".join(json.dumps(document).encode() + b"\n" for document in ARC)
UNREADABLE = {
    "empty": ("test.jsonl", b"", r"test\.jsonl: contains no documents"),
    "cut off in a line": ("test.jsonl", LINES[:-30], r"test\.jsonl, line 6: not JSON"),
    "not UTF-8": (
        "test.jsonl",
        LINES + b'{"question": "\xff"}',
        r"test\.jsonl, line 7: not UTF-8 \(invalid start byte, byte 15\)",
    ),
    "not a document": ("test.jsonl", LINES + b"3\n", r"test\.jsonl, line 7: not a JSON object"),
    "a gzip file that is cut off": ("test.jsonl.gz", gzip.compress(LINES)[:-9], r"test\.jsonl\.gz: cannot be unpacked"),
    "a Zstandard file that is cut off": (
        "test.jsonl.zst",
        pyarrow.compress(LINES, "zstd", asbytes=True)[:-9],
        r"test\.jsonl\.zst: cannot be unpacked",
    ),
    "no parquet file": ("test.parquet", b"PAR1" + LINES, r"test\.parquet: .*is not a whole parquet file"),
    "half a surrogate pair": (
        "test.jsonl",
        LINES
        + json.dumps(ARC[0] | {"choices": {"text": ["\ud83d\ude00", "a \ud800 b"], "label": ["A", "B"]}}).encode(),
        r"test\.jsonl, line 7, field 'choices': has half a surrogate pair, '\\ud800', .*\n.*write the whole character",
    ),
    "another type": (
        "test.jsonl",
        LINES + json.dumps(ARC[0] | {"question": 7}).encode(),
        r"test\.jsonl, line 7, field 'question': a number, and text on line 1",
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("used", ["scored", "examples"])
def test_a_file_that_cannot_be_read_is_named_by_a_plan_too(asked, tmp_path, what, used):
    name, content, problem = UNREADABLE[what]
    if used == "examples":
        name, problem = name.replace("test", "train"), problem.replace("test", "train")
        write_jsonl(tmp_path / "test.jsonl", ARC)
        if what == "empty":
            problem = "the split 'train' of .* has 0 examples"
    (tmp_path / name).write_bytes(content)
    task = Task("arc_easy", str(tmp_path), num_fewshot=2 if used == "examples" else 0)
    with pytest.raises(InputError, match=problem):
        check_requirements(task)
    refused_alike(asked, task)


def test_an_arrow_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(InputError, match=r"is not an Arrow folder .*") as refused:
        check_requirements(Task("arc_easy", str(tmp_path)))
    assert refused.value.remedy == "copy or download it again"


def test_of_a_task_that_does_not_exist_no_documents_are_missed(tmp_path):
    with pytest.raises(InputError) as refused:
        check_requirements(Task("arc_easyy", str(tmp_path / "gone")))
    assert refused.value.problem == "task 'arc_easyy': lm-eval has no such task"
    assert "did you mean arc_easy" in refused.value.remedy


def test_everything_that_tasks_lack_is_named_in_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("minitron.evaluation.requirements.find_spec", lambda name: None if name == "nltk" else name)
    write_jsonl(tmp_path / "arc" / "test.jsonl", without(ARC, 2, "question"))
    write_jsonl(tmp_path / "ifeval" / "train.jsonl", [{"prompt": "a"}])
    (tmp_path / "mmlu").mkdir()
    write_jsonl(tmp_path / "good" / "test.jsonl", ARC)
    tasks = [
        Task("mbpp", str(tmp_path / "gone")),
        Task("arc_easy", str(tmp_path / "arc")),
        Task("ifeval", str(tmp_path / "ifeval")),
        Task("mmlu", str(tmp_path / "mmlu")),
        Task("arc_challenge", str(tmp_path / "good")),
        Task("no_such_task"),
    ]
    with pytest.raises(InputError) as refused:
        check_ready(tasks)
    title, *lines = refused.value.problem.splitlines()
    assert title == f"{len(lines)} problems:"
    for line, (problem, remedy) in zip(
        lines,
        [
            (f"{tmp_path}/gone: no such file or folder", "check the path"),
            ("task 'mbpp': it runs code that the model generates", "--allow-code"),
            ("arc/test.jsonl, line 3: ", "give documents with the fields"),
            ("task 'ifeval': its definition needs nltk", "pip install 'minitron[ifeval]'"),
            ("mmlu/abstract_algebra", "one folder for each subject"),
            ("mmlu/anatomy", "one folder for each subject"),
            ("task 'mmlu': 55 more like these", "one folder for each subject"),
            ("lm-eval has no such task", "did you mean"),
        ],
        strict=True,
    ):
        assert line.startswith("  - ")
        assert problem in line
        assert remedy in line
