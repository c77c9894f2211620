"""A model whose weights the hub refuses, or stops sending, is an error that says so."""

from __future__ import annotations

import subprocess
import sys

from helpers import tiny
from helpers.command import environment
from helpers.hub_server import hub_server

from minitron.models import save_model

LOAD = """
import time
from minitron.errors import InputError
from minitron.models import plain_folder
time.sleep = lambda _: None  # the client's waits between its attempts
for name in ("me/whole", "me/gated", "me/cut"):
    try:
        print(plain_folder(name))
    except InputError as error:
        print(error.problem, error.remedy)
"""


def test_weights_that_the_hub_refuses_or_stops_sending_are_an_error_that_says_so(tmp_path):
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "model")
    with hub_server() as hub:
        hub.files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
        hub.gated, hub.cut = {"me/gated"}, {"me/cut"}
        variables = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD], env=environment() | variables, capture_output=True, text=True, timeout=120
        )
    assert loaded.returncode == 0, loaded.stderr
    whole, gated, cut = loaded.stdout.splitlines()
    assert whole.startswith(str(tmp_path / "cache"))
    assert gated.startswith("me/gated: the hub does not give all of its weights (GatedRepoError: ")
    assert "`hf auth login`" in gated
    assert cut.startswith("me/cut: the weights are not all in the local cache, and the hub cannot be reached")
