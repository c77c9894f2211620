"""The memory needed to prune a checkpoint of the shape of Llama-3.1-8B (16 GB in bfloat16) to 3072 / 9216.

    python benchmarks/prune_memory.py --folder /tmp/prune-memory [--layers 4] [--keep]

Writes random weights and random scores, prunes them in a separate process, and prints its time and its peak memory,
separately for anonymous pages (needed) and file-backed ones (mapped weights, which the system may drop).
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from minitron import Architecture, ImportanceScores, storage
from minitron.checkpoints.files import ShardWriter
from minitron.pruning.streaming import prune_checkpoint

LLAMA = Architecture(32, 4096, 14336, 32, 8, 128, 128_256, False)
SOURCE_SHARD, GIB = 4 * 2**30, 2**30
SAMPLE_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for the checkpoints")
    parser.add_argument("--layers", type=int, default=LLAMA.num_layers, help="layers, for a quick run (default 32)")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = replace(LLAMA, num_layers=options.layers)
    target = replace(base, hidden_size=3072, intermediate_size=9216)
    if options.child:
        scores = ImportanceScores.load(options.folder / "scores.safetensors")
        prune_checkpoint(options.folder / "model", options.folder / "pruned", target, scores)
        return
    needed = 2 * (base.num_parameters + target.num_parameters) * 1.05
    options.folder.mkdir(parents=True)
    try:
        if shutil.disk_usage(options.folder).free < needed:
            sys.exit(f"{options.folder}: {needed / 1e9:.0f} GB are needed")
        _write(base, options.folder)
        _measure(options, base, target)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


def _write(base: Architecture, folder: Path) -> None:
    from transformers import LlamaConfig

    source = folder / "model"
    source.mkdir()
    base.to_config(LlamaConfig(vocab_size=base.vocab_size, dtype="bfloat16")).save_pretrained(source)
    noise = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    writer = ShardWriter(source, SOURCE_SHARD)
    named = [(p.name, p.axes) for p in base.outer_parameters]
    named += [
        (f"{base.table.layers}.{n}.{p.name}", p.axes) for n in range(base.num_layers) for p in base.layer_parameters
    ]
    for name, axes in named:
        shape = [base.axis_size(axis) for axis in axes]
        count = math.prod(shape)
        writer.add(name, noise.repeat(-(-count // len(noise)))[:count].view(shape))
    writer.close()
    draw = torch.Generator().manual_seed(1)
    ImportanceScores(
        heads=torch.rand(base.num_layers, base.num_heads, generator=draw),
        neurons=torch.rand(base.num_layers, base.intermediate_size, generator=draw),
        channels=torch.rand(base.hidden_size, generator=draw),
        similarity=torch.eye(base.num_layers + 1),
    ).save(folder / "scores.safetensors")


def _measure(options: argparse.Namespace, base: Architecture, target: Architecture) -> None:
    started = time.monotonic()
    command = [sys.executable, __file__, "--child", "--folder", str(options.folder), "--layers", str(options.layers)]
    child = subprocess.Popen(command)
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except FileNotFoundError:
            break
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(tuple(peaks))}
        peaks = {name: max(peak, int(sizes.get(name, 0)) * 1024) for name, peak in peaks.items()}
        time.sleep(SAMPLE_SECONDS)
    if child.wait():
        sys.exit("pruning failed")
    wall = time.monotonic() - started
    weights = [p for p in (options.folder / "pruned").iterdir() if p.suffix == ".safetensors"]
    files = storage.manifest(str(options.folder / "pruned"))["files"]
    print(f"model              {base} · {base.num_parameters:,} parameters · {2 * base.num_parameters / 1e9:.1f} GB")
    print(f"pruned             {target} · {target.num_parameters:,} parameters")
    print(f"written            {sum(files[p.name]['bytes'] for p in weights) / 1e9:.1f} GB in {len(weights)} shards")
    print(f"wall time          {wall:.0f} s, with hashing")
    print(f"peak resident      {peaks['VmHWM'] / GIB:.2f} GiB")
    print(f"  anonymous        {peaks['RssAnon'] / GIB:.2f} GiB (highest sample)")
    print(f"  file-backed      {peaks['RssFile'] / GIB:.2f} GiB (highest sample)")


if __name__ == "__main__":
    main()
