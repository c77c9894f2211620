"""Task definitions in a folder of the user's: scored like lm-eval's, and harmless without `allow_code`."""

from __future__ import annotations

import pytest
from helpers.evaluating import arc_documents, byte_tokenizer, tiny_model, write_jsonl

from minitron.errors import InputError
from minitron.evaluation import Task, check_tasks, evaluate

DEFINITION = """
task: {name}
output_type: multiple_choice
test_split: test
doc_to_text: "{text}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
LIKE_ARC = "Question: {{question}}\\nAnswer:"
# what a template without a sandbox runs: any function of any module that Python has loaded
ATTACK = "{{{{ cycler.__init__.__globals__.os.mkdir('{folder}') }}}}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def data(tmp_path):
    return str(write_jsonl(tmp_path / "test.jsonl", arc_documents(6)))


def test_a_task_a_group_and_a_stock_task_are_scored_with_a_folder(folder, data, tmp_path):
    (folder / "own.yaml").write_text(DEFINITION.format(name="own", text=LIKE_ARC))
    (folder / "other.yaml").write_text("include: own.yaml\ntask: own_other\n")
    (folder / "both.yaml").write_text("group: own_both\ntask: [own, own_other]\n")
    for name in ("own", "own_other"):
        write_jsonl(tmp_path / "group" / name / "test.jsonl", arc_documents(6))
    tasks = [
        Task("own", data, folder=str(folder)),
        Task("arc_easy", data, folder=str(folder)),
        Task("own_both", str(tmp_path / "group"), folder=str(folder), limit=0.5),
    ]
    scores = evaluate(tiny_model(1), byte_tokenizer(), tasks)
    assert scores["own"].value == scores["arc_easy"].value
    assert scores["own"].version == "3"
    assert scores["own_both"].num_documents == 6
    assert scores["own_both"].settings == (
        "0-shot, 6 of 12 documents of test, the first ones of each of 2 tasks, ± by 2 groups of them"
    )


def test_python_of_a_folder_runs_only_with_allow_code(folder, data, tmp_path):
    (folder / "own.yaml").write_text(
        DEFINITION.format(name="own", text=LIKE_ARC).replace('"{{choices.text}}"', "!function mine.texts")
    )
    (folder / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "def texts(doc):\n    return doc['choices']['text']\n"
    )
    task = Task("own", data, folder=str(folder))
    with pytest.raises(InputError, match=r"runs the Python code in .*mine\.py") as refused:
        evaluate(tiny_model(1), byte_tokenizer(), [task])
    assert "allow_code" in refused.value.remedy
    assert not (tmp_path / "ran").exists()
    allowed = Task("own", data, folder=str(folder), allow_code=True)
    assert evaluate(tiny_model(1), byte_tokenizer(), [allowed])["own"].num_documents == 6
    assert (tmp_path / "ran").exists()


def test_a_template_reaches_nothing_but_the_document(folder, data, tmp_path):
    (folder / "own.yaml").write_text(
        DEFINITION.format(
            name="own", text=ATTACK.format(folder=tmp_path / "made").replace("{{{{", "{{").replace("}}}}", "}}")
        )
    )
    with pytest.raises(Exception, match="unsafe"):
        evaluate(tiny_model(1), byte_tokenizer(), [Task("own", data, folder=str(folder))])
    assert not (tmp_path / "made").exists()


def test_a_definition_includes_only_its_own_folder(folder, data, tmp_path):
    (tmp_path / "outside.yaml").write_text(DEFINITION.format(name="x", text=LIKE_ARC))
    (folder / "own.yaml").write_text("include: ../outside.yaml\ntask: own\n")
    (folder / "taken.yaml").write_text("task: own_too\n")
    with pytest.raises(InputError, match=r"includes .*outside\.yaml, which is outside its folder"):
        check_tasks([Task("own", data, folder=str(folder))])
    (folder / "taken.yaml").write_text("task: arc_easy\n")
    with pytest.raises(InputError, match="'arc_easy' is also one of lm-eval's"):
        check_tasks([Task("own", data, folder=str(folder))])


LISTS = "\n".join(["a0: &a0 [x]", *(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(8))])
REFUSED = {
    "a function by a name with a line break": ('x: !function "mine\\n.f"', "not the name of a Python function"),
    "a function by its path": ("x: !function {folder}/mine.f", "not the name of a Python function"),
    "a function as a key": ("x: {{? !function mine.f : 1}}", "a key that is not plain"),
    "a function inside a key": ("x: {{? [!function mine.f] : 1}}", "a key that is not plain"),
    "a function of Python's own": ("process_docs: !function os.getcwd", "which is not in lm-eval's package"),
    "an object of Python": ('x: !!python/object/apply:os.mkdir ["{folder}/ran"]', "the tag .* is not known"),
    "more values than fit into memory": (LISTS, "more than 200,000 values"),
    "an alias of itself": ("x: &x [*x]", "an alias that contains itself"),
    "a metric that lm-eval does not have": ("metric_list: [{{metric: mine}}]", "would run Python code of that name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_definition_runs_no_code_and_fills_no_memory_in_odd_ways(name, folder, data, monkeypatch):
    monkeypatch.chdir(folder)
    text, problem = REFUSED[name]
    definition = DEFINITION.format(name="own", text=LIKE_ARC)
    if text.startswith("metric_list"):
        definition = "".join(line for line in definition.splitlines(keepends=True) if "metric_list" not in line)
    (folder / "own.yaml").write_text(f"{definition}{text.format(folder=folder)}\n")
    for file in ("mine.py", "mine\n.py", "mine/mine.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\nf = str\n")
    with pytest.raises(InputError, match=problem):
        evaluate(tiny_model(1), byte_tokenizer(), [Task("own", data, folder=str(folder))])
    assert not (folder / "ran").exists()
