"""What trainings of published sizes need of each GPU, in GB, with the settings that `auto` chooses: no GPU is needed.

    python -m benchmarks.gpu_memory

Prints the table of docs/training.md. The figures are those of `minitron.distill.gpu_memory`, which tests compare with the bytes
of real steps, counted on the meta device.
"""

from __future__ import annotations

from minitron.architecture import Architecture
from minitron.distill import DistillConfig
from minitron.distill.fitting import SHARE, fitting
from minitron.distill.gpu_memory import TeacherKept

GPU_BYTES, NODE_GPUS, SEQ_LENGTH = 80_000_000_000, 8, 8192
LLAMA, NEMO = 128_256, 131_072  # tokens of their vocabularies
MODELS = {
    "Llama 3.1 8B": Architecture(32, 4096, 14_336, 32, 8, 128, LLAMA, False),
    "4.5B": Architecture(32, 3072, 9216, 32, 8, 128, LLAMA, False),
    "NeMo 12B": Architecture(40, 5120, 14_336, 32, 8, 128, NEMO, False, "mistral"),
    "8B": Architecture(40, 4096, 11_520, 32, 8, 128, NEMO, False, "mistral"),
    "Llama 70B": Architecture(80, 8192, 28_672, 64, 8, 128, LLAMA, False),
    "35B": Architecture(80, 6144, 18_432, 48, 8, 128, LLAMA, False),
}
STORED: tuple[TeacherKept, ...] = ("head",)
LIVE: tuple[TeacherKept, ...] = ("whole", "sharded")
CASES: list[tuple[str, str, int, tuple[TeacherKept, ...], str]] = [
    ("Llama 3.1 8B", "4.5B", 1, STORED, "adamw-offload"),
    ("Llama 3.1 8B", "4.5B", 1, STORED, "adamw"),
    ("Llama 3.1 8B", "4.5B", 8, LIVE, "adamw"),
    ("NeMo 12B", "8B", 1, STORED, "adamw-offload"),
    ("NeMo 12B", "8B", 8, LIVE, "adamw"),
    ("NeMo 12B", "8B", 32, LIVE, "adamw"),
    ("Llama 70B", "35B", 8, LIVE, "adamw"),
    ("Llama 70B", "35B", 32, LIVE, "adamw"),
]
PARTS = ("weights", "masters", "moments", "gradients", "activations", "logits", "teacher", "communication")
KEPT = {"head": "stored", "whole": "live", "sharded": "live, in parts"}


def main() -> None:
    heads = ["GPUs", "from, to", "teacher is", "settings", *PARTS, "in all", ""]
    print(_row(heads))
    print("|---" * len(heads) + "|")
    for teacher, student, gpus, kept, optimizer in CASES:
        fit = fitting(
            MODELS[student],
            DistillConfig(steps=1, optimizer=optimizer),
            SEQ_LENGTH,
            int(SHARE * GPU_BYTES),
            teacher=MODELS[teacher],
            teacher_kept=kept,
            processes=gpus,
            node_processes=NODE_GPUS,
            gpu_bytes=GPU_BYTES,
        )
        config, parts = fit.config, fit.memory.parts
        settings = f"{config.micro_batch_rows} row{'s' if config.micro_batch_rows > 1 else ''}, "
        settings += f"{config.activation_checkpointing}{', shard' if config.shard else ''}, {optimizer}"
        sizes = [f"{size / 1e9:.1f}" for size in (*(parts.get(name, 0) for name in PARTS), fit.memory.peak)]
        fits = "" if fit.fits else "too much"
        print(_row([str(gpus), f"{teacher}, {student}", KEPT[fit.teacher_kept], settings, *sizes, fits]))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
