"""Texts that a model writes: completions of a prompt, and answers in a conversation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.arguments import check_fields, check_model, check_tokenizer
from minitron.data import document_tokens
from minitron.errors import InputError
from minitron.evaluation.mode import undisturbed

MAX_NEW_TOKENS = 128
SEEDS = 2**63  # of torch.manual_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    max_new_tokens: longest text. temperature: 0 takes the most probable token; above, tokens are drawn from the most probable
    ones with a total probability of `top_p`. seed: of the random numbers; the same seed gives the same text.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens} is less than 1", "give 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: {self.temperature} is not a temperature", "give 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} is not a share", "give more than 0 and at most 1")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"seed: {self.seed} is not a seed", f"give a number from 0 to {SEEDS - 1}")

    def check_room(self, longest: int | None) -> None:
        """Raise InputError if a text alone has more tokens than a model's `longest`, without its prompt."""
        if longest is not None and self.max_new_tokens >= longest:
            raise InputError(
                f"max_new_tokens: {self.max_new_tokens:,} leave no room for a prompt in the {longest:,} tokens that the model "
                "accepts",
                f"give fewer than {longest:,}",
            )


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    add_bos: bool | None = None,
    streamer: Any = None,
    in_step: bool = False,
) -> str:
    """The text with which a transformers causal LM continues `prompt`, without it.

    It begins with the special tokens of a document (`add_bos` as in `minitron.data.pack`), and ends before the end-of-text
    token or after `max_new_tokens`. streamer: transformers', which gets the tokens as they come. in_step: the model is split
    over several processes, which all make this call. The model's mode and the random states are not changed. Raises
    InputError for a prompt that is empty, or too long for the model's context.
    """
    check_model("model", model)
    check_tokenizer("tokenizer", tokenizer)
    ids = _opened(tokenizer, prompt, add_bos)
    return _continued(model, tokenizer, ids, sampling or Sampling(), streamer, in_step=in_step)


def check_prompt(
    tokenizer: Any, prompt: str, sampling: Sampling, longest: int | None, *, add_bos: bool | None = None
) -> None:
    """Raise InputError for a prompt that `complete` refuses, before a model is loaded. longest: tokens that it accepts."""
    _check_ids(_opened(tokenizer, prompt, add_bos), sampling, longest)


def _opened(tokenizer: Any, prompt: str, add_bos: bool | None) -> list[int]:
    return document_tokens(tokenizer, add_bos).opened(tokenizer.encode(prompt, add_special_tokens=False))


def _check_ids(ids: list[int], sampling: Sampling, longest: int | None) -> None:
    if not ids:
        raise InputError("the prompt is empty, and the tokenizer has no token to begin with", "give a text")
    if longest is not None and len(ids) + sampling.max_new_tokens > longest:
        raise InputError(
            f"the prompt has {len(ids):,} tokens, which with {sampling.max_new_tokens:,} new ones are more than the "
            f"{longest:,} that the model accepts",
            "give a shorter prompt, or fewer new tokens",
        )


def answer(
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    sampling: Sampling | None = None,
    *,
    streamer: Any = None,
) -> str:
    """The model's answer to a conversation, a list of {role, content}, written with the tokenizer's own chat template.

    Raises InputError for a tokenizer without one, and as `complete`.
    """
    check_model("model", model)
    check_tokenizer("tokenizer", tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the model's tokenizer has no chat template", "give an instruct model, or complete a prompt instead"
        )
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return _continued(model, tokenizer, ids, sampling or Sampling(), streamer)


def _continued(
    model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, streamer: Any, *, in_step: bool = False
) -> str:
    _check_ids(ids, sampling, getattr(model.config, "max_position_embeddings", None))
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    row = torch.tensor([ids], device=model.device)
    ends = _end_tokens(model, tokenizer)
    with undisturbed(model), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        output = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(drawn),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            streamer=streamer,
            synced_gpus=in_step,
            **drawn,
        )
    new = output[0, len(ids) :].tolist()
    if new and new[-1] in ends:
        new = new[:-1]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation config, such as the end of a turn."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *listed] if token is not None})
