"""The recipe: every setting of a run, typed; unknown keys are refused. docs/recipes.md describes each key."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from minitron_platform.recipes.numbers import (
    AxisValue,
    Cpus,
    Gpus,
    LearningRate,
    Limit,
    LowestRate,
    ModelSize,
    Nats,
    Natural,
    NormLimit,
    Positive,
    PositiveWeight,
    Price,
    Seed,
    SeqLength,
    Share,
    Temperature,
    Weight,
    WeightDecay,
    is_finite,
)
from minitron_platform.recipes.suites import expanded
from minitron_platform.tracking.aliases import check_alias

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
LONGEST_AXIS = 10_000  # values of a range; more than that is a mistake


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Grown(_Section):
    """A section with keys that earlier versions did not have. It is written without those that have their default, so that runs
    and results of earlier versions keep their names."""

    added: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_added(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        defaults = type(self).model_fields
        return {k: v for k, v in values.items() if k not in self.added or getattr(self, k) != defaults[k].default}


class Teacher(_Section):
    """The model to distil from. `model` is a folder, a .gguf file, `package:NAME/FILE` inside a Python package, or a hub
    name; `dtype` is the dtype that all models of the run compute in."""

    model: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


TextKind = Literal["python-docs", "text", "jsonl", "csv", "parquet", "hub"]


class _Text(_Section):
    """Where text is and which part of it is used; see `minitron.data.TextSource`."""

    path: str = ""
    key: str = "text"
    template: str | None = None
    messages: str | None = None
    separator: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    on_missing: Literal["error", "skip"] = "error"
    min_characters: Natural = 0
    max_characters: Positive | None = None


class HeldoutText(_Text):
    """The text of the held-out rows."""

    kind: TextKind


class WeightedText(_Text):
    """One of several texts; `weight` is its share of the tokens in relation to the weights of the others."""

    kind: TextKind
    weight: PositiveWeight = 1.0


class Data(_Text):
    """The text, packed once into rows of `seq_length` tokens: one text, which the keys from `kind` on describe, or several
    `sources`. `path` may be any fsspec path.

    `add_bos`: whether a beginning-of-sequence token precedes every document, and starts every row and benchmark request;
    `auto` follows the teacher's tokenizer. `separate_documents`: whether attention is restricted to the tokens of the same
    document, in all models and stages; `auto`: if models run on GPUs and no text is chats.
    """

    kind: TextKind | None = None
    sources: list[WeightedText] = []
    heldout: HeldoutText | None = None
    drop_duplicates: bool = False
    seq_length: SeqLength
    train_rows: Positive
    heldout_rows: Positive
    heldout_fraction: Share | None = None
    add_bos: bool | Literal["auto"] = "auto"
    separate_documents: bool | Literal["auto"] = "auto"

    @property
    def bos(self) -> bool | None:
        """`add_bos` as the method's functions expect it: None for `auto`."""
        return None if self.add_bos == "auto" else self.add_bos


class Task(_Grown):
    """An lm-eval task. `data` is a local folder or `package:NAME/FOLDER`; by default the task's own hub dataset is used."""

    added = ("chat_template",)

    name: str
    data: str | None = None
    num_fewshot: Natural = 0
    limit: Positive | Share | None = None
    chat_template: bool = False


class Calibrate(_Section):
    """Importance scores, which decide what pruning removes.

    `layers`: what layers are ranked by, the loss or the error of the logits without them, the accuracy lost on `task`, or
    the cosine similarity between their input and output. `depth`: remove the least important contiguous block of layers,
    the least important single layers (`scattered`), or one layer at a time with new scores after each (`iterative`).
    `steps`: number of pruning steps; before each, every candidate is scored again. `merge_heads`: sign with which removed
    query heads are added to kept ones; 0 removes them.
    """

    rows: Positive
    batch_aggregation: Literal["l2", "mean", "var"] = "l2"
    sequence_aggregation: Literal["l2", "mean", "var"] = "mean"
    neurons: Literal["post", "pre"] = "post"
    layers: Literal["loss", "logit_error", "task", "cosine"] = "loss"
    task: Task | None = None
    depth: Literal["contiguous", "scattered", "iterative"] = "contiguous"
    layer_rows: Positive = 4
    steps: Positive = 1
    merge_heads: Literal[-1, 0, 1] = 0


