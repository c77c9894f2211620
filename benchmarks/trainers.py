"""The trainers whose steps are measured: ours, and those of TRL and ModelOpt.

All distil the same student from the same teacher on the same rows in the same order by forward KL at temperature 1, with
AdamW and clipped gradients; models compute in bfloat16. They differ in their master weights:

- minitron: weights in bfloat16; master weights, moments and sums of gradients in float32.
- the others: master weights in float32 under bfloat16 autocast; or weights, gradients and moments in bfloat16, without
  master weights.

None of them pads, evaluates or saves. Teachers are in bfloat16; attention is PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.materials import Materials
from benchmarks.measure import on_gpu
from minitron.data import rows_for_step
from minitron.distill import DistillConfig, LiveTeacher, StepReport, distill

RATE, SEED = 1e-5, 0


@dataclass(frozen=True)
class Setup:
    """Settings that all trainers share."""

    steps: int
    batch_rows: int
    micro_batch_rows: int
    recompute: str
    """What the backward pass computes again, as `DistillConfig.activation_checkpointing`."""
    optimizer: str
    compile: bool
    fp8: str = "none"
    """As `DistillConfig.fp8`; only for minitron."""
    cuda_graphs: bool = False
    """Only for minitron."""


Stepped = Callable[[dict[str, Any]], None]
"""Called after every step with what the trainer says of it: its loss, if nothing else."""
Trainer = Callable[[Materials, Setup, Stepped], None]


def _ours(materials: Materials, setup: Setup, stepped: Stepped, *, live: bool) -> None:
    targets = LiveTeacher(materials.teacher()) if live else materials.stored()
    config = DistillConfig(
        setup.steps,
        batch_rows=setup.batch_rows,
        micro_batch_rows=setup.micro_batch_rows,
        peak_lr=RATE,
        min_lr=RATE,
        warmup_steps=0,
        activation_checkpointing=setup.recompute,
        optimizer=setup.optimizer,
        compile=setup.compile,
        fp8=setup.fp8,
        cuda_graphs=setup.cuda_graphs,
        seed=SEED,
    )

    def report(step: StepReport) -> None:
        stepped({"loss": step.loss, "parts": step.seconds})

    distill(materials.student(torch.bfloat16), targets, materials.rows(), config, report=report)


def _trl_gkd(materials: Materials, setup: Setup, stepped: Stepped, *, weights: torch.dtype) -> None:
    """Dense logits. `lmbda` 0: no text is generated."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    GKDTrainer(
        model=materials.student(weights),
        teacher_model=materials.teacher(),
        args=GKDConfig(**_arguments(materials, setup), lmbda=0.0, seq_kd=False, beta=0.0, temperature=1.0),
        train_dataset=_dataset(materials, setup),
        data_collator=_collate,
        processing_class=materials.tokenizer(),
        callbacks=[_callback(stepped)],
    ).train()


def _trl_distillation(materials: Materials, setup: Setup, stepped: Stepped, *, weights: torch.dtype) -> None:
    """Chunked divergence. This trainer usually generates its text; here it gets the rows instead, so that a step includes no
    generation, and the first token of a row is the prompt."""
    from trl import DistillationConfig, DistillationTrainer

    class OnRows(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
            ids = torch.tensor([row["input_ids"] for row in inputs], device=self.accelerator.device)
            prompt, completion = ids[:, :1], ids[:, 1:]
            return {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": completion,
                "completion_mask": torch.ones_like(completion),
                "num_items_in_batch": torch.tensor(completion.numel(), device=ids.device),
            }

    tokenizer = materials.tokenizer()
    tokenizer.padding_side = "left"
    OnRows(
        model=materials.student(weights),
        teacher_model=materials.teacher(),
        args=DistillationConfig(
            **_arguments(materials, setup), beta=0.0, temperature=1.0, shuffle_dataset=False, pad_to_multiple_of=None
        ),
        train_dataset=_dataset(materials, setup),
        processing_class=tokenizer,
        callbacks=[_callback(stepped)],
    ).train()


def _modelopt(materials: Materials, setup: Setup, stepped: Stepped, *, weights: torch.dtype) -> None:
    """Dense logits, converted to float32."""
    from modelopt.torch.distill.plugins.huggingface import DistillArgsWithTeacherModel, KDTrainer
    from transformers import TrainingArguments

    KDTrainer(
        model=materials.student(weights),
        args=TrainingArguments(**_arguments(materials, setup), remove_unused_columns=False),
        train_dataset=_dataset(materials, setup),
        data_collator=_collate,
        distill_args=DistillArgsWithTeacherModel(distill=True, teacher_model=materials.teacher()),
        callbacks=[_callback(stepped)],
    ).train()


def _arguments(materials: Materials, setup: Setup) -> dict[str, Any]:
    return {
        "output_dir": str(materials.folder / "trainer"),
        "max_steps": setup.steps,
        "per_device_train_batch_size": setup.micro_batch_rows,
        "gradient_accumulation_steps": setup.batch_rows // setup.micro_batch_rows,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "gradient_checkpointing": setup.recompute != "none",
        "torch_compile": setup.compile,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_first_step": True,
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not on_gpu(),
        "seed": SEED,
    }


def _dataset(materials: Materials, setup: Setup) -> Any:
    from datasets import Dataset

    rows = materials.rows()
    numbers = [n for step in range(setup.steps) for n in rows_for_step(len(rows), setup.batch_rows, step, SEED)]
    return Dataset.from_dict({"input_ids": rows.take(numbers).tolist(), "prompt": [""] * len(numbers)})


def _collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _callback(stepped: Stepped) -> Any:
    """Counts steps of transformers' trainer; the loss is that in the log of the first step."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        loss: float | None = None

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.loss = logs.get("loss", self.loss)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stepped({"loss": self.loss})

    return Steps()


@dataclass(frozen=True)
class Contender:
    package: str
    """What has to be installed."""
    modules: tuple[str, ...]
    """What it imports, before its memory counts."""
    run: Trainer


OURS, OURS_LIVE = "minitron, stored teacher", "minitron, live teacher"
_COMMON = ("transformers.trainer", "transformers.models.llama.modeling_llama", "datasets")
_PEERS: dict[str, tuple[str, str, Any]] = {
    "TRL GKD": ("trl", "trl.experimental.gkd.gkd_trainer", _trl_gkd),
    "TRL distillation": ("trl", "trl.trainer.distillation_trainer", _trl_distillation),
    "ModelOpt": ("nvidia-modelopt", "modelopt.torch.distill.plugins.huggingface", _modelopt),
}
_WEIGHTS = {"float32 masters": torch.float32, "bfloat16 alone": torch.bfloat16}

CONTENDERS: dict[str, Contender] = {
    OURS: Contender("minitron", _COMMON, partial(_ours, live=False)),
    OURS_LIVE: Contender("minitron", _COMMON, partial(_ours, live=True)),
} | {
    f"{name}, {kept}": Contender(package, (*_COMMON, module), partial(train, weights=dtype))
    for kept, dtype in _WEIGHTS.items()
    for name, (package, module, train) in _PEERS.items()
}


def installed(say: Callable[[str], Any] = print) -> list[str]:
    """The trainers that can run here; prints the versions of their packages and which are missing."""
    modules = {package: module.split(".")[0] for package, module, _ in _PEERS.values()}
    missing = {package for package, module in modules.items() if find_spec(module) is None}
    for package in modules:
        say(f"{package}: {'left out, not installed' if package in missing else version(package)}")
    return [name for name, contender in CONTENDERS.items() if contender.package not in missing]
