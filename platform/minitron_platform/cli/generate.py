"""`minitron generate` and `minitron chat`: texts of a model, to be read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from minitron.errors import InputError
from minitron_platform.cli.model_sources import (
    MODEL_HELP,
    check_models,
    checkpoint,
    dtype_option,
    is_registered,
    load,
)
from minitron_platform.cli.options import tracking_options
from minitron_platform.console import Console, echo

if TYPE_CHECKING:
    from minitron.evaluation.generation import Sampling
    from minitron_platform.locations import Locations

RESET = "/reset"


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for how tokens are chosen."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Draw from this share of probability."
        ),
        click.option(
            "--temperature", type=float, default=0.0, show_default=True, help="0 takes the most probable token."
        ),
        click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Longest text."),
    ):
        command = option(command)
    return command


@click.command(epilog=MODEL_HELP)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="Text to continue; may be repeated."
)
@sampling_options
@dtype_option
@tracking_options
def generate(
    locations: Locations, models: tuple[str, ...], prompts: tuple[str, ...], dtype: str, **sampling: Any
) -> None:
    """Print how models continue a prompt.

    \b
    minitron generate ./teacher ./student --prompt "The capital of France is"
    """
    from minitron.evaluation.generation import complete

    settings = _checked(models, locations, sampling)
    for prompt in prompts:
        if not prompt:
            raise InputError("--prompt: it is empty", "give the text that the models are to continue")
    _check_prompts(models, prompts, settings)
    console = Console()
    texts: dict[str, list[str]] = {}
    for model in models:
        with checkpoint(model, locations) as source, console.working(model):
            console.status("loading")
            loaded = load(source, dtype)
            console.status("generating")
            texts[model] = [complete(loaded.model, loaded.tokenizer, prompt, settings) for prompt in prompts]
    for number, prompt in enumerate(prompts):
        console.say(f"[bold]{escape(prompt)}[/]")
        for model in models:
            console.say(f"[dim]{escape(model)}[/]\n{escape(texts[model][number])}\n")


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option("--system", metavar="TEXT", help="Message of the system, before the conversation.")
@sampling_options
@dtype_option
@tracking_options
def chat(locations: Locations, model: str, system: str | None, dtype: str, **sampling: Any) -> None:
    """Talk with an instruct model.

    Write a line and the model answers, with its own chat template. /reset begins again; Ctrl-D ends.
    """
    from minitron.evaluation.generation import answer

    settings = _checked((model,), locations, sampling)
    console = Console()
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    with checkpoint(model, locations) as source:
        with console.working(model):
            console.status("loading")
            loaded = load(source, dtype)
        if not getattr(loaded.tokenizer, "chat_template", None):
            raise InputError(
                f"{model}: its tokenizer has no chat template", "give an instruct model, or use `minitron generate`"
            )
        while (line := _line()) is not None:
            if line == RESET:
                messages = list(beginning)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            with console.working(model):
                text = answer(loaded.model, loaded.tokenizer, messages, settings)
            messages.append({"role": "assistant", "content": text})
            echo(text)


def _checked(models: tuple[str, ...], locations: Locations, sampling: dict[str, Any]) -> Sampling:
    """The settings. Raises InputError for them and for models that cannot be used, before one is loaded."""
    from minitron.evaluation.generation import Sampling

    try:
        settings = Sampling(**sampling)
        settings.check_room(check_models(models, locations))
    except InputError as error:
        field, colon, rest = error.problem.partition(": ")
        if not (colon and field in sampling):
            raise
        raise InputError(f"--{field.replace('_', '-')}: {rest}", error.remedy) from error
    return settings


def _check_prompts(models: tuple[str, ...], prompts: tuple[str, ...], settings: Sampling) -> None:
    """Raise InputError for a prompt that is too long for a model. The tokenizer of a GGUF file takes seconds to read, and
    registered models are copied first: theirs are checked once they are loaded."""
    from minitron.evaluation.generation import check_prompt
    from minitron.models import source_architecture, source_tokenizer

    for model in models:
        if is_registered(model) or model.endswith(".gguf"):
            continue
        (_, longest), tokenizer = source_architecture(model), source_tokenizer(model)
        for prompt in prompts:
            try:
                check_prompt(tokenizer, prompt, settings, longest)
            except InputError as error:
                raise InputError(f"{model}: {error.problem}", error.remedy) from error


def _line() -> str | None:
    """The user's next line; None at the end of the input."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False)
    line = sys.stdin.readline()
    return line.strip() if line else None
