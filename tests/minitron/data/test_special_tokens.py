"""Documents begin and end with the special tokens of the model's tokenizer, in rows and in benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluating import arc_documents, tiny_model, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from minitron.data import DocumentTokens, Rows, TextSource, document_tokens, pack
from minitron.errors import InputError, StorageError
from minitron.evaluation import Task, evaluate
from minitron.kv_cache import cache_name
from minitron.models import load_tokenizer
from minitron.tokenizer_beginning import with_beginning

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def _byte_level(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the kind of Llama 3, Qwen and SmolLM2: the special tokens, then one token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*dict.fromkeys(special.values()), *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _begun() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a post-processor that adds BOS in front, as that of Llama 3."""
    tokenizer = _byte_level(bos_token=BEGIN, eos_token=END, pad_token=PAD)
    template = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    return tokenizer


def _pieces(kind: type, specials: list[str], **options: Any) -> Any:
    """A tokenizer of the kind of SentencePiece, as those of Llama 2, Mistral, Phi-3 and Gemma."""
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.0123456789"]
    return kind(vocab={word: number for number, word in enumerate(words)}, merges=[], **options)


def _llama_2(**options: Any) -> Any:
    return _pieces(LlamaTokenizer, ["<unk>", "<s>", "</s>", "<|endoftext|>"], **options)


def _gemma() -> Any:
    return _pieces(GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], add_bos_token=True)


def _qwen() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<|endoftext|>", *letters])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|endoftext|>", pad_token="<|endoftext|>")


TOKENIZERS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[int, ...], int | None]] = {
    # the tokenizer, the tokens before a document, the tokens after it, and its BOS token
    "llama 2": (lambda: _llama_2(add_bos_token=True, add_eos_token=False), (1,), (2,), 1),
    "mistral, mixtral": (lambda: _llama_2(add_bos_token=True, add_eos_token=False, legacy=True), (1,), (2,), 1),
    "llama 3": (_begun, (0,), (1,), 0),
    "gemma 2, gemma 3": (_gemma, (2,), (1,), 2),
    "qwen 2, qwen 3": (_qwen, (), (0,), None),
    "phi 3": (lambda: _llama_2(add_bos_token=False, add_eos_token=False, eos_token="<|endoftext|>"), (), (3,), 1),
    "a BOS that nothing adds, as nemotron may have it": (
        lambda: _byte_level(bos_token="<s>", eos_token="</s>"),
        (),
        (1,),
        0,
    ),
    "smollm2": (lambda: _byte_level(bos_token="<|endoftext|>", eos_token="<|endoftext|>"), (), (0,), 0),
    "one that ends texts itself": (lambda: _llama_2(add_bos_token=True, add_eos_token=True), (1,), (2,), 1),
}