class Losses(_Section):
    """The distillation losses.

    `hidden: auto` adds losses on hidden states and embeddings if more than a third of the layers are removed, as in the
    papers; a list of layer maps such as ["last-2:last-2"] (teacher:student) adds them always, [] never. The search trains
    its candidates on the loss on logits alone.
    """

    logits: Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "none"] = "forward_kl"
    temperature: Temperature = 1.0
    cross_entropy: Weight = 0.0
    top_k: Natural = 0
    hidden: list[str] | Literal["auto"] = "auto"
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    embedding: bool = False
    attention: list[str] = []
    mlp_input: list[str] = []
    alpha: PositiveWeight | None = None


class Targets(_Section):
    """How distillations get the teacher's outputs.

    `stored`: final hidden states of every row, computed once. `online`: the full distillation runs the teacher on every
    batch; only the search reads stored outputs. `top_k`: for training rows, store the logits of the top-k tokens instead of
    hidden states; 0 stores hidden states. `teacher`: how a distillation that runs the teacher loads it, whole in every
    worker (`replicated`), its layers split over the workers (`sharded`), or split only if it does not fit on the GPU beside
    the student (`auto`).
    """

    mode: Literal["stored", "online"] = "stored"
    top_k: Natural = 0
    teacher: Literal["auto", "replicated", "sharded"] = "auto"


