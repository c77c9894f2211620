"""lm-eval's backend for a model at an OpenAI-compatible server, with the same requests as for one in memory.

Prompts are sent as token ids, so that the server adds no special tokens. Log-likelihoods need a server that repeats the prompt
with its log-probabilities (`echo` with `logprobs`): vLLM does, llama.cpp and chat endpoints do not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from minitron.completions import Served, completed, model_entry
from minitron.data import document_tokens
from minitron.errors import InputError
from minitron.evaluation.answers import batch_name
from minitron.evaluation.scorer import Scorer, first_context

CONCURRENT = 8  # requests at a time, by default
LENGTH = 2_048  # tokens of prompt and answer, of a server that does not say how many its model accepts


class ServedScorer(Scorer):
    """Answers requests by a server, several at a time. The tokenizer is that of the served model."""

    def __init__(
        self,
        served: Served,
        tokenizer: Any,
        concurrent: int,
        add_bos: bool | None,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        TemplateLM.__init__(self)  # without the transformers backend's, which loads a model
        self.served = served
        self.around = document_tokens(tokenizer, add_bos)
        self.custom_prefix_token_id = first_context(self.around, add_bos)
        self.tokenizer = copy.deepcopy(tokenizer)
        self.backend = "causal"
        self.chat_template_args: dict[str, Any] = {}
        self.enable_thinking = None
        self._max_length = int(model_entry(served).get("max_model_len") or LENGTH)
        self._rank, self._world_size, self._device = 0, 1, torch.device("cpu")
        self._concurrent = concurrent
        self.together = False
        self.start(total, progress)

    def settings(self) -> dict[str, Any]:
        return {
            "server": "completions",
            "begin": list(self.around.begin),
            "prefix": self.prefix_token_id,
            "length": self.max_length,
        }

    def text_settings(self) -> dict[str, Any]:
        return {}  # those of the server's model are part of what names it, see `AnswerStore`

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = []
        for _text, context, tokens in requests:
            if not 0 < len(tokens) < self.max_length:
                raise InputError(
                    f"an answer has {len(tokens):,} tokens, but the model accepts 1 to {self.max_length - 1:,}",
                    "remove its document, or leave the task out",
                )
            kept = self.cut_left(
                context + tokens, self.max_length - 1, needed=len(tokens)
            )  # one more token is generated
            rows.append((kept, len(tokens)))
        answers = self._answered(rows, lambda row: self._log_likelihood(*row))
        return [(float(log_likelihood), bool(greedy)) for log_likelihood, greedy in answers]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        rows = []
        for request in requests:
            text, arguments = request.args
            settings = normalize_gen_kwargs(arguments, self.max_gen_toks)
            stop = handle_stop_sequences(settings.pop("until", None), eos=self.tokenizer.eos_token)
            length = int(settings.pop("max_gen_toks"))
            if length >= self.max_length:
                raise InputError(
                    f"answers may have {length} tokens, but the server's model accepts {self.max_length} with the question",
                    "serve it with a longer context, or leave the task out",
                )
            ids = self.prompt(text, self.max_length - length)
            temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
            rows.append((ids, [each for each in stop if each], length, temperature))
        return [str(text) for text in self._answered(rows, lambda row: self._text(*row))]

    def _answered(self, rows: Sequence[Any], ask: Callable[[Any], Any]) -> list[Any]:
        """The answers, which are kept by groups of as many as are asked at a time."""
        self._expect(len(rows))
        answers: list[Any] = []
        with ThreadPoolExecutor(self._concurrent) as pool:
            for start in range(0, len(rows), self._concurrent):
                group = rows[start : start + self._concurrent]
                name = batch_name([repr(row).encode() for row in group])
                known = None if self._stored is None else self._stored.known.get(name)
                if known is None:
                    known = list(pool.map(ask, group))
                    if self._stored is not None:
                        self._stored.add(name, known)
                answers += known
                for _ in group:
                    self._count_answer()
        return answers

    def _log_likelihood(self, ids: list[int], length: int) -> list[float | bool]:
        """Log-likelihood of the last `length` tokens, in nats, and whether each is the most probable one."""
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1, "seed": 1234}
        said = completed(self.served, body).get("logprobs") or {}
        values = (said.get("token_logprobs") or [])[: len(ids)]
        best = (said.get("top_logprobs") or [])[: len(ids)]
        if len(values) < len(ids) or len(best) < len(ids):
            raise InputError(
                f"{self.served.url}: does not give the log-probabilities of a prompt (echo with logprobs)",
                "use a server that does, such as vLLM, or tasks that generate text",
            )
        own, tops = values[-length:], best[-length:]
        return [float(sum(own)), all(value >= max(top.values()) for value, top in zip(own, tops, strict=True))]

    def _text(self, ids: list[int], stop: list[str], length: int, temperature: float) -> str:
        body = {"prompt": ids, "max_tokens": length, "temperature": temperature, "stop": stop, "seed": 1234}
        text = str(completed(self.served, body).get("text") or "")
        return str(postprocess_generated_text(generation=text, stop=stop, think_end_token=None))
