"""vLLM as engine: its own server on this machine, in a process of its own.

vLLM pins versions of torch and transformers that an environment with Minitron may not have, so it is called by its command,
which may belong to another environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.completions import Served, model_names
from minitron.device import DTYPES, device
from minitron.errors import InputError, MinitronError
from minitron.models import source_architecture
from minitron.throughput.server import ServerEngine

COMMAND = "vllm"
START_SECONDS = 1_800.0  # of a large model from a slow disk, with its kernels compiled
STOP_SECONDS = 30.0
GPU_SHARE = 0.9  # of a GPU's memory, of all servers together
CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
"""Environment variable with the size of vLLM's KV cache on a CPU. By default that is what --gpu-memory-utilization leaves of
the machine's memory, in use or not; GPUs have no such variable."""
BLOCK_TOKENS = 128  # of vLLM's KV cache on a CPU
USUAL_TOKENS = 4_096  # of a request with its answer; longer ones are accepted, fewer at a time
POLLING_SECONDS = 1.2  # for which vLLM's worker occupies a CPU core after its last request


@contextmanager
def vllm_server(
    source: str, *, dtype: str, longest: int | None = None, concurrent: int = 8, share: float = 1.0
) -> Iterator[ServerEngine]:
    """A vLLM server with the checkpoint folder or hub name `source`, until the context ends.

    dtype: torch's name. longest: tokens of the longest prompt with its answer, by default those that the model accepts.
    concurrent: requests at a time. share: of the GPU's memory, below 1 if other servers run beside it. On a machine without a
    GPU the KV cache is as large as these requests need, unless VLLM_CPU_KVCACHE_SPACE is set, and nothing is compiled. Raises
    InputError if vLLM is not installed, and MinitronError with the end of its output if it does not start.
    """
    folder = Path(source).expanduser()
    source = str(folder) if folder.exists() else source
    command = vllm_command()
    on_cpu = device().type == "cpu"
    cache_gib = str(_cache_gib(source, dtype, longest, concurrent))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        *(command, "serve", source, "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", dtype, "--gpu-memory-utilization", f"{GPU_SHARE * share:.3f}"),
        *(("--max-model-len", str(longest)) if longest else ()),
        *(("--enforce-eager",) if on_cpu else ()),
    ]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={CACHE_GIB: cache_gib, **os.environ, "VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
        )
        try:
            served = Served(f"http://127.0.0.1:{port}/v1", "model")
            _wait(process, served.url, output.fileno())
            yield ServerEngine(served, kind="vllm", polling_seconds=POLLING_SECONDS if on_cpu else 0.0)
        finally:
            _stop(process)


def _cache_gib(source: str, dtype: str, longest: int | None, concurrent: int) -> int:
    """GiB of the KV cache of as many requests, of which one may have `longest` tokens."""
    architecture, accepted = source_architecture(source)
    longest = longest or accepted or USUAL_TOKENS
    blocks = -(-longest // BLOCK_TOKENS) + (concurrent - 1) * -(-min(longest, USUAL_TOKENS) // BLOCK_TOKENS)
    size = architecture.kv_cache_bytes((blocks + 1) * BLOCK_TOKENS, DTYPES[dtype].itemsize)  # vLLM keeps a block empty
    return -(-size // 2**30)


def _wait(process: subprocess.Popen[bytes], url: str, output: int) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MinitronError(f"vllm serve ended with {process.returncode}: {_end(output)}", "see what it says")
        try:
            model_names(url)
        except MinitronError:
            time.sleep(0.2)
        else:
            return
    raise MinitronError(f"vllm serve did not answer within {START_SECONDS:.0f} s: {_end(output)}", "see what it says")


def _end(output: int) -> str:
    """The last lines that the server wrote."""
    size = os.fstat(output).st_size
    return os.pread(output, 1_500, max(0, size - 1_500)).decode(errors="replace").strip() or "(no output)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def vllm_command() -> str:
    """vLLM's command on the PATH. Raises InputError if it is not there."""
    command = shutil.which(COMMAND)
    if command is None:
        raise InputError(
            "vLLM is not installed: no command vllm on the PATH",
            "install it in an environment of its own (pip install vllm) and put that on the PATH, or use --engine transformers",
        )
    return command


def check_servable(source: str) -> None:
    """Raise InputError for a model source that vLLM's command does not take: a single file."""
    if Path(source).suffix == ".gguf":
        raise InputError(f"{source}: vLLM's command does not read single files", "give a checkpoint folder")
