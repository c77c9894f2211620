"""Teacher: convert the model to a plain safetensors checkpoint and identify it by its content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.checkpoints.identity import checkpoint_identity, generation_settings
from minitron.checkpoints.reading import read_config
from minitron.checkpoints.tokenizer_files import check_tokenizer_fits
from minitron.data import DocumentTokens, document_tokens
from minitron.device import DTYPES
from minitron.models import load_source, load_tokenizer, save_model
from minitron_platform.estimates.memory import teacher_memory
from minitron_platform.estimates.node_memory import conversion_work
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import teacher_parts
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.context import Context
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.workers.worker import Worker


class TeacherOutput(StageOutput):
    folder: ArtifactPath
    """Checkpoint folder."""
    id: str
    """Content address of everything that decides the teacher's outputs: weights, config and tokenizer."""
    sha256: dict[str, str]
    """SHA-256 by weight file."""
    dtype: str
    """Compute dtype of all models of the run, by torch's name."""
    architecture: Architecture
    parameters: int
    document: DocumentTokens
    """Special tokens that its tokenizer puts around a document."""
    chat_template: str = ""
    """Fingerprint of its tokenizer's chat template, which is not part of `id`; empty without one, and in earlier records."""
    generation: str = ""
    """Fingerprint of what decides the text that it writes, which is not part of `id`; empty in earlier records."""


class Teacher(Stage[TeacherOutput]):
    name = "teacher"
    version = 2  # 2: `id` is of the content, not of the files; missing tensors are refused; `document` was added
    per_model = False
    output_type = TeacherOutput

    def recipe_key(self, recipe: Recipe, member: Member | None) -> str:
        """Most errors are about the model itself."""
        return "teacher.model"

    def inputs(self, state: RunState) -> dict[str, Any]:
        return {
            "source": state.teacher_source,
            "dtype": str(state.compute_dtype).removeprefix("torch."),
        }

    def estimate(self, outlook: Outlook, member: Member | None) -> Estimate:
        parameters = outlook.teacher.num_parameters
        return Estimate(
            f"{parameters / 1e6:,.1f}M parameters",
            bytes=parameters * outlook.value_bytes,
            start_up_seconds=20,
            memory=teacher_memory(outlook.teacher, outlook.value_bytes),
            node=conversion_work(outlook.recipe, outlook.teacher, outlook.value_bytes, outlook.resources),
            parts=teacher_parts(outlook),
        )

    def run(self, context: Context, folder: str) -> TeacherOutput:
        teacher = context.recipe.teacher
        conversion = _Conversion(
            model=teacher.model,
            revision=context.teacher_source.get("revision", teacher.revision),
            dtype=str(context.compute_dtype).removeprefix("torch."),
            target=storage.join(folder, "model"),
        )
        return context.workers.compute(_convert, conversion, everywhere=False)


@dataclass(frozen=True)
class _Conversion:
    model: str
    """A name on the hub, a folder or a file."""
    revision: str | None
    """Of a name on the hub, a commit."""
    dtype: str
    target: str
    """Folder that the checkpoint is committed to."""


def _convert(task: _Conversion, worker: Worker) -> TeacherOutput:
    """Convert the model unless that is done, and identify it."""
    if not storage.is_committed(task.target):
        worker.progress.status(f"reading {task.model}")
        model, tokenizer = load_source(task.model, task.revision, DTYPES[task.dtype])
        check_tokenizer_fits(tokenizer, Architecture.from_config(model.config).vocab_size, task.model)
        worker.progress.status("writing it as safetensors")
        with storage.committed_folder(task.target, before_commit=worker.before_commit) as local_folder:
            save_model(model, tokenizer, local_folder)
    from transformers import GenerationConfig

    worker.progress.status("hashing its weights")
    local = storage.fetch(task.target)
    architecture = Architecture.from_config(read_config(str(local), str(local), local_files_only=True))
    tokenizer = load_tokenizer(local)
    return TeacherOutput(
        folder=task.target,
        id=checkpoint_identity(local, tokenizer),
        sha256=weight_hashes(task.target),
        dtype=task.dtype,
        architecture=architecture,
        parameters=architecture.num_parameters,
        document=document_tokens(tokenizer),
        chat_template=storage.fingerprint(tokenizer.chat_template) if tokenizer.chat_template else "",
        generation=storage.fingerprint(generation_settings(GenerationConfig.from_pretrained(local), tokenizer)),
        summary=f"{architecture.num_parameters / 1e6:.1f}M parameters · {architecture}",
    )


def chat_template_input(state: RunState, used: bool) -> dict[str, str]:
    """The teacher's chat template among the inputs of a stage, if the stage uses one."""
    template = state.output(Teacher).chat_template
    return {"chat_template": template} if used and template else {}


def generation_input(state: RunState, used: bool) -> dict[str, str]:
    """The teacher's generation settings, which its students have too, among the inputs of a stage whose models write text."""
    settings = state.output(Teacher).generation
    return {"generation": settings} if used and settings else {}


def weight_hashes(checkpoint: str) -> dict[str, str]:
    """SHA-256 of each weight file of a committed checkpoint."""
    files = storage.manifest(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
