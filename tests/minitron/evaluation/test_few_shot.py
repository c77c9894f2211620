"""Few-shot prompts and scores with local documents are those of lm-eval for every document, wherever it takes examples from."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import yaml
from helpers.evaluating import (
    WORDS,
    arc_documents,
    byte_tokenizer,
    results_of_lm_eval,
    sums,
    tiny_model,
    write_jsonl,
)

from minitron.errors import InputError
from minitron.evaluation import Task, check_tasks, evaluate_documents
from minitron.evaluation.tasks import parts, read_definition

SHOTS = 3
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
DEFINITION = {
    "task": "own",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
EXAMPLES = [
    {"question": f"Who is {n}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    for n in range(5)
]
SHAPES = {
    "a test split, and examples named": {"test_split": "test", "fewshot_split": "train"},
    "a test split, and examples not named": {"test_split": "test", "training_split": "train"},
    "a test split, and examples of validation": {"test_split": "test", "validation_split": "validation"},
    "no test split, and examples named": {"validation_split": "validation", "fewshot_split": "dev"},
    "no test split, and examples not named": {"validation_split": "validation", "training_split": "train"},
    "only a validation split": {"validation_split": "validation"},
    "examples named among the scored": {"test_split": "test", "fewshot_split": "test", "training_split": "train"},
    "examples named twice": {
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"split": "dev", "sampler": "first_n"},
    },
    "examples of its own, with a test split": {"test_split": "test", "fewshot_config": {"samples": EXAMPLES}},
    "examples of its own, without a test split": {
        "validation_split": "validation",
        "training_split": "train",
        "fewshot_config": {"samples": EXAMPLES},
    },
    "a test split that is missing": {
        "test_split": "none",
        "validation_split": "validation",
        "training_split": "train",
    },
    "examples that are missing": {"test_split": "test", "fewshot_split": "none", "validation_split": "validation"},
}


@pytest.fixture(scope="module")
def student():
    return tiny_model(1, max_position_embeddings=1024).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def by_lm_eval(model, tokenizer, task, files, cache):
    """lm-eval's sample of each document by its number, for the definition of `task` without the splits that `files` lacks."""
    config = read_definition(next(parts(Task(task.name, folder=task.folder))).definition, functions=True)
    config.pop("dataset_name", None)
    for split in SPLITS:
        if config.get(split) not in files:
            config.pop(split, None)
    config |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(file) for name, file in files.items()}, "cache_dir": str(cache)},
    }
    results = results_of_lm_eval(model, tokenizer, config, num_fewshot=task.num_fewshot, log_samples=True)
    return {str(sample["doc_id"]): sample for sample in results["samples"][task.name]}


def check_equal(student, tokenizer, task, files, cache):
    """That prompts and values of every document are those of lm-eval."""
    found = evaluate_documents(student, tokenizer, [task], samples=1000, batch_size=4)[task.name]
    expected = by_lm_eval(student, tokenizer, task, files, cache)
    assert len(found.samples) == len(found.documents) == len(expected)
    assert {each.id: each.prompt for each in found.documents} == {
        number: sample["prompt_hash"][:16] for number, sample in expected.items()
    }
    for sample in found.samples:
        prompt = str(expected[sample.id]["arguments"][0][0])
        # of Winogrande, whose choices are inside the prompt, what they have in common is shown
        assert prompt.startswith(sample.prompt) if task.name == "winogrande" else prompt == sample.prompt
        assert len(sample.prompt) > 80
    for document in found.documents:
        assert document.values[found.main] == pytest.approx(float(expected[document.id][found.score.metric]), abs=1e-5)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_examples_are_those_of_lm_eval_wherever_it_takes_them_from(student, tokenizer, tmp_path, shape):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text(yaml.safe_dump(DEFINITION | SHAPES[shape]))
    named = [SHAPES[shape].get(split) for split in SPLITS] + [SHAPES[shape].get("fewshot_config", {}).get("split")]
    files = {
        name: write_jsonl(tmp_path / "data" / f"{name}.jsonl", arc_documents(6, seed=number))
        for number, name in enumerate(("train", "validation", "test", "dev"))
        if name in named
    }
    task = Task("own", str(tmp_path / "data"), num_fewshot=SHOTS, folder=str(tmp_path / "mine"))
    score = check_equal(student, tokenizer, task, files, tmp_path / "cache").score
    examples = score.examples
    assert (examples is None) is shape.startswith("examples of its own")
    assert score.settings.startswith(
        f"3-shot with examples of {examples}" if examples not in (None, "train") else "3-shot,"
    )


