"""The recipe: one YAML file that says everything about a run, typed and strict about unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from minitron_platform.tracking.aliases import check_alias

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Positive = Annotated[int, Field(ge=1)]
Limit = Annotated[float, Field(gt=0)]
LONGEST_AXIS = 10_000  # values; a range with more is a slip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Teacher(_Section):
    """The model to distil from: a folder, a .gguf file, `package:NAME/FILE` inside a Python package, or a hub name."""

    model: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class Data(_Section):
    """Text, packed once into rows. `path` may be any fsspec path. `add_bos` says whether a beginning-of-sequence token stands
    before every document, and at the start of every row and benchmark request; `auto` does as the teacher's tokenizer."""

    kind: Literal["python-docs", "text", "jsonl", "parquet", "hub"]
    path: str = ""
    key: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    seq_length: Annotated[int, Field(ge=8)]
    train_rows: Positive
    heldout_rows: Positive
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    add_bos: bool | Literal["auto"] = "auto"

    @property
    def bos(self) -> bool | None:
        """`add_bos` as the library takes it."""
        return None if self.add_bos == "auto" else self.add_bos


class Task(_Section):
    """An lm-eval task. `data` is a local folder or `package:NAME/FOLDER`; without it the task's own hub dataset is used."""

    name: str
    data: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    limit: Positive | None = None


class Calibrate(_Section):
    """Importance scores. `layers` says how layers are ranked: by the loss or the logits' error without them, by the accuracy
    lost on `task`, or by the cosine of the residual stream alone. `depth`: the least important contiguous block goes, the
    least important single layers (`scattered`), or one after the other, measured anew each time (`iterative`). `steps`: prune
    in so many steps, scoring every candidate anew before each; `merge_heads` adds removed query heads to those that stay."""

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
    """What distillation minimises. `hidden: auto` adds hidden-state and embedding losses where more than a third of the
    layers go, as the papers do; a list such as ["last-2:last-2"] (teacher:student) adds them always, [] never. The search
    compares its candidates on the part of it that is about logits."""

    logits: Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "none"] = "forward_kl"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    cross_entropy: Annotated[float, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    hidden: list[str] | Literal["auto"] = "auto"
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    embedding: bool = False
    attention: list[str] = []
    mlp_input: list[str] = []
    alpha: Annotated[float, Field(gt=0)] | None = None


class Targets(_Section):
    """What distillations learn of the teacher. `stored`: its hidden states of every row, computed once; `online`: the full
    distillation runs it on every batch, and only the rows of the search are stored. With `top_k` only so many likeliest
    tokens of the training rows are. `teacher` says how it is run in the distillation: whole in every worker (`replicated`),
    its layers split over them (`sharded`), or split where the whole does not fit on the GPU (`auto`)."""

    mode: Literal["stored", "online"] = "stored"
    top_k: Annotated[int, Field(ge=0)] = 0
    teacher: Literal["auto", "replicated", "sharded"] = "auto"


class Training(_Section):
    """A training: steps of `batch_rows` rows, warm-up, then cosine or `wsd`, which decays in the last `decay_share`.
    Every `evaluate_every` steps the held-out rows are measured, every `evaluate_tasks_every` the tasks of `evaluate`.
    `shard` splits weights and optimizer over the workers."""

    steps: Positive
    batch_rows: Positive
    micro_batch_rows: Positive = 4
    peak_lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    evaluate_tasks_every: Annotated[int, Field(ge=0)] = 0
    shard: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False


class Correct(_Section):
    """Teacher correction: plain cross-entropy on the text before distilling from the teacher (arXiv 2408.11796). `measured`
    looks at the held-out loss after `probe_steps` (default: a tenth of them, and twice the warm-up at least), goes on only if
    it fell by `min_gain` nats per token, and takes the corrected teacher only if the whole training gained as much; `always`
    takes it as it comes out. Without a `training` it is that of `distill`, at a fifth of its rates and with 120 warm-up
    steps, or a quarter of the steps where they are few."""

    when: Literal["measured", "always"] = "measured"
    method: Literal["full", "norms", "lora"] = "full"
    lora_rank: Positive = 16
    min_gain: Annotated[float, Field(ge=0)] = 0.01
    probe_steps: Positive | None = None
    training: Training | None = None


class Forward(_Section):
    """A first look at every candidate: exact held-out KL without any training. The best `keep` by it are distilled."""

    keep: Positive


class Sampler(_Section):
    """For spaces too large to enumerate: so many of the architectures are scored before any training, the points and what
    Optuna's sampler proposes from the scores so far. The same `seed` gives the same candidates."""

    candidates: Positive
    seed: Annotated[int, Field(ge=0)] = 0


class Benchmarked(_Section):
    """lm-eval tasks for the best `keep` candidates after their short distillation."""

    keep: Positive = 3
    tasks: Annotated[list[Task], Field(min_length=1)]


class Halving(_Section):
    """At every rung from the share `grace` of the short run on, the best share `keep` of the candidates goes on; with
    `stable`, at every rung that finds them in the order of the measurement before it (Kendall's tau of at least 0.9)."""

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    grace: Annotated[float, Field(ge=0, lt=1)] | Literal["stable"] = 0.75


class Search(_Section):
    """The short distillation that every candidate gets; they are ranked on the first `heldout_rows` held-out rows (default:
    all), and measured on them at `rungs` too, shares of the short run. With `forward` only the best before training are
    distilled, of a `sampler`'s proposals where the space is too large to enumerate; with `halving` the worse are stopped at
    rungs. By default all are distilled to the end. `evaluate` adds benchmarks of the best, which do not decide."""

    heldout_rows: Positive | None = None
    rungs: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5, 0.75]
    sampler: Sampler | None = None
    forward: Forward | None = None
    halving: Halving | None = None
    evaluate: Benchmarked | None = None
    training: Training


