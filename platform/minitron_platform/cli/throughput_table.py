"""The table of throughputs, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from minitron.throughput import Spread, Throughput

SHORT = 0.95  # answers that have less than this share of the requested tokens are pointed out


def model_numbers(results: Sequence[Throughput]) -> dict[tuple[str, str], int]:
    """A number for each model and engine, by which the table names them."""
    pairs = dict.fromkeys((result.model, result.engine) for result in results)
    return {pair: number for number, pair in enumerate(pairs, start=1)}


def throughput_table(results: Sequence[Throughput], device: str, dtype: str) -> Table:
    """A row per workload and model: medians of the rounds, and quartiles of the ratio. Models are named by their numbers."""
    served = " (of servers unknown)" if any(result.engine == "server" for result in results) else ""
    table = Table(
        caption=f"medians of {results[0].rounds} rounds in turns, ratios with quartiles; {dtype} on {device}{served}",
        caption_justify="left",
    )
    table.add_column("in/out x batch")
    titles = (
        "model",
        "requests/s",
        "output tokens/s",
        "first token, ms",
        "between tokens, ms",
        "memory, GiB",
        "x model 1",
    )
    for title in titles:
        table.add_column(title, justify="right")
    numbers = model_numbers(results)
    for result in results:
        table.add_row(
            str(result.workload),
            str(numbers[result.model, result.engine]),
            _text(result.requests_per_second),
            _text(result.output_tokens_per_second),
            _text(result.first_token_seconds, 1_000),
            _text(result.inter_token_seconds, 1_000),
            "" if result.memory_bytes is None else _digits(result.memory_bytes / 2**30),
            "" if result.ratio is None else _with_quartiles(result.ratio),
        )
    return table


def _text(spread: Spread | None, scale: float = 1.0) -> str:
    return "" if spread is None else _digits(spread.median * scale)


def _with_quartiles(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _digits(value: float) -> str:
    """Three significant digits, and all before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(results: Sequence[Throughput]) -> list[str]:
    """Sentences on results that are not what was requested."""
    return [f"{each.workload}, {each.model} ({each.engine}): {note}" for each in results if (note := _note(each))]


def _note(result: Throughput) -> str:
    if result.failure:
        return result.failure
    wanted = result.workload
    said = []
    prompt, answer = result.input_tokens or 0, result.output_tokens or 0
    if abs(prompt - wanted.input_tokens) > (1 - SHORT) * wanted.input_tokens:
        said.append(f"prompts of {prompt:,.0f} tokens")
    if answer < SHORT * wanted.output_tokens:
        said.append(f"answers end after {answer:,.0f} tokens")
    return ", ".join(said)
