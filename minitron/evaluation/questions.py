"""Whether a task's questions can be made of its documents. A question is made by the task itself, as an evaluation does.

The errors name the file, the line and the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import UndefinedError

from minitron.errors import InputError, MinitronError
from minitron.evaluation.document_splits import count_documents, places
from minitron.evaluation.templates import NullError, sandboxed_templates

if TYPE_CHECKING:
    import datasets
    from lm_eval.api.task import Task as HarnessTask

WITH_EXAMPLES = (
    100  # documents of each definition whose prompts `check_questions` makes with the examples; the others' without
)
LONGEST_REASON = 250
_UNDEFINED = re.compile(r"^'(\w+)' is undefined$|has no attribute '(\w+)'$")


class Documents:
    """The documents of one split of a task. task: its name. paths: the files. definition: of the task."""

    def __init__(self, task: str, definition: Path, paths: list[Path]) -> None:
        self.task = task
        self.definition = definition
        self.paths = paths

    def misfit(self, place: str, error: Exception, document: Mapping[str, Any]) -> InputError:
        """The error for a document of which no question can be made. place: of it, such as "FILE, line 3"."""
        return InputError(
            f"task {self.task!r}: {place}: does not fit lm-eval's definition: {_reason(error, document)}; its fields are "
            f"{', '.join(map(str, document)) or 'none'}",
            f"correct it, or give documents with the fields that {self.definition} reads",
        )

    def place(self, number: int, available: int) -> str:
        """Where a document is. number: from 0. available: the number of documents that the definition has made of all."""
        if count_documents(self.paths) == available:
            return places(self.paths, {number})[number][0]
        return f"{self.paths[0]}, document {number + 1} of those that the task takes"

    def prepared(
        self, split: datasets.Dataset, prepare: Callable[[datasets.Dataset], datasets.Dataset]
    ) -> datasets.Dataset:
        """`split` as the definition's function changes it. Raises InputError naming the first document on which that fails."""
        try:
            return prepare(split)
        except MinitronError:
            raise
        except Exception as error:  # the function may raise anything
            number, end, reason = 0, len(split), error
            while end - number > 1:
                middle = (number + end) // 2
                if (failed := _failure(prepare, split.select(range(number, middle)))) is None:
                    number = middle
                else:
                    end, reason = middle, failed
            place, document = places(self.paths, {number})[number]
            if document:  # without the fields that others have
                reason = _failure(prepare, _as_split([document])) or reason
            raise self.misfit(place, reason, document or split[number]) from error

    def check_incomplete(
        self,
        built: HarnessTask,
        split: datasets.Dataset,
        numbers: Iterable[int],
        prepare: Callable[[datasets.Dataset], datasets.Dataset],
    ) -> None:
        """Raise InputError for a document with a null, or without a field that others have, if its question needs the field:
        it would be the text "None" there. numbers: of these documents in `split`, which the definition has not changed."""
        groups: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
        for number, (place, written) in places(self.paths, set(numbers)).items():
            document = split[number] if written is None else written
            groups.setdefault(_shape(document), []).append((place, document))
        with sandboxed_templates(refuse_null=True):
            for group in groups.values():
                documents = [document for _, document in group]
                try:
                    made = list(prepare(_as_split(documents)) if documents[0] else documents)
                except Exception as error:
                    raise self.misfit(*_first(group, error)) from error
                if len(made) != len(group):  # some are left out, so that it is not known which is which
                    group = [(f"{group[0][0]}, or one like it", document) for document in made]
                for (place, document), changed in zip(group, made, strict=True):
                    try:
                        if None in ask(built, 0, changed, 0):
                            raise NullError
                    except MinitronError:
                        raise
                    except Exception as error:
                        raise self.misfit(place, error, document) from error


def check_questions(built: HarnessTask, scored: Documents, examples: Documents | None, count: int) -> None:
    """Raise InputError for the first of `count` documents of which no question can be made. examples: those that questions
    begin with; of the first questions alone, because this takes as long as all the others."""
    available = len(built.task_docs)
    for number, document in built.doc_iterator(limit=count):
        shots = built.config.num_fewshot or 0
        try:
            ask(built, number, document, shots if number < WITH_EXAMPLES else 0)
        except MinitronError:
            raise
        except Exception as error:
            if shots and examples is not None and _failure(lambda made: ask(built, 0, made, 0), document) is None:
                _check_examples(built, examples)
            raise scored.misfit(scored.place(number, available), error, document) from error


