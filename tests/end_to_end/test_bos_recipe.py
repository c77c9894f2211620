"""A recipe whose teacher was trained with a beginning-of-sequence (BOS) token: the rows, and the message about it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers import tiny
from tokenizers import processors

from minitron.data import Rows, TextSource, pack, rows_for_step
from minitron.errors import InputError
from minitron_platform import plan, run
from minitron_platform.recipes.load import load_recipe
from minitron_platform.stages.data import Data
from minitron_platform.stages.teacher import Teacher

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def begun(bench, tmp_path_factory):
    """A folder with a recipe for a teacher that was trained briefly on rows that begin with BOS."""
    folder = tmp_path_factory.mktemp("begun")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    text = TextSource("jsonl", str(bench / "text.jsonl"))
    rows = pack(text, tokenizer, str(folder / "rows"), seq_length=SEQ_LENGTH, train_rows=200, heldout_rows=0)
    model = tiny.model("llama", vocab_size=len(tokenizer), hidden_size=48, num_attention_heads=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(50):
        batch = rows.take(rows_for_step(len(rows), 16, step, seed=0))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    recipe = yaml.safe_load((bench / "recipe.yaml").read_text())
    recipe["teacher"]["model"] = str(folder / "teacher")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def _data(folder, add_bos=None, storage="runs"):
    """The output of the data stage, as a dict."""
    overrides = [] if add_bos is None else [f"data.add_bos={add_bos}"]
    recipe = load_recipe(str(folder / "recipe.yaml"), overrides)
    return (
        run(recipe, storage_path=str(folder / storage), until="data")
        .output(Data)
        .model_dump(mode="json", exclude_none=True)
    )


@pytest.fixture(scope="module")
def data(begun):
    """For each value of `data.add_bos`, the output of the data stage and the text that was printed."""
    import contextlib
    import io

    found = {}
    for add_bos in (None, "false", "true"):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found[add_bos] = (_data(begun, add_bos), " ".join(said.getvalue().split()))
    return found


def test_rows_begin_with_bos_like_the_tokenizers_texts_and_the_teachers_loss_is_measured_with_and_without(data, begun):
    outputs, said = data[None]
    bos = tiny.tokenizer().vocab_size
    for split in ("train", "heldout"):
        rows = Rows.open(outputs["folder"], split)
        ids = rows.take(range(len(rows)))
        assert ids.shape[1] == SEQ_LENGTH
        assert bool((ids[:, 0] == bos).all())
        assert bool((ids[:, 1:] == bos).any()), "documents that begin inside a row have a BOS too"
    assert outputs["loss_with_bos"] < outputs["loss_without_bos"] - 0.3
    assert f"begin with BOS (the teacher's loss {outputs['loss_with_bos']:.3f}" in said
    assert "worse" not in said
    record = "".join(path.read_text() for path in begun.glob("runs/runs/*/spool/*.jsonl"))
    metrics = [json.loads(line).get("values", {}) for line in record.splitlines()]
    assert outputs["loss_with_bos"] in [values.get("loss_with_bos") for values in metrics]


def test_a_warning_says_if_the_teacher_is_worse_with_the_chosen_beginning(data):
    outputs, said = data["false"]
    ids = Rows.open(outputs["folder"], "train")
    assert not bool((ids.take(range(len(ids))) == tiny.tokenizer().vocab_size).any())
    assert outputs["train"] != data[None][0]["train"]
    assert outputs["fingerprint"] != data[None][0]["fingerprint"]
    worse = outputs["loss_without_bos"] - outputs["loss_with_bos"]
    assert f"worse without BOS than with BOS, by {worse:.2f} nats per token: set data.add_bos: true" in said


def test_stating_the_default_does_not_pack_the_rows_again(data):
    assert data["true"][0] == data[None][0]


def test_add_bos_without_a_bos_token_is_refused_before_anything_starts(bench, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    (tmp_path / "teacher").mkdir()
    for file in (bench / "teacher").iterdir():
        (tmp_path / "teacher" / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path / "teacher")
    overrides = [f"teacher.model={tmp_path / 'teacher'}", "data.add_bos=true"]
    recipe = load_recipe(str(bench / "recipe.yaml"), overrides)
    with pytest.raises(InputError, match=r"data\.add_bos: true, but the tokenizer has no beginning-of-sequence"):
        plan(recipe, storage_path=str(tmp_path / "runs"))
    with pytest.raises(InputError, match=r"data\.add_bos: true"):
        run(recipe, storage_path=str(tmp_path / "runs"), until="data")


def test_add_bos_reaches_the_benchmarks_of_calibration_search_and_training(begun, data, bench, monkeypatch):
    import minitron.evaluation
    from minitron.distill.inputs import DistillInputs
    from minitron.models import load_model
    from minitron_platform.recipes.build import benchmarks, distill_config, lm_eval_tasks
    from minitron_platform.training.train import TrainTask, task_results

    told = []
    evaluate, during_training = minitron.evaluation.evaluate, minitron.evaluation.evaluate_documents

    def listen(*arguments, add_bos=None, **options):
        told.append(add_bos)
        return evaluate(*arguments, add_bos=add_bos, **options)

    def listen_during_training(*arguments, add_bos=None, **options):
        told.append(add_bos)
        return during_training(*arguments, add_bos=add_bos, **options)

    monkeypatch.setattr("minitron.evaluation.evaluate", listen)
    monkeypatch.setattr("minitron.evaluation.evaluate_documents", listen_during_training)
    task = {"name": "arc_easy", "data": str(bench / "arc.jsonl"), "limit": 1}
    overrides = [
        "data.add_bos=false",
        "calibrate.layers=task",
        f"calibrate.task={task}",
        "family.0.space.num_layers=[4]",
    ]
    overrides += ["calibrate.rows=4", f"search.evaluate={{keep: 1, tasks: [{task}]}}"]
    recipe = load_recipe(str(begun / "recipe.yaml"), overrides)
    context = run(recipe, storage_path=str(begun / "runs"), until="calibrate")
    assert context.output(Data).train == data["false"][0]["train"]
    assert told
    assert set(told) == {False}
    assert benchmarks(recipe, "teacher").add_bos is False

    told.clear()
    folder = context.output(Teacher).folder
    training = TrainTask(
        materials=DistillInputs(folder, "", "float32", "", "", ""),
        config=distill_config(recipe.distill),
        losses=None,
        checkpoints="",
        curve="",
        result="",
        key="",
        tasks=lm_eval_tasks([recipe.calibrate.task]),
        add_bos=recipe.data.bos,
    )
    task_results(training, load_model(folder), lambda name, error: pytest.fail(f"{name}: {error}"))
    assert told == [False]
