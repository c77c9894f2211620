"""The work of every stage in parts, for the simulation of a cluster. The figures are those of the stages' estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from minitron.architecture import Architecture
from minitron.data.in_parts import TOKENS_PER_BYTE
from minitron.data.packing import SHARD_ROWS
from minitron.data.part_files import BLOCK_TOKENS
from minitron.data.parts import PART_BYTES
from minitron.data.rows import number_of_shards
from minitron_platform.estimates.gpu import GpuTraining
from minitron_platform.estimates.memory import corrected_share
from minitron_platform.estimates.outlook import DOCUMENT_TOKENS, MASTER_BYTES, Outlook, head_flops
from minitron_platform.estimates.requests import (
    TRIAL,
    checkpoint_requests,
    model_requests,
    rows_requests,
    store_requests,
)
from minitron_platform.estimates.teacher import TOKEN_BYTES, runs_live_teacher
from minitron_platform.estimates.traffic import step_traffic
from minitron_platform.estimates.work import Alone, DataParallel, Part, Split, Trials
from minitron_platform.recipes.resources import processes_on
from minitron_platform.recipes.schema import Member, Task, Training
from minitron_platform.recipes.search_schedule import SearchSchedule
from minitron_search.halving import kept
from minitron_search.sampling import round_size

TOKENS_PER_CPU_SECOND = 300_000  # assumed of a fast tokenizer on one CPU, with reading
PLACED_PER_CPU_SECOND = (
    100_000_000  # tokens whose documents one CPU places; `python -m benchmarks.merging` measures both
)
WRITTEN_PER_CPU_SECOND = 100_000_000  # tokens that one CPU copies into shards
PART_REQUESTS = 5  # reading a part of the text, looking whether it is finished, writing its table and record
SHARD_REQUESTS = 6  # reading the plan, looking whether the shard is finished, writing it and its record
TASK_DOCUMENTS = 1000  # assumed of a benchmark without `limit`


def teacher_parts(outlook: Outlook) -> tuple[Part, ...]:
    """One worker converts the checkpoint."""
    size = _bytes(outlook, outlook.teacher)
    return (Alone(reads=size, writes=size, requests=2 * model_requests(size)),)  # written, and read again to be hashed


def data_parts(outlook: Outlook, *, in_tasks: bool) -> tuple[Part, ...]:
    """One worker tokenises and packs; with `in_tasks` all workers tokenise parts of the text, one places the documents, and all
    write the shards of the rows."""
    data = outlook.recipe.data
    tokens = (data.train_rows + data.heldout_rows) * data.seq_length
    size = TOKEN_BYTES * tokens
    tokenising = tokens / TOKENS_PER_CPU_SECOND
    if not in_tasks:
        return (
            Alone(tokens=tokens, cpu_seconds=tokenising, reads=size, writes=size, requests=2 * model_requests(size)),
        )
    text_parts = math.ceil(tokens / TOKENS_PER_BYTE / PART_BYTES)
    shards = sum(number_of_shards(count, SHARD_ROWS) for count in (data.train_rows, data.heldout_rows))
    blocks = text_parts + math.ceil(tokens / BLOCK_TOKENS)
    return (
        Split(
            items=text_parts,
            tokens=tokens,
            cpu_seconds=tokenising,
            reads=int(tokens / TOKENS_PER_BYTE),
            writes=size,
            requests=text_parts * PART_REQUESTS + blocks,
        ),
        Alone(cpu_seconds=tokens / PLACED_PER_CPU_SECOND, requests=text_parts + shards),
        Split(
            items=shards,
            cpu_seconds=tokens / WRITTEN_PER_CPU_SECOND,
            reads=size,
            writes=size,
            requests=shards * SHARD_REQUESTS + blocks,
        ),
    )


def correction_parts(outlook: Outlook, gpu: GpuTraining | None) -> tuple[Part, ...]:
    """The training of the teacher, and its measurements before and after; nothing if the recipe has no correction."""
    training = outlook.recipe.correction()
    if training is None:
        return ()
    measured = _heldout(outlook, [outlook.teacher] * 2)
    forward = outlook.teacher.flops_per_token(outlook.recipe.data.seq_length)
    assert outlook.recipe.correct is not None
    share = corrected_share(outlook.recipe.correct, outlook.teacher)
    return measured, _training(outlook, training, outlook.teacher, (2 + share) * forward, gpu, trained=share)


def calibration_parts(outlook: Outlook, base: Architecture, passes: float) -> tuple[Part, ...]:
    """Forward passes of `base`. passes: row passes for the scores of layers."""
    recipe = outlook.recipe
    rows = recipe.calibrate.rows
    tokens = int((rows + passes) * recipe.data.seq_length)
    flops = base.flops_per_token(recipe.data.seq_length) * tokens
    requests = _fetch_requests(outlook, base)
    return (Split(items=rows, flops=flops, tokens=tokens, reads_per_node=_bytes(outlook, base), requests=requests),)


def targets_parts(outlook: Outlook) -> tuple[Part, ...]:
    """One forward pass of the teacher over all rows that are stored."""
    cost = outlook.teacher_cost
    return (
        Split(
            items=cost.rows,
            flops=cost.stored_flops,
            tokens=cost.rows * outlook.recipe.data.seq_length,
            reads_per_node=_bytes(outlook, outlook.teacher),
            writes=cost.bytes,
            requests=_fetch_requests(outlook, outlook.teacher) + store_requests(cost.bytes),
        ),
    )


def search_parts(outlook: Outlook, member: Member) -> tuple[Part, ...]:
    """Scoring before training, the short distillations from rung to rung, and benchmarks of the best.

    Which candidates go on is not known: evenly many of all sizes do.
    """
    search = outlook.recipe.search
    shapes = outlook.shapes(member)
    schedule = SearchSchedule(search)
    distilled = schedule.distilled(len(shapes), len(member.points))
    parts: list[Part] = []
    if search.forward:
        scored = round_size(search.sampler.candidates) if search.sampler else len(shapes)
        parts += [_scoring(outlook, member, shapes[i : i + scored]) for i in range(0, len(shapes), scored)]
    left = _evenly(shapes, distilled)
    last = 0
    for rung in (*schedule.stop_rungs, schedule.steps):
        parts.append(_round(outlook, member, left, last, rung))
        if schedule.halving and rung < schedule.steps:
            left = _evenly(left, kept(len(left), schedule.halving.keep))
        last = rung
    if benchmarks := search.evaluate:
        best = _evenly(left, min(benchmarks.keep, len(left)))
        documents = benchmark_documents(benchmarks.tasks)
        tokens = documents * DOCUMENT_TOKENS
        flops = [tokens * shape.flops_per_token(outlook.recipe.data.seq_length) for shape in best]
        parts.append(_trials(outlook, flops, tokens * len(best), reads=sum(_bytes(outlook, shape) for shape in best)))
    return tuple(parts)


def distillation_parts(
    outlook: Outlook, member: Member, student: Architecture, gpu: GpuTraining | None
) -> tuple[Part, ...]:
    """One worker prunes the model; all train it."""
    recipe = outlook.recipe
    live = runs_live_teacher(outlook.losses[member.model], recipe.targets.mode)
    seq_length = recipe.data.seq_length
    teacher = outlook.teacher.flops_per_token(seq_length) if live else head_flops(outlook.teacher)
    flops = 3 * student.flops_per_token(seq_length) + teacher
    stored = 0 if live else _stored_row(outlook)
    size = _bytes(outlook, outlook.base(member)), _bytes(outlook, student)
    pruning = Alone(reads=size[0], writes=size[1], requests=sum(map(model_requests, size)))
    return pruning, _training(outlook, recipe.distillation(member), student, flops, gpu, live=live, row_bytes=stored)


def evaluation_parts(outlook: Outlook, models: Sequence[Architecture]) -> tuple[Part, ...]:
    """Benchmarks and held-out rows of `models`, one after the other."""
    documents = benchmark_documents(outlook.recipe.evaluate.tasks)
    seq_length = outlook.recipe.data.seq_length
    tokens = documents * DOCUMENT_TOKENS
    parts: list[Part] = [_heldout(outlook, models)]
    if documents:
        flops = sum(tokens * model.flops_per_token(seq_length) for model in models)
        parts.append(Split(items=documents, flops=flops, tokens=tokens * len(models)))
    return tuple(parts)


def distillation_flops(outlook: Outlook, member: Member, student: Architecture) -> float:
    """FLOPs of the full distillation of `member` if `student` wins the search."""
    return sum(part.flops for part in distillation_parts(outlook, member, student, None))


def trial_flops(outlook: Outlook, member: Member, student: Architecture) -> float:
    """FLOPs of the trial of `student` that no rung stops."""
    return _round(outlook, member, [student], 0, SearchSchedule(outlook.recipe.search).steps).flops


def _training(
    outlook: Outlook,
    training: Training,
    student: Architecture,
    token_flops: float,
    gpu: GpuTraining | None,
    *,
    live: bool = False,
    row_bytes: int = 0,
    trained: float = 1.0,
) -> DataParallel:
    """row_bytes: that are read from the storage for a row. trained: share of the student's parameters that is trained."""
    rows = training.steps * training.batch_rows
    tokens = rows * outlook.recipe.data.seq_length
    checkpoints = training.steps // training.checkpoint_every if training.checkpoint_every else 0
    inside, between = step_traffic(gpu, live) if gpu else (0.0, 0.0)
    models = [student, outlook.teacher] if live else [student]
    checkpoint = int(MASTER_BYTES * trained * student.num_parameters)
    requests = checkpoints * checkpoint_requests(checkpoint, outlook.resources.workers)
    requests += rows_requests(rows, row_bytes) + model_requests(_bytes(outlook, student))
    return DataParallel(
        flops=tokens * token_flops,
        tokens=tokens,
        reads_per_node=sum(_bytes(outlook, model) for model in models),
        reads=rows * row_bytes,
        writes=checkpoints * checkpoint + _bytes(outlook, student),
        requests=requests + sum(_fetch_requests(outlook, model) for model in models),
        steps=training.steps,
        batch_rows=training.batch_rows,
        inside_bytes=inside,
        between_bytes=between,
    )