def ask(built: HarnessTask, number: int, document: dict[str, Any], num_fewshot: int) -> Iterator[Any]:
    """What an evaluation makes of a document: the texts that are sent to a model, and the right answer."""
    context = built.fewshot_context(
        document,
        num_fewshot=num_fewshot,
        system_instruction=None,
        apply_chat_template=False,
        fewshot_as_multiturn=False,
        chat_template=None,
        gen_prefix=built.doc_to_prefix(document),
    )
    metadata = (built.config.task, number, 1)
    made = built.construct_requests(
        doc=document, ctx=context, metadata=metadata, apply_chat_template=False, chat_template=None
    )
    texts = [text for each in (made if isinstance(made, list) else [made]) for text in each.args]
    target = built.doc_to_target(document)
    if built.OUTPUT_TYPE == "multiple_choice":
        choices = built.doc_to_choice(document)
        _check_answer(target, len(texts) if built.multiple_input else len(choices))
        if not callable(built.config.process_results):
            _check_texts(choices)
    return iter([*texts, target])


def _check_answer(target: Any, choices: int) -> None:
    """Raise ValueError for the number of an answer that is none of the choices: lm-eval would count every answer as wrong."""
    for number in target if isinstance(target, list) else [target]:
        if isinstance(number, int) and not 0 <= number < choices:
            raise ValueError(f"the answer is choice {number + 1} of {choices}")


class EmptyChoiceError(ValueError):
    """A choice is an empty text."""


def _check_texts(choices: Sequence[str]) -> None:
    """Raise EmptyChoiceError for an empty choice: lm-eval divides by its length (acc_norm), and would never choose it."""
    for number, text in enumerate(choices, start=1):
        if text == "":
            raise EmptyChoiceError(f"choice {number} of {len(choices)} is empty")


def _check_examples(built: HarnessTask, examples: Documents) -> None:
    """Raise InputError for the first example that cannot be written, as lm-eval writes it in `fewshot_context`."""
    known = list(built.fewshot_docs())
    settings = built.fewshot_cfg
    for number, document in enumerate(known):
        try:
            built.doc_to_text(document, settings.doc_to_text)
            if settings.doc_to_choice:
                built.doc_to_choice(document, settings.doc_to_choice)
            built.doc_to_target(document, settings.doc_to_target)
        except Exception as error:
            raise examples.misfit(examples.place(number, len(known)), error, document) from error


def _failure(function: Callable[[Any], Any], argument: Any) -> Exception | None:
    try:
        function(argument)
    except Exception as error:  # noqa: BLE001 - the functions of a definition may raise anything
        return error
    return None


def _first(group: list[tuple[str, dict[str, Any]]], error: Exception) -> tuple[str, Exception, dict[str, Any]]:
    place, document = group[0]
    return place, error, document


def _as_split(documents: list[dict[str, Any]]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_list(documents)


def _shape(value: Any) -> Any:
    """Equal for documents that have the same fields, and nulls in the same ones."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _shape(inner)) for key, inner in value.items()))
    return () if value is None else 0


def _reason(error: Exception, document: Mapping[str, Any]) -> str:
    if isinstance(error, NullError):
        nulls = ", ".join(name for name, value in _fields(document) if value is None)
        return f"null in {nulls} would be written as None"
    if isinstance(error, KeyError):
        return f"there is no field {error}"
    if isinstance(error, UndefinedError) and (match := _UNDEFINED.search(str(error))):
        return f"there is no field {match[1] or match[2]!r}"
    if isinstance(error, EmptyChoiceError):
        said = str(error)
        named = [name for name, value in _fields(document) if value == "" or (isinstance(value, list) and "" in value)]
    else:
        text = " ".join(str(error).split())[:LONGEST_REASON]
        named = [name for name, value in _fields(document) if isinstance(value, str) and repr(value) in text]
        said = f"{type(error).__name__}: {text}"
    return said + (f" (from {' and '.join(named)})" if named else "")


def _fields(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a document's fields, those inside others as "outer.inner"."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in _fields(value))
        else:
            yield str(name), value