def endings(count, seed):
    draw = random.Random(seed)
    return [
        {
            "activity_label": draw.choice(WORDS),
            "ctx_a": f"A {draw.choice(WORDS)} is there.",
            "ctx_b": f"the {draw.choice(WORDS)}",
            "endings": [" ".join(draw.sample(WORDS, 3)) for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for _ in range(count)
    ]


def gaps(count, seed):
    draw = random.Random(seed)
    return [
        {
            "sentence": f"The {draw.choice(WORDS)} is near the _ and the {draw.choice(WORDS)}.",
            "option1": draw.choice(WORDS[:5]),
            "option2": draw.choice(WORDS[5:]),
            "answer": draw.choice("12"),
        }
        for _ in range(count)
    ]


def choices(count, seed):
    draw = random.Random(seed)
    return [
        {"question": f"Which {draw.choice(WORDS)}?", "choices": draw.sample(WORDS, 4), "answer": draw.randrange(4)}
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "scored", "examples", "documents"),
    [
        ("hellaswag", "validation", "train", endings),
        ("winogrande", "validation", "train", gaps),
        ("mmlu_anatomy", "test", "dev", choices),
        ("gsm8k", "test", "train", lambda count, seed: sums(count + seed)[seed:]),
    ],
)
def test_examples_of_published_benchmarks_are_those_of_lm_eval(
    student, tokenizer, tmp_path, name, scored, examples, documents
):
    files = {
        scored: write_jsonl(tmp_path / "data" / f"{scored}.jsonl", documents(4, 1)),
        examples: write_jsonl(tmp_path / "data" / f"{examples}.jsonl", documents(9, 2)),
    }
    task = Task(name, str(tmp_path / "data"), num_fewshot=SHOTS)
    check_equal(student, tokenizer, task, files, tmp_path / "cache")


@pytest.mark.parametrize(
    ("splits", "present", "problem"),
    [
        ({"test_split": "test"}, ["test"], "no split for examples besides 'test'"),
        ({"test_split": "test", "training_split": "test"}, ["test"], "no split for examples besides 'test'"),
        ({"validation_split": "validation", "training_split": "train"}, ["validation"], "no split for examples"),
        ({"validation_split": "validation"}, ["validation"], "has 2 examples besides the one that is left out"),
    ],
)
def test_a_document_is_never_among_its_own_examples(tmp_path, splits, present, problem):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text(yaml.safe_dump(DEFINITION | splits))
    for name in present:
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", arc_documents(3))
    with pytest.raises(InputError, match=problem):
        check_tasks([Task("own", str(tmp_path / "data"), num_fewshot=SHOTS, folder=str(tmp_path / "mine"))])


def test_a_definition_that_sets_the_number_of_examples_to_0_keeps_it_as_in_lm_eval(student, tokenizer, tmp_path):
    fixed = DEFINITION | {"test_split": "test", "training_split": "train", "num_fewshot": 0}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text(yaml.safe_dump(fixed))
    group = {"group": "both", "task": ["own"]}
    (tmp_path / "mine" / "both.yaml").write_text(yaml.safe_dump(group))
    files = {name: write_jsonl(tmp_path / "data" / f"{name}.jsonl", arc_documents(4)) for name in ("train", "test")}
    none = Task("own", str(tmp_path / "data"), folder=str(tmp_path / "mine"))
    found = evaluate_documents(student, tokenizer, [none], samples=10, batch_size=4)["own"]
    asked = by_lm_eval(student, tokenizer, replace(none, num_fewshot=SHOTS), files, tmp_path / "cache")
    assert {each.id: each.prompt for each in found.documents} == {
        number: sample["prompt_hash"][:16] for number, sample in asked.items()
    }
    for data in (none.data, None):  # in a folder, and on the hub
        with pytest.raises(InputError, match="num_fewshot is 3, but its definition sets it to 0") as refusal:
            check_tasks([replace(none, data=data, num_fewshot=SHOTS)])
        assert "set num_fewshot to 0" in refusal.value.remedy
    with pytest.raises(InputError, match="its definition 'own' sets it to 0") as refusal:
        check_tasks([replace(none, name="both", num_fewshot=SHOTS)])
    assert refusal.value.remedy.startswith("name its tasks one by one")
