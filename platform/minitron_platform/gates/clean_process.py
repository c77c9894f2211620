"""A checkpoint in a process that knows only transformers: no code of Minitron, no network, no settings of the user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("load_model.py")
KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SYSTEMROOT")  # of the environment
LONGEST = 3600.0  # seconds


@dataclass(frozen=True)
class Loaded:
    """What a clean process has seen of a checkpoint."""

    problem: str | None
    """Why it cannot be loaded; then the figures are None."""
    parameters: int | None = None
    bytes: int | None = None
    """Bytes of weights and buffers, in the dtype that they are stored in."""
    milliseconds: float | None = None
    """To the next token after a prompt, median; None if it was not timed."""
    device: str = ""
    """Where it was timed."""


def load_in_clean_process(folder: Path, *, prompt_tokens: int = 16, repeats: int = 0) -> Loaded:
    """Load a checkpoint and its tokenizer, and compute the logits of a prompt of `prompt_tokens` tokens, which must be finite.

    repeats: how often that is timed, after once for warming up.
    """
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    with tempfile.TemporaryDirectory() as home:
        environment |= {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-I", str(PROGRAM), str(folder.resolve()), str(prompt_tokens), str(repeats)]
        try:
            done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return Loaded(f"not loaded within {LONGEST / 60:.0f} minutes")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Loaded(lines[-1][:300])
    values = json.loads(done.stdout.strip().splitlines()[-1])
    return Loaded(None, **values)
