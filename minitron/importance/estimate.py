"""Importance of every prunable unit from one forward-only pass over calibration rows (arXiv 2407.14679 section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron.arguments import check_model, check_rows, check_type
from minitron.checkpoints.sample import model_sample
from minitron.data import DocumentBoundaries
from minitron.errors import InputError
from minitron.evaluation.mode import evaluating
from minitron.importance.aggregate import AGGREGATIONS
from minitron.importance.collector import Collector
from minitron.importance.distributed import own_batches, own_share, sum_over_processes
from minitron.importance.layers import LayerScoring, score_layers
from minitron.importance.scores import WEIGHTS, ImportanceScores
from minitron.models import layers_of
from minitron.processes import is_sharded

Progress = Callable[[int, int], None]
BATCH_TOKENS = 4096


def estimate_importance(
    model: nn.Module,
    rows: Tensor,
    *,
    batch_aggregation: str = "l2",
    sequence_aggregation: str = "mean",
    neurons: str = "post",
    layers: LayerScoring | Sequence[LayerScoring] = (),
    tokenizer: Any = None,
    add_bos: bool | None = None,
    documents: DocumentBoundaries | None = None,
    batch_rows: int | None = None,
    progress: Progress | None = None,
) -> ImportanceScores:
    """Score heads, neurons, embedding channels, experts and layers.

    model: a transformers causal language model of a supported family. rows: packed tokens, int64 [num_rows, seq_length].
    batch_aggregation, sequence_aggregation: "mean", "l2" or "var" over rows and over tokens. neurons: score neurons after
    the activation function ("post") or before it ("pre", the paper's F_neuron).

    Heads are scored by the L2 norm over head_dim of the output projection's input, channels by the outputs of all norms
    (summed over the norms), experts by the L2 norm of their output times its router weight, layers by the cosine of the
    residual stream before and after. Tokens not routed to an expert count as zero for it and its neurons. `layers` adds
    further measurements of layers; its metric "task" needs `tokenizer`, and `add_bos` decides whether its requests start
    with BOS (see `minitron.evaluation.evaluate`). With `documents` the documents of a row do not see each other.

    Memory beside the model, with L layers of hidden size d: the residual stream of one batch at every depth, (L + 1) x tokens
    x d values in the model's dtype, a few times the widest activation of a batch in float32, and the float32 logits of 512
    tokens a few times. batch_rows: rows per batch; by default about 4,096 tokens, at least one row.

    If torch.distributed is initialised, every process takes its share of the same `rows`, and all return the same scores; the
    model may be sharded over them. `progress(done, total)` counts rows of this process over all passes, and evaluations of
    a task.
    Raises InputError for an unknown aggregation, family or metric, for something else than a model, and for empty rows.
    """
    check_model("model", model)
    check_rows("rows", rows)
    for key, how in (("batch_aggregation", batch_aggregation), ("sequence_aggregation", sequence_aggregation)):
        if how not in AGGREGATIONS:
            raise InputError(f"{key}: {how!r} is not an aggregation", f"use one of {', '.join(AGGREGATIONS)}")
    if neurons not in ("post", "pre"):
        raise InputError(
            f"neurons: {neurons!r} is not supported", 'use "post" or "pre", after or before the activation function'
        )
    scorings = [layers] if isinstance(layers, LayerScoring) else list(layers)
    for scoring in scorings:
        check_type("layers", scoring, LayerScoring)
    num_layers = len(layers_of(model))
    for scoring in scorings:
        scoring.check(num_layers)
        if scoring.task and tokenizer is None:
            raise InputError(
                f"tokenizer: missing, but layers are scored on {scoring.task.name}", "give the model's tokenizer"
            )
    weights = model_sample(model)
    batch_rows = batch_rows or max(1, BATCH_TOKENS // rows.shape[1])
    total = len(own_share(rows)) + sum(scoring.passes(num_layers, len(rows), is_sharded(model)) for scoring in scorings)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    removal: dict[str, dict[int, Tensor]] = {}
    orders: dict[str, dict[int, list[int]]] = {}
    collector = Collector(
        model, batch_aggregation, sequence_aggregation, pre_activation=neurons == "pre", documents=documents
    )
    try:
        with torch.no_grad(), evaluating(model):
            for batch, counts in own_batches(rows, batch_rows, model):
                collector.forward(batch.to(collector.cosines.device), counts=counts)
                if counts:
                    advance(len(batch))
            collector.remove()
            for scoring in scorings:
                blocks, order = score_layers(
                    model,
                    rows,
                    scoring,
                    tokenizer=tokenizer,
                    add_bos=add_bos,
                    documents=documents,
                    batch_rows=batch_rows,
                    advance=advance,
                )
                removal.setdefault(scoring.key, {}).update(blocks)
                if order:
                    orders.setdefault(scoring.key, {})[scoring.iterative] = order
    finally:
        collector.remove()
    return ImportanceScores(
        heads=collector.heads.result(len(rows)),
        neurons=collector.neurons.result(len(rows)),
        channels=collector.channels.result(len(rows)).sum(dim=0),
        similarity=(sum_over_processes(collector.cosines) / rows.numel()).float().cpu(),
        experts=collector.experts.result(len(rows)) if collector.experts else None,
        removal={metric: blocks for metric, blocks in removal.items() if blocks},
        orders=orders,
        provenance={
            WEIGHTS: weights,
            "rows": len(rows),
            "seq_length": rows.shape[1],
            "batch_aggregation": batch_aggregation,
            "sequence_aggregation": sequence_aggregation,
            "neurons": neurons,
            **({"documents": "separate"} if documents else {}),
            "layers": [scoring.to_dict() for scoring in scorings],
        },
    )
