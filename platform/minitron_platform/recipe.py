"""The recipe: one YAML file that says everything about a run, typed and strict about unknown keys."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from minitron.errors import InputError
from minitron.packages import PACKAGE
from minitron.storage import is_local, local_path

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Positive = Annotated[int, Field(ge=1)]
Limit = Annotated[float, Field(gt=0)]
LONGEST_AXIS = 10_000  # values; a range with more is a slip


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 6e-4 and 9e7 as numbers, which YAML 1.1 takes for text, and 29:13 as the text it is, which
    YAML 1.1 takes for 29 minutes."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\.inf)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Teacher(_Section):
    """The model to distil from: a folder, a .gguf file, `package:NAME/FILE` inside a Python package, or a hub name."""

    model: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class Data(_Section):
    """Text, packed once into rows. `path` may be any fsspec path."""

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


class Training(_Section):
    """A training: steps of `batch_rows` rows, warm-up, then cosine or `wsd`, which decays in the last `decay_share`.
    Every `evaluate_every` steps the held-out rows are measured. `shard` splits weights and optimizer over the workers."""

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

    alias: Annotated[str, Field(pattern=NAME)] = "candidate"


class Resources(_Section):
    """What each trial and each training worker takes; `workers` distil the winner together."""

    cpus_per_trial: Annotated[float, Field(gt=0)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    workers: Positive = 2
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
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
        return like.model_copy(update=rates)

    def origin(self, member: Member) -> Member | None:
        """The family's model that a later one is cut from; None where it is cut from the teacher."""
        return self.family[self.family.index(member) - 1] if member.start == "previous" else None


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = Path(str(importlib.resources.files("minitron_platform") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by its name, or one of yours by its path, with `a.b=value` overrides applied.

    Raises InputError naming the file, the key, the value and the remedy.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path) or Path(name_or_path).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"{name_or_path!r} is neither a recipe that ships ({', '.join(shipped)}) nor a file",
            f"{hint}see `minitron recipes`, or give the path of a YAML file",
        )
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({_one_line(error)})", "mend the line it names") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no keys", "start from a recipe that ships: `minitron recipes`")
    values = _unshared(values)
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(path, error) from error


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe in full, as `load_recipe` reads it."""
    return yaml.safe_dump(recipe.model_dump(by_alias=True), sort_keys=False)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe with its local paths independent of the working directory, to be sent elsewhere."""
    values = recipe.model_dump(by_alias=True)
    tasks = [*values["evaluate"]["tasks"], *filter(None, [values["calibrate"]["task"]])]
    tasks += (values["search"]["evaluate"] or {"tasks": []})["tasks"]
    paths = [(task, "data") for task in tasks]
    if recipe.data.kind != "hub" or local_path(recipe.data.path).exists():
        paths.append((values["data"], "path"))
    if local_path(recipe.teacher.model).exists():  # else it is a hub name
        paths.append((values["teacher"], "model"))
    for section, key in paths:
        value = section[key]
        if value and is_local(value) and not value.startswith(PACKAGE):
            section[key] = str(local_path(value))
    return Recipe.model_validate(values)


def _unshared(values: Any) -> Any:
    """A copy in which what YAML anchors made one thing is several, so that an override changes only the one it names."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(f"--set {override!r} is not KEY=VALUE", "write it as --set distill.steps=50")
    *parents, last = key.split(".")
    place: Any = values
    for index, parent in enumerate(parents):
        place = _enter(place, parent, key) if index or parent in place else place.setdefault(parent, {})
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not valid YAML ({_one_line(error)})", "quote it") from error
    if isinstance(place, list):
        place[_position(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"--set {key}: {'.'.join(parents)} is a single value", "name a key of a section")


def _enter(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, key)]
    if not isinstance(place, dict):
        raise InputError(f"--set {key}: there is no section above {part!r}", "see the recipe's keys in its file")
    return place.setdefault(part, {})


def _position(values: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise InputError(f"--set {key}: {part!r} is not a position in a list of {len(values)}", "count from 0")
    return int(part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(path: Path, error: ValidationError) -> InputError:
    """The first thing that is wrong, as one sentence about a key."""
    first = error.errors()[0]
    # a union's branches are no keys
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", part))
    value = first["input"]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return InputError(f"{path}: {key}: unknown key{more}", f"{hint}known here: {', '.join(known)}")
    if first["type"] == "missing":
        return InputError(f"{path}: {key}: missing{more}", "add the key; the recipes that ship show every one")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not first["loc"]:
        return InputError(f"{path}: family: {message}", "change the list of models")
    return InputError(f"{path}: {key}: {value!r} is not valid: {message}{more}", f"change {key}, or --set {key}=…")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        name = next((n for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        annotation = model.model_fields[name].annotation if name else None
        inner = getattr(annotation, "__args__", (annotation,))[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