@pytest.fixture
def corpus(tmp_path: Path) -> TextSource:
    lines = [json.dumps({"text": f"document {number} " + "and more " * (number % 9)}) for number in range(300)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return TextSource("jsonl", str(tmp_path / "corpus.jsonl"))


def _pack(corpus: TextSource, tokenizer: Any, target: Path, add_bos: bool | None = None) -> Rows:
    sizes = {"seq_length": 24, "train_rows": 60, "heldout_rows": 10, "heldout_fraction": 0.2}
    return pack(corpus, tokenizer, str(target), add_bos=add_bos, **sizes)


def _documents(rows: Rows, around: DocumentTokens) -> list[list[int]]:
    """The documents in rows, by definition: rows without their first tokens, split after every end token."""
    start, (end,) = len(around.begin), around.end
    stream: list[int] = []
    for row in rows.take(range(len(rows))).tolist():
        assert tuple(row[:start]) == around.begin
        # after a row that ends with an end token, the first tokens of this row are those of its document
        fresh = not stream or stream[-1] == end
        stream += row if fresh else row[start:]
    texts: list[list[int]] = [[]]
    for token in stream:
        texts[-1].append(token)
        if token == end:
            texts.append([])
    return texts[:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_documents_begin_and_end_like_the_texts_of_each_familys_tokenizer(
    name: str, corpus: TextSource, tmp_path: Path
) -> None:
    make, begin, end, bos = TOKENIZERS[name]
    tokenizer = make()
    around = document_tokens(tokenizer)
    assert around == DocumentTokens(begin, end, bos)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert document_tokens(load_tokenizer(tmp_path / "saved")) == around, "a saved tokenizer has the same"

    rows = _pack(corpus, tokenizer, tmp_path / "rows")
    texts = {json.loads(line)["text"] for line in Path(corpus.path).read_text().splitlines()}
    plain = {(*begin, *tokenizer.encode(text, add_special_tokens=False), *end) for text in texts}
    found = _documents(rows, around)
    assert len(found) > 20
    assert {tuple(ids) for ids in found} <= plain
    if begin:
        assert tokenizer.encode("more", add_special_tokens=True)[: len(begin)] == list(begin)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_can_be_saved_that_begins_texts_as_add_bos_says(name: str, add_bos: bool, tmp_path: Path) -> None:
    make, begin, _, bos = TOKENIZERS[name]
    tokenizer = make()
    if add_bos and bos is None:
        with pytest.raises(InputError, match="no beginning-of-sequence token"):
            with_beginning(tokenizer, add_bos)
        return
    own = tokenizer.encode("ab c")
    changed = with_beginning(tokenizer, add_bos)
    assert (changed is tokenizer) == (bool(begin) == add_bos)
    changed.save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    text = own[len(begin) :]
    assert saved.encode("ab c") == ([bos] if add_bos else []) + text
    assert saved.encode("ab c", add_special_tokens=False) == tokenizer.encode("ab c", add_special_tokens=False)
    assert saved.decode(saved.encode("ab c"), skip_special_tokens=True) == "ab c"
    if changed is not tokenizer:
        assert saved("ab c", "ab c")["input_ids"] == 2 * saved.encode("ab c")
    assert document_tokens(saved) == document_tokens(tokenizer, add_bos)
    assert tokenizer.encode("ab c") == own, "the original is as it was"


def test_a_tokenizer_whose_beginning_cannot_be_changed_is_refused() -> None:
    class Fixed(PreTrainedTokenizerFast):
        def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
            return _begun().save_pretrained(*arguments, **options)

    tokenizer = Fixed(tokenizer_object=_begun().backend_tokenizer, bos_token=BEGIN, eos_token=END)
    with pytest.raises(InputError, match="add_bos: false, but transformers cannot change how a Fixed begins texts"):
        with_beginning(tokenizer, False)


def test_add_bos_overrides_the_tokenizer_and_changes_the_identity_of_the_rows(
    corpus: TextSource, tmp_path: Path
) -> None:
    tokenizer = _begun()
    own, without = _pack(corpus, tokenizer, tmp_path / "own"), _pack(corpus, tokenizer, tmp_path / "without", False)
    (bos,) = document_tokens(tokenizer).begin
    assert bool((own.take(range(60))[:, 0] == bos).all())
    assert not bool((without.take(range(60)) == bos).any())
    assert own.fingerprint != without.fingerprint
    assert _pack(corpus, tokenizer, tmp_path / "true", True).fingerprint == own.fingerprint
    with pytest.raises(StorageError, match="packed from another source"):
        _pack(corpus, tokenizer, tmp_path / "own", False)

    plain = _byte_level(bos_token=BEGIN, eos_token=END, pad_token=PAD)
    assert _pack(corpus, plain, tmp_path / "plain").fingerprint == without.fingerprint, (
        "the same ids, no post-processor"
    )
    assert "begin" not in without.index["request"], "as before the option existed"
    assert _pack(corpus, plain, tmp_path / "forced", True).fingerprint == own.fingerprint
    with pytest.raises(InputError, match="add_bos: true, but the tokenizer has no beginning-of-sequence token"):
        _pack(corpus, _byte_level(eos_token=END), tmp_path / "none", True)


def test_a_long_document_gets_one_beginning_and_so_does_each_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.data.tokenising.LONGEST_PIECE", 1000)  # the document is tokenised in pieces
    tokenizer = _begun()
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "long.txt").write_text(f"{BEGIN}{text}")
    sizes = {"seq_length": 51, "train_rows": 150, "heldout_rows": 0, "heldout_fraction": 0.0}
    ids = pack(TextSource("text", str(tmp_path)), tokenizer, str(tmp_path / "rows"), **sizes).take(range(150))
    assert bool((ids[:, 0] == tokenizer.bos_token_id).all())
    assert not bool((ids[:, 1:] == tokenizer.bos_token_id).any()), (
        "a text that spells out the BOS token gets no second one"
    )
    assert tokenizer.decode(ids[:, 1:].flatten().tolist()) == text[: 150 * 50]


# --- benchmarks


def _requests(model: Any, tokenizer: Any, task: Task, **options: Any) -> list[list[int]]:
    """The token ids of all inputs of a model for a task, without padding."""
    seen: list[list[int]] = []

    def look(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        if given.get(cache_name()) is None or ids.shape[1] > 1:  # without the single tokens of generation
            seen.extend([token for token in row if token != tokenizer.pad_token_id] for row in ids.tolist())

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        evaluate(model, tokenizer, [task], batch_size=1, **options)
    finally:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    """Tasks with every kind of request: choices, choices after examples, continuations of texts that contain BOS as text,
    texts longer than the context, and generation."""
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "arc" / "test.jsonl", arc_documents(3))
    write_jsonl(folder / "arc" / "train.jsonl", arc_documents(3, seed=1))
    begun = [{**document, "question": f"{BEGIN}{document['question']}"} for document in arc_documents(3)]
    for document in begun:
        document["text"] = f"{BEGIN}one two three four"
    write_jsonl(folder / "lambada" / "test.jsonl", begun)
    write_jsonl(folder / "wikitext" / "test.jsonl", [{"page": " ".join(["a page of words"] * 25)}, {"page": "short"}])
    write_jsonl(folder / "gsm8k" / "test.jsonl", [{"question": "how many?" * 20, "answer": "#### 1"}])
    return {
        "choices": Task("arc_easy", str(folder / "arc")),
        "examples": Task("arc_easy", str(folder / "arc"), num_fewshot=1),
        "spelled out": Task("lambada_openai", str(folder / "lambada")),
        "rolling": Task("wikitext", str(folder / "wikitext")),
        "generation": Task("gsm8k", str(folder / "gsm8k")),
    }


@pytest.mark.parametrize("kind", ["choices", "examples", "spelled out", "rolling", "generation"])
def test_every_request_of_a_benchmark_begins_like_the_rows(kind: str, tasks: dict[str, Task]) -> None:
    model = tiny_model(1, vocab_size=300, max_position_embeddings=400 if kind == "generation" else 128)
    tokenizer = _begun()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    requests = _requests(model, tokenizer, tasks[kind])
    assert requests
    assert {(ids[0], ids.count(bos)) for ids in requests} == {(bos, 1)}
    if kind == "rolling":
        assert len(requests) > 3, "the first text needs several windows"

    without = _requests(model, tokenizer, tasks[kind], add_bos=False)
    if kind == "spelled out":  # here BOS is part of the text
        assert {(ids[0], ids.count(bos)) for ids in without} == {(bos, 1)}
    else:
        assert not [ids for ids in without if bos in ids]
    if kind == "rolling":
        assert eos in {ids[0] for ids in without}, "like a document after the end of another"

    plain = _byte_level(bos_token=BEGIN, eos_token=END, pad_token=PAD)
    assert _requests(model, plain, tasks[kind], add_bos=True) == requests
    own = _requests(model, plain, tasks[kind])
    if kind == "rolling":  # lm-eval puts BOS there, also if the tokenizer does not add it
        assert bos in {ids[0] for ids in own}
        assert [ids[1:] for ids in own] == [ids[1:] for ids in without]
    else:
        assert own == without


def test_a_tokenizer_that_appends_an_end_token_does_not_put_it_between_question_and_answer(
    tasks: dict[str, Task],
) -> None:
    tokenizer = _begun()
    ended = _begun()
    special = [(BEGIN, tokenizer.bos_token_id), (END, tokenizer.eos_token_id)]
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=special
    )
    model = tiny_model(1, vocab_size=300)
    assert _requests(model, ended, tasks["choices"]) == _requests(model, tokenizer, tasks["choices"])


@pytest.mark.parametrize("context", [512, 64])
def test_a_text_longer_than_the_context_is_scored_in_windows_with_the_same_beginning(
    context: int, tasks: dict[str, Task]
) -> None:
    tokenizer, model = _begun(), tiny_model(1, vocab_size=300, max_position_embeddings=context)
    pages = [
        json.loads(line)["page"] for line in Path(str(tasks["rolling"].data), "test.jsonl").read_text().splitlines()
    ]
    total, step = 0.0, context - 1
    for page in pages:
        text = tokenizer.encode(page, add_special_tokens=False)
        for end in [*range(step, len(text), step), len(text)]:
            predicted = min(step, end - (end - 1) // step * step)
            ids = torch.tensor([[tokenizer.bos_token_id, *text[max(0, end - context) : end]]])
            assert ids.shape[1] <= context + 1
            with torch.no_grad():
                log_p = model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(log_p.gather(1, ids[0, 1:, None])[-predicted:].sum())
    words = sum(len(page.split(" ")) for page in pages)
    score = evaluate(model, tokenizer, [tasks["rolling"]])["wikitext"]
    assert score.value == pytest.approx(math.exp(total / words), rel=1e-4)