class Training(_Section):
    """Hyperparameters of a training: `steps` of `batch_rows` rows in all workers together.

    The learning rate warms up linearly, then follows a cosine or `wsd`, which decays in the last share `decay_share` of the
    steps. `evaluate_every`: steps between measurements on the held-out rows; `evaluate_tasks_every`: between runs of the
    tasks of `evaluate`; `checkpoint_every`: between checkpoints; 0 for never. `shard`: split weights and optimizer state
    over the workers. `auto` chooses for GPUs (`minitron.distill.fitting`): `compile` for long trainings, `cuda_graphs` for
    small students, the others by memory.
    """

    steps: Positive
    batch_rows: Positive
    micro_batch_rows: Positive | Literal["auto"] = "auto"
    peak_lr: LearningRate
    min_lr: LowestRate = Field(default_factory=lambda given: given["peak_lr"] / 10)
    warmup_steps: Natural = Field(default_factory=lambda given: given["steps"] // 10)
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    weight_decay: WeightDecay = 0.0
    clip_norm: NormLimit = 1.0
    seed: Seed = 0
    max_skipped_steps: Natural = 0
    checkpoint_every: Natural = 0
    evaluate_every: Natural = 0
    evaluate_tasks_every: Natural = 0
    shard: bool | Literal["auto"] = "auto"
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    optimizer: Literal["adamw", "adamw-offload", "adamw-8bit"] = "adamw"
    compile: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | Literal["auto"] = "auto"
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    deterministic: bool = False


class Correct(_Section):
    """Teacher correction: fine-tuning the teacher on the text with cross-entropy before distilling from it (arXiv
    2408.11796).

    `measured` continues after `probe_steps` (default: a tenth of the steps, but at least twice the warm-up) only if the
    held-out loss has fallen by `min_gain` nats per token, and keeps the corrected teacher only if it has fallen by as much
    in the end; `always` keeps it in any case. `training` is by default that of `distill` at a fifth of its learning rates,
    with 120 warm-up steps or a quarter of the steps, whichever is less.
    """

    when: Literal["measured", "always"] = "measured"
    method: Literal["full", "norms", "lora"] = "full"
    lora_rank: Positive = 16
    min_gain: Nats = 0.01
    probe_steps: Positive | None = None
    training: Training | None = None


class Forward(_Section):
    """Scoring of every candidate before training, by its held-out KL to the teacher; only the best `keep` are distilled."""

    keep: Positive


class Sampler(_Section):
    """Sampling of a space that is too large to enumerate: `candidates` architectures are scored before training, the recipe's
    points and those that Optuna proposes from the scores so far. The same `seed` gives the same candidates."""

    candidates: Positive
    seed: Seed = 0


class Benchmarked(_Section):
    """lm-eval tasks for the best `keep` candidates after their short distillation."""

    keep: Positive = 3
    tasks: Annotated[list[Task], Field(min_length=1)]


class Halving(_Section):
    """Successive halving: at every rung from the share `grace` of the short run on, the best share `keep` of the candidates
    continues. With `grace: stable`, at every rung whose ranking agrees with that of the measurement before it (Kendall's
    tau of at least 0.9)."""

    keep: Share = 0.5
    grace: Annotated[float, Field(ge=0, lt=1)] | Literal["stable"] = 0.75


class Search(_Section):
    """The search: a short distillation of every candidate, which are ranked by their held-out KL to the teacher.

    It is measured on the first `heldout_rows` held-out rows (default: all), after the shares `rungs` of the short run and
    at its end. `forward` distils only the candidates that are best before training, `sampler` samples spaces that are too
    large to enumerate, and `halving` stops the worse candidates at rungs; by default all are distilled to the end.
    `evaluate` runs benchmarks of the best candidates, for information only.
    """

    heldout_rows: Positive | None = None
    rungs: Annotated[list[Share], Field(max_length=100)] = [0.5, 0.75]
    sampler: Sampler | None = None
    forward: Forward | None = None
    halving: Halving | None = None
    evaluate: Benchmarked | None = None
    training: Training


def _values(given: Any) -> Any:
    """The values of a range {from, to, step} including both ends; anything else unchanged."""
    if not isinstance(given, dict):
        return given
    if set(given) != {"from", "to", "step"}:
        raise ValueError("a range needs the keys from, to and step, and no others")
    first, last, step = given["from"], given["to"], given["step"]
    if not all(is_finite(value) for value in (first, last, step)):
        raise ValueError("from, to and step must be finite numbers")
    if step <= 0 or last < first or (last - first) / step >= LONGEST_AXIS:
        raise ValueError(f"a range must go up from `from` to `to`, in at most {LONGEST_AXIS:,} steps")
    count = int((last - first) / step + 1e-9) + 1
    return [round(first + index * step, 9) for index in range(count)]


Values = Annotated[list[AxisValue], Field(max_length=LONGEST_AXIS), BeforeValidator(_values)]


class Limits(_Section):
    """Upper limits for a candidate that serves `batch` sequences of `context` tokens (default: data.seq_length) in 16 bits:
    FLOPs of a forward pass per token, bytes of the KV cache, bytes of weights and KV cache, and milliseconds to the first
    token of the batch and to each further one, which are measured on the hardware that trials run on."""

    context: Positive | None = None
    batch: Positive = 1
    flops_per_token: Limit | None = None
    kv_cache_bytes: Limit | None = None
    memory_bytes: Limit | None = None
    latency_ms: Limit | None = None
    token_latency_ms: Limit | None = None

    @property
    def times_candidates(self) -> bool:
        """Whether candidates are timed for a limit."""
        return self.latency_ms is not None or self.token_latency_ms is not None


class Member(_Section):
    """One model of the family.

    `model`: the name it is registered under. `parameters`: its size, within the relative `tolerance`. `space`: values of
    each axis to search, as a list or a range {from, to, step}. `points`: shapes that are always among the candidates and
    always distilled. `start`: the model it is pruned from, the teacher or the `previous` one of the family; it is distilled
    from the teacher in either case. `distill`: replaces the recipe's `distill` for this model.
    """

    model: Annotated[str, Field(pattern=NAME)]
    start: Literal["teacher", "previous"] = "teacher"
    parameters: ModelSize
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    space: dict[str, Values]
    points: list[dict[str, Positive]] = []
    limits: Limits | None = None
    distill: Training | None = None


class Evaluate(_Grown):
    """The final evaluation: lm-eval tasks, and the number of requests in a batch. `allow_code`: allow tasks that run programs
    which the model writes, in a sandbox, tasks whose metric is Python code from the hub, and tasks of `task_folder` with
    Python functions. `prompts`: are completed by every model, to be read. `throughput`: measure the speed of the models.
    `training_limit`: number of documents of each task during a training.

    `suite`, `data` and `limit` are turned into `tasks` when the recipe is read (`minitron_platform.recipes.suites`).
    """

    added = ("suite", "data", "limit", "task_folder", "prompts", "throughput", "training_limit")

    suite: str | None = None
    tasks: list[Task] = []
    data: str | None = None
    limit: Positive | Share | None = None
    task_folder: str | None = None
    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=100)] = []
    training_limit: Positive | None = None
    batch_rows: Positive | Literal["auto"] = "auto"
    throughput: bool = False
    allow_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        return expanded(values)