def _heldout(outlook: Outlook, models: Sequence[Architecture]) -> Split:
    """Measurements of `models` on the held-out rows."""
    data = outlook.recipe.data
    tokens = data.heldout_rows * data.seq_length
    head = head_flops(outlook.teacher)
    return Split(
        items=data.heldout_rows,
        flops=sum(tokens * (model.flops_per_token(data.seq_length) + head) for model in models),
        tokens=tokens * len(models),
        reads_per_node=sum(_bytes(outlook, model) for model in models),
        requests=sum(_fetch_requests(outlook, model) for model in models)
        + len(models) * rows_requests(data.heldout_rows, _stored_row(outlook), consecutive=True),
    )


def _scoring(outlook: Outlook, member: Member, shapes: Sequence[Architecture]) -> Trials:
    flops = [_measurement(outlook, shape) for shape in shapes]
    rows = _search_heldout_rows(outlook)
    tokens = rows * outlook.recipe.data.seq_length * len(shapes)
    read = rows * _stored_row(outlook) * len(shapes)
    requests = len(shapes) * (TRIAL // 2 + rows_requests(rows, _stored_row(outlook), consecutive=True))
    base = _bytes(outlook, outlook.base(member))
    return _trials(outlook, flops, tokens, reads=read, base=base, alone=True, requests=requests)


def _round(outlook: Outlook, member: Member, shapes: Sequence[Architecture], first: int, last: int) -> Trials:
    """Trials of `shapes` from step `first` to step `last`, with the measurements on the way."""
    recipe = outlook.recipe
    schedule = SearchSchedule(recipe.search)
    training = recipe.search.training
    rows = (last - first) * training.batch_rows
    rungs = sum(first < rung <= last for rung in (*schedule.rungs, schedule.steps))
    measurements = rungs + (first == 0 and recipe.search.forward is None)
    seq_length = recipe.data.seq_length
    head = head_flops(outlook.teacher)
    flops = [
        rows * seq_length * (3 * shape.flops_per_token(seq_length) + head) + measurements * _measurement(outlook, shape)
        for shape in shapes
    ]
    measured = measurements * _search_heldout_rows(outlook)
    waits = MASTER_BYTES if schedule.halving and last < schedule.steps else 0  # each keeps a checkpoint while it waits
    every = training.checkpoint_every
    checkpoints = last // every - first // every if every else int(waits > 0)
    row = _stored_row(outlook)
    trial_requests = TRIAL + rows_requests(rows, row) + rows_requests(measured, row, consecutive=True)
    written = [
        checkpoints * checkpoint_requests(MASTER_BYTES * shape.num_parameters, outlook.resources.workers_per_trial)
        for shape in shapes
    ]
    return _trials(
        outlook,
        flops,
        (rows + measured) * seq_length * len(shapes),
        reads=(rows + measured) * _stored_row(outlook) * len(shapes)
        + (MASTER_BYTES if first else 0) * sum(shape.num_parameters for shape in shapes),
        writes=waits * sum(shape.num_parameters for shape in shapes),
        base=_bytes(outlook, outlook.base(member)),
        requests=len(shapes) * trial_requests + sum(written),
    )


def _trials(
    outlook: Outlook,
    flops: Sequence[float],
    tokens: int,
    *,
    reads: int = 0,
    writes: int = 0,
    base: int = 0,
    alone: bool = False,
    requests: int = 0,
) -> Trials:
    """flops: of each trial. base: bytes of the model that candidates are pruned from. alone: each runs in one process."""
    resources = outlook.resources
    workers = 1 if alone else resources.workers_per_trial
    rows = outlook.recipe.search.training.batch_rows
    total = sum(flops)
    return Trials(
        flops=total,
        tokens=tokens,
        reads_per_node=base,
        reads=reads,
        writes=writes,
        requests=requests,
        shares=tuple(each / total for each in flops),
        workers=workers,
        gpus=resources.gpus_per_trial,
        balance=rows / (math.ceil(rows / workers) * workers),
    )


def _measurement(outlook: Outlook, shape: Architecture) -> float:
    """FLOPs of a measurement of a candidate on the held-out rows of the search."""
    seq_length = outlook.recipe.data.seq_length
    tokens = _search_heldout_rows(outlook) * seq_length
    return tokens * (shape.flops_per_token(seq_length) + head_flops(outlook.teacher))


def _search_heldout_rows(outlook: Outlook) -> int:
    rows = outlook.recipe.data.heldout_rows
    return min(outlook.recipe.search.heldout_rows or rows, rows)


def _stored_row(outlook: Outlook) -> int:
    """Bytes of what is stored of the teacher for a row."""
    return outlook.teacher_cost.bytes // outlook.teacher_cost.rows


def _fetch_requests(outlook: Outlook, model: Architecture) -> int:
    """Every node with workers reads `model` once."""
    return _worker_nodes(outlook) * model_requests(_bytes(outlook, model))


def _worker_nodes(outlook: Outlook) -> int:
    resources = outlook.resources
    return math.ceil(resources.workers / processes_on(resources.gpus_per_node, resources.gpus_per_worker))


def _bytes(outlook: Outlook, model: Architecture) -> int:
    return model.num_parameters * outlook.value_bytes


def benchmark_documents(tasks: Sequence[Task]) -> int:
    """Number of documents of benchmarks; TASK_DOCUMENTS for each without a limit."""
    limits = [TASK_DOCUMENTS if task.limit is None else task.limit for task in tasks]
    return sum(math.ceil(limit * TASK_DOCUMENTS) if limit < 1 else int(limit) for limit in limits)


def _evenly(shapes: Sequence[Architecture], count: int) -> list[Architecture]:
    """`count` of `shapes`, evenly spread over the list."""
    return [shapes[index * len(shapes) // count] for index in range(count)]
