"""With `documents` every use of packed rows gives the same results as separate documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import distilling, tiny
from helpers.documents import DOCUMENTS, one_by_one

from minitron import estimate_importance
from minitron.attention import row_arguments
from minitron.data import Rows
from minitron.distill import LiveTeacher, StoredTeacher, store_hidden
from minitron.distill.inputs import DistillInputs
from minitron.errors import InputError, StorageError
from minitron.evaluation import heldout_metrics
from minitron.evaluation.heldout import teacher_targets
from minitron.importance import LayerScoring
from minitron.logits import Head


def test_calibration_and_held_out_metrics_do_not_depend_on_which_documents_share_a_row():
    # two documents of 12 tokens, in one row or in two
    model, teacher = tiny.model(num_hidden_layers=3), tiny.model(seed=1)
    rows = tiny.rows(4, 24)
    rows[rows == DOCUMENTS.end] = 8
    rows[:, [11, 23]] = DOCUMENTS.end
    alone = rows.view(8, 12)
    layers = LayerScoring("loss", sizes=(1,))
    together = estimate_importance(model, rows, documents=DOCUMENTS, batch_aggregation="mean", layers=layers)
    apart = estimate_importance(model, alone, batch_aggregation="mean", layers=layers)
    for name in ("heads", "neurons", "channels", "similarity"):
        assert torch.allclose(getattr(together, name), getattr(apart, name), rtol=1e-4), name
    assert together.provenance["documents"] == "separate"
    assert "documents" not in apart.provenance
    blind = estimate_importance(model, rows, batch_aggregation="mean", layers=layers)
    assert not torch.allclose(blind.heads, together.heads, rtol=1e-3)
    assert not torch.allclose(blind.removal["loss"][1], together.removal["loss"][1], rtol=1e-3)
    metrics = heldout_metrics(model, rows, **teacher_targets(teacher, rows, DOCUMENTS))
    own, other = (one_by_one(each, rows)[:, :-1].flatten(0, 1) for each in (model, teacher))
    log_p, log_q = (
        Head.of(each).logits(hidden).double().log_softmax(-1) for each, hidden in ((teacher, other), (model, own))
    )
    assert metrics.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)


def test_with_longrope_a_row_does_not_depend_on_the_documents_of_the_rows_beside_it():
    model, rows = tiny.longrope_model(short_length=12), tiny.rows(2, 24)
    rows[rows == DOCUMENTS.end] = 8
    rows[0, [8, 16]] = DOCUMENTS.end  # the documents of the first row are short, that of the second is long
    both, alone = (model.model(input_ids=ids, **row_arguments(model, ids, DOCUMENTS))[0] for ids in (rows, rows[:1]))
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_live_and_stored_teachers_must_separate_documents_like_the_student(material, tmp_path):
    rows = Rows.open(str(material / "rows"), "train")
    ids, config = rows.take(range(16)), replace(distilling.CONFIG, steps=3)
    teacher = distilling.load_teacher(material)
    assert (rows.boundaries.numbers(ids) > 1).any()
    store_hidden(lambda: teacher, rows, str(tmp_path / "apart"), key="apart", documents=rows.boundaries)
    stored = StoredTeacher(str(tmp_path / "apart"), Head.of(teacher), "apart")
    live = LiveTeacher(teacher, documents=rows.boundaries)
    assert torch.equal(stored.hidden(range(16), ids), live.hidden(range(16), ids))
    assert not torch.allclose(stored.hidden(range(16), ids), distilling.stored_teacher(material).hidden(range(16), ids))
    apart = distilling.distil(material, config, live, documents=rows.boundaries)[0]
    again = distilling.distil(material, config, stored, documents=rows.boundaries)[0]
    together = distilling.distil(material, config)[0]
    for (_, loss), (_, same), (_, other) in zip(apart, again, together, strict=True):
        assert loss == pytest.approx(same, rel=1e-5)
        assert abs(loss - other) > 1e-4
    with pytest.raises(InputError, match="the teacher keeps none apart, the student those that end with token 0"):
        distilling.distil(material, config, LiveTeacher(teacher), documents=rows.boundaries)


def test_stored_targets_with_and_without_separate_documents_have_different_keys(material):
    folder = str(material)
    inputs = DistillInputs(f"{folder}/teacher", "id", "float32", f"{folder}/rows", "", "")
    apart = replace(inputs, separate_documents=True)
    assert inputs.documents() is None
    assert apart.documents() == Rows.open(f"{folder}/rows", "heldout").boundaries
    assert inputs.targets_key("train") != apart.targets_key("train")
    with pytest.raises(StorageError):
        StoredTeacher(f"{folder}/hidden", Head.of(distilling.load_teacher(material)), apart.targets_key("train"))
