"""Whatever is in the files of a checkpoint or of scores, they are read or refused in a sentence."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.odd_values import changed, check_sentence, damaged
from hypothesis import example, given
from hypothesis import strategies as st

from minitron.errors import InputError, MinitronError
from minitron.importance import ImportanceScores
from minitron.models import check_contents, source_architecture
from minitron_platform.cli import importance_tables as tables
from minitron_platform.cli.prune_sources import choose_scores

MODEL = tiny.model("llama", tied=False, num_hidden_layers=2, vocab_size=32, hidden_size=16, intermediate_size=8)
BASE = tiny.architecture(MODEL)
SCORES = tiny.scores(BASE)
CONFIG = json.loads(MODEL.config.to_json_string(use_diff=False)) | {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0},
    "quantization_config": None,
    "layer_types": None,
    "text_config": None,
    "attn_implementation": "sdpa",
}
PROVENANCE: dict[str, Any] = {"weights": "0", "rows": 3, "layers": [{"metric": "loss", "rows": 4, "task": None}]}


def _parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the rest."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: Any, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


with tempfile.TemporaryDirectory() as temporary:
    MODEL.save_pretrained(temporary)
    WEIGHTS, WEIGHT_BYTES = _parts(Path(temporary) / "model.safetensors")
    replace(SCORES, removal={"loss": {1: SCORES.heads[:, 0]}}, orders={"loss": {1: [1, 0]}}).save(f"{temporary}/scores")
    SCORE_HEADER, SCORE_BYTES = _parts(Path(temporary) / "scores")


@pytest.fixture(scope="module")
def sound(folder) -> Path:
    MODEL.save_pretrained(folder / "model")
    return folder / "model"


def _check(folder: Path) -> None:
    try:
        source_architecture(str(folder))
        check_contents(str(folder))
    except InputError as error:
        check_sentence(error)


@given(config=changed(CONFIG))
@example(config=CONFIG | {"vocab_size": 0})
@example(config=CONFIG | {"num_attention_heads": 0})
@example(config=CONFIG | {"dtype": "auto"})
@example(config=CONFIG | {"quantization_config": "int4"})
@example(config=CONFIG | {"text_config": {"model_type": "llama"}})
@example(config=CONFIG | {"text_config": True})
@example(config=None)
def test_a_config_is_read_or_refused(sound, config):
    (sound / "config.json").write_text(json.dumps(config))
    _check(sound)


@given(header=changed(WEIGHTS) | damaged(json.dumps(WEIGHTS).encode()), start=st.none() | st.binary(max_size=8))
@example(header={"__metadata__": "a" * 5000}, start=None)
def test_the_header_of_weights_is_read_or_refused(sound, folder, header, start):
    broken = folder / "broken"
    shutil.copytree(sound, broken, dirs_exist_ok=True)
    MODEL.config.save_pretrained(broken)
    content = _joined(header, WEIGHT_BYTES)
    (broken / "model.safetensors").write_bytes(content if start is None else start + content[len(start) :])
    _check(broken)


@given(provenance=changed(PROVENANCE), header=st.just(SCORE_HEADER) | changed(SCORE_HEADER))
@example(provenance=None, header=SCORE_HEADER)
@example(provenance={"layers": None}, header=SCORE_HEADER)
@example(provenance={"layers": ["a", {}, {"task": 3}]}, header=SCORE_HEADER)
@example(provenance=PROVENANCE, header={"__metadata__": "a" * 5000})
@example(provenance=PROVENANCE, header={key: value for key, value in SCORE_HEADER.items() if key != "channels"})
def test_scores_are_read_or_refused(folder, provenance, header):
    file = folder / "scores.safetensors"
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        header = header | {"__metadata__": header["__metadata__"] | {"provenance": json.dumps(provenance)}}
    file.write_bytes(_joined(header, SCORE_BYTES))
    try:
        scores = ImportanceScores.load(file)
        assert tables.provenance(scores)
        for table in (tables.layers(scores), tables.blocks(scores), tables.units(scores)):
            assert table.row_count
        choose_scores([file], BASE, "0")
    except MinitronError as error:
        check_sentence(error)
