"""lm-eval's backend for a model in memory: it forms batches, shares them with other processes, and counts answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from minitron.architecture import Architecture
from minitron.attention import short_length
from minitron.checkpoints.identity import generation_settings
from minitron.data import DocumentTokens, document_tokens
from minitron.errors import InputError
from minitron.evaluation.answers import Answers, batch_name
from minitron.evaluation.batches import CPU_ROWS, BatchRows, generated_rows
from minitron.evaluation.continuations import Continuation, log_likelihoods
from minitron.evaluation.requests import DocumentRequests
from minitron.processes import all_rows, all_succeed, check_same, dealt, is_sharded


def first_context(around: DocumentTokens, add_bos: bool | None) -> int | None:
    """The token before a text that has no context, such as one whose perplexity is measured. None stands for lm-eval's choice:
    BOS, also if the tokenizer does not add it, or else EOS. With an `add_bos` that was chosen, what is before a document."""
    if add_bos is None:
        return None
    before = [*around.end, *around.begin]
    return before[-1] if before else None


class Scorer(DocumentRequests):
    """lm-eval's transformers backend, which reports progress in documents and shares batches with other processes."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: BatchRows,
        add_bos: bool | None,
        total: int,
        progress: Callable[[int, int], None] | None,
        together: bool,
    ) -> None:
        self.around = document_tokens(tokenizer, add_bos)
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a padding token on the one it is given
            batch_size=CPU_ROWS if batch_size == "auto" else batch_size,
            softmax_dtype="float32",
            prefix_token_id=first_context(self.around, add_bos),
        )
        self._batch_rows = batch_size
        # of texts that are generated
        self.batch_size_per_gpu = generated_rows(
            batch_size, Architecture.from_config(model.config), self.max_length, self.device
        )
        self.together = together
        self._in_step = together and is_sharded(model)  # all processes make the same number of forward passes
        self.start(total, progress)

    def start(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        """Begin to count documents, of which all tasks together have `total`."""
        self._progress = progress
        self._total = total  # documents of all tasks
        self._before = 0  # documents of the tasks before the current one
        self._documents = 0  # documents of the current task
        self._stored: Answers | None = None

    def begin(self, documents: int, stored: Answers | None = None) -> None:
        """Start counting the next task, which has this number of documents. stored: its kept answers."""
        self._before += self._documents
        self._documents = documents
        self._stored = stored

    def settings(self) -> dict[str, Any]:
        """What its answers to the same requests depend on besides the model, apart from rounding."""
        return {
            "dtype": str(self.model.dtype),
            "device": self.device.type,
            "begin": list(self.around.begin),
            "prefix": self.prefix_token_id,
        }

    def text_settings(self) -> dict[str, Any]:
        """What the texts that it writes depend on besides `settings`; a JSON value."""
        return generation_settings(self.model.generation_config, self.tokenizer)

    def _expect(self, answers: int) -> None:
        self._expected = answers
        self._done = 0

    def _count_answer(self) -> None:
        before = self._documents * self._done // self._expected
        self._done += 1
        now = self._documents * self._done // self._expected
        if self._progress is not None and now > before:
            self._progress(self._before + now, self._total)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """As the parent's, but every context is computed once for all of its continuations, and logits only for the tokens of
        continuations, because float32 [batch, length, vocabulary] does not fit into memory with a large model. Raises
        InputError for a continuation without tokens, or with more than the model's context."""
        continuations = []
        for _text, context, tokens in requests:
            if not 0 < len(tokens) <= self.max_length:
                raise InputError(
                    f"an answer has {len(tokens):,} tokens, but the model accepts 1 to {self.max_length:,}",
                    "remove its document, or leave the task out",
                )
            kept = self.cut_left(context + tokens, self.max_length + 1, needed=len(tokens))
            continuations.append(Continuation(kept[: -len(tokens)], tokens))
        self._expect(len(continuations))
        answers: dict[int, tuple[float, bool]] = {}
        for number, answer in log_likelihoods(
            self.model, continuations, self._batch_rows, together=self.together, stored=self._stored
        ):
            answers[number] = answer.log_likelihood, answer.greedy
            self._count_answer()
        return [answers[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As the parent's, of which each call answers one batch."""
        self._expect(len(requests))
        check_same("the requests", (f"{request.args}\0".encode() for request in requests), self.together)
        answers: dict[int, str] = {}
        cut = self.cut
        missing, known, cut_before = self._split_stored(requests)
        for index, text in known.items():
            answers[index] = text
            self._count_answer()
        with all_succeed(self.together):
            for batch, counts in dealt(missing, self.model, together=self.together):
                torch.manual_seed(batch[0])  # so that a sampled text does not depend on the batches before
                before = self.cut
                texts = super().generate_until([requests[index] for index in batch], disable_tqdm=True)
                if not counts:
                    self.cut = before
                    continue
                if self._stored is not None:
                    kept = {"texts": texts, "cut": self.cut - before}
                    self._stored.add(_batch_name(batch, requests), kept)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                    self._count_answer()
        own = {index: text for index, text in answers.items() if index not in known}
        for index, text in _texts_of_all(own, self.together).items():
            if index not in answers:
                answers[index] = text
                self._count_answer()
        self.cut = cut + cut_before + int(all_rows(torch.tensor([self.cut - cut]), self.together).sum())
        return [answers[index] for index in range(len(requests))]

    def _split_stored(self, requests: list[Any]) -> tuple[list[list[int]], dict[int, str], int]:
        """The batches without kept answers, the texts of the others by index, and the number of their truncated requests."""
        missing: list[list[int]] = []
        texts: dict[int, str] = {}
        cut = 0
        for batch in self._generations(requests):
            kept = self._stored.known.get(_batch_name(batch, requests)) if self._stored is not None else None
            if kept is None:
                missing.append(batch)
            else:
                texts |= dict(zip(batch, kept["texts"], strict=True))
                cut += kept["cut"]
        return missing, texts, cut

    def _generations(self, requests: list[Any]) -> list[list[int]]:
        """The indices of the requests of each batch, which have the same settings and similar lengths, with longrope on the
        same side of `short_length`; the longest first."""
        short = short_length(self.model.config)
        alike: dict[tuple[str, bool], list[int]] = {}
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for index, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            alike.setdefault((repr(request.args[1]), short is not None and length > short), []).append(index)
        batches = []
        for indices in alike.values():
            indices.sort(key=lambda index: (-lengths[index], requests[index].args[0]))
            parts = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
            batches += [sorted(part) for part in parts]
        return batches

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        if self._in_step:
            options["synced_gpus"] = True
        return super()._model_generate(*arguments, **options)


def _batch_name(batch: list[int], requests: list[Any]) -> str:
    """Name of a batch by its requests, and by the number that random ones are drawn with."""
    return batch_name([str(batch[0]).encode(), *(repr(requests[index].args).encode() for index in batch)])


def _texts_of_all(own: dict[int, str], together: bool) -> dict[int, str]:
    """The texts that all processes generated, by index."""
    encoded = [text.encode() for text in own.values()]
    sizes = [[index, len(text)] for index, text in zip(own, encoded, strict=True)]
    content = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
    everything = bytes(all_rows(content, together).tolist())
    texts, start = {}, 0
    for index, size in all_rows(torch.tensor(sizes, dtype=torch.int64).view(-1, 2), together).tolist():
        texts[index] = everything[start : start + size].decode()
        start += size
    return texts