class Gates(_Grown):
    """What a version must fulfil before `minitron promote` points an alias at it, besides the gates that always apply.

    KL to the teacher, and by how much its loss may be higher than the teacher's, in nats per token; by how much its
    benchmarks may be worse than the teacher's, in their own scale (0.05 is 5 points of accuracy); by how much KL and loss may
    be worse than those of the version that is replaced, and how much those of an aligned or quantised variant may be worse than
    those of the version that it was made from; size, bytes of the weights, milliseconds to the token after a prompt of
    `latency_tokens`, on the machine that promotes; whether it must have a model card with a licence.
    """

    added = ("variant_tolerance",)

    max_kl: Nats | None = None
    max_loss_increase: Nats | None = None
    max_task_loss: Weight | None = None
    tolerance: Nats = 0.01
    variant_tolerance: Nats = 0.1
    max_parameters: ModelSize | None = None
    max_memory_bytes: Limit | None = None
    max_latency_ms: Limit | None = None
    latency_tokens: Positive = 128
    card: bool = False


class Register(_Grown):
    """Registration: the alias that a new version gets in the MLflow registry, and the gates of its promotion."""

    added = ("gates",)

    alias: Annotated[str, AfterValidator(check_alias)] = "candidate"
    gates: Gates = Gates()


class WorkerRange(_Section):
    """A number of workers that follows the cluster: as many as it has room for, at least `min` and at most `max`."""

    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _check_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Resources(_Section):
    """CPUs and GPUs of each worker of a trial and of each worker of the full distillation, which `workers` of them do
    together. `auto` depends on the available GPUs, see `minitron_platform.recipes.resources`. `price_per_gpu_hour` is only
    shown, by `plan` and in the report. `wait_timeout` is in seconds."""

    workers_per_trial: Positive | WorkerRange = 1
    cpus_per_trial: Cpus = 1
    gpus_per_trial: Gpus | Literal["auto"] = "auto"
    workers: Positive | WorkerRange | Literal["auto"] = "auto"
    cpus_per_worker: Cpus = 1
    gpus_per_worker: Gpus | Literal["auto"] = "auto"
    gpu_memory_bytes: Limit | Literal["auto"] = "auto"
    node_memory_bytes: Limit | Literal["auto"] = "auto"
    max_failures: Natural = 3
    wait_timeout: Positive | None = None
    price_per_gpu_hour: Price | None = None


class Recipe(_Section):
    """All settings of one run."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str = ""
    experiment: Annotated[str, Field(pattern=NAME, default_factory=lambda given: given["name"])]
    teacher: Teacher
    data: Data
    correct: Correct | None = None
    calibrate: Calibrate
    family: Annotated[list[Member], Field(min_length=1)]
    losses: Losses = Losses()
    targets: Targets = Targets()
    search: Search
    distill: Training
    evaluate: Evaluate = Evaluate()
    register_as: Register = Field(alias="register", default=Register())
    tracking: Literal["required", "best-effort"] | None = None
    resources: Resources = Resources()

    def distillation(self, member: Member) -> Training:
        """Hyperparameters of the full distillation of `member`."""
        return member.distill or self.distill

    @model_validator(mode="after")
    def _check_family(self) -> Recipe:
        names = [member.model for member in self.family]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate:
            raise ValueError(f"two models are called {duplicate!r}")
        if self.family[0].start == "previous":
            raise ValueError(f"{names[0]!r} is the first model, so it cannot start from the previous one")
        return self

    def correction(self) -> Training | None:
        """Hyperparameters of the teacher's correction; None without a correction."""
        if self.correct is None:
            return None
        if self.correct.training:
            return self.correct.training
        changes = {
            "peak_lr": self.distill.peak_lr / 5,
            "min_lr": self.distill.min_lr / 5,
            "warmup_steps": min(120, self.distill.steps // 4),
            "evaluate_tasks_every": 0,
        }
        return self.distill.model_copy(update=changes)

    @property
    def correction_key(self) -> str:
        """The recipe key whose settings the teacher's correction has, for messages."""
        return "correct.training" if self.correct and self.correct.training else "distill"

    def key(self, member: Member) -> str:
        """The recipe key of `member`, for messages."""
        return f"family.{self.family.index(member)}"

    def distillation_key(self, member: Member) -> str:
        """The recipe key of the full distillation of `member`, for messages."""
        return f"{self.key(member)}.distill" if member.distill else "distill"

    def origin(self, member: Member) -> Member | None:
        """The model of the family that `member` is pruned from; None if it is pruned from the teacher."""
        return self.family[self.family.index(member) - 1] if member.start == "previous" else None