def _values(given: Any) -> Any:
    """{from, to, step}, both ends included, as the list of its values; anything else as it is."""
    if not isinstance(given, dict):
        return given
    if set(given) != {"from", "to", "step"}:
        raise ValueError("a range has the keys from, to and step")
    first, last, step = given["from"], given["to"], given["step"]
    if not all(isinstance(value, int | float) for value in (first, last, step)):
        raise ValueError("from, to and step are numbers")
    if step <= 0 or last < first or (last - first) / step >= LONGEST_AXIS:
        raise ValueError(f"a range goes up from `from` to `to` in at most {LONGEST_AXIS:,} steps")
    count = int((last - first) / step + 1e-9) + 1
    return [round(first + index * step, 9) for index in range(count)]


Values = Annotated[list[int | float], BeforeValidator(_values)]


class Limits(_Section):
    """What a candidate may need at most to serve `batch` sequences of `context` tokens (default: data.seq_length): FLOPs of
    a forward pass per token, bytes of KV cache, bytes of weights and KV cache, at 16 bits a value; and milliseconds to their
    first tokens, measured where trials run."""

    context: Positive | None = None
    batch: Positive = 1
    flops_per_token: Limit | None = None
    kv_cache_bytes: Limit | None = None
    memory_bytes: Limit | None = None
    latency_ms: Limit | None = None


class Member(_Section):
    """One model of the family: the name it is registered under, its size within a relative tolerance, and the space of
    architectures to look for it in, each axis a list or a range {from, to, step}. `points` are shapes that are tried first
    and always distilled. It is cut from the teacher, or from the family's model before it; either way it is distilled from
    the teacher. `distill` replaces the recipe's for this one."""

    model: Annotated[str, Field(pattern=NAME)]
    start: Literal["teacher", "previous"] = "teacher"
    parameters: Positive
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    space: dict[str, Values]
    points: list[dict[str, Positive]] = []
    limits: Limits | None = None
    distill: Training | None = None


class Evaluate(_Section):
    tasks: list[Task] = []
    batch_rows: Positive = 8


class Register(_Section):
    """The alias that new versions get in the MLflow registry."""

    alias: Annotated[str, AfterValidator(check_alias)] = "candidate"


class Resources(_Section):
    """What each worker of a trial and each training worker takes; `workers` distil the winner together. `auto` goes by the
    GPUs that are there: `minitron_platform.recipes.resources` says how."""

    workers_per_trial: Positive = 1
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    workers: Positive | Literal["auto"] = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    max_failures: Annotated[int, Field(ge=0)] = 3


class Recipe(_Section):
    """One run, in full."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str = ""
    experiment: Annotated[str, Field(pattern=NAME)]
    teacher: Teacher
    data: Data
    correct: Correct | None = None
    calibrate: Calibrate
    family: Annotated[list[Member], Field(min_length=1)]
    losses: Losses = Losses()
    targets: Targets = Targets()
    search: Search
    distill: Training
    evaluate: Evaluate
    register_as: Register = Field(alias="register", default=Register())
    resources: Resources = Resources()

    def distillation(self, member: Member) -> Training:
        """The full distillation of one of the family."""
        return member.distill or self.distill

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [member.model for member in self.family]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two models are called {twice!r}")
        if self.family[0].start == "previous":
            raise ValueError(f"nothing comes before {names[0]!r}, so that it cannot start from what is previous")
        return self

    def correction(self) -> Training | None:
        """The training of the teacher's correction, if one is asked for."""
        if self.correct is None or self.correct.training:
            return self.correct.training if self.correct else None
        like = self.distill
        rates = {"peak_lr": like.peak_lr / 5, "min_lr": like.min_lr / 5, "warmup_steps": min(120, like.steps // 4)}
        return like.model_copy(update={**rates, "evaluate_tasks_every": 0})

    def key(self, member: Member) -> str:
        """The key of one of the family, as messages name it."""
        return f"family.{self.family.index(member)}"

    def origin(self, member: Member) -> Member | None:
        """The family's model that a later one is cut from; None where it is cut from the teacher."""
        return self.family[self.family.index(member) - 1] if member.start == "previous" else None
