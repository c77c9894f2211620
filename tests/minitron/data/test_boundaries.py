"""Document boundaries in rows equal those of the packed documents."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers import tiny

from minitron.data import DocumentBoundaries, Rows, TextSource, pack
from minitron.errors import InputError


@pytest.mark.parametrize(
    ("begin", "rows"),
    [
        ((), ["aaE|aE|E|aa", "E|aaaaaaaa", "aaaaaaaaaE"]),
        ((66,), ["BaaE|BaE|BaE|Ba", "BE|BaaaaE|Baaaa", "BaaE|aaBaE|BaE|"]),  # one text contains BOS
        # one token both begins and ends documents; every row begins with it, even inside a document
        ((69,), ["EaaE|EaE|EaE|E", "EE|EaE|EE|Ea", "EaaaaaaaE|", "EaE|EE|EE|Ea"]),
    ],
)
def test_documents_begin_after_the_end_of_text_token(begin, rows):
    boundaries = DocumentBoundaries(ord("E"), begin)
    for row in rows:
        parts = [part for part in row.split("|") if part]
        ids = torch.tensor([[ord(token) for token in "".join(parts)]])
        assert boundaries.numbers(ids).tolist() == [[n for n, part in enumerate(parts, start=1) for _ in part]], row
        assert boundaries.positions(ids).tolist() == [[i for part in parts for i in range(len(part))]], row


@pytest.mark.parametrize("add_bos", [False, True])
def test_boundaries_of_packed_rows_are_where_documents_were_joined(tmp_path, add_bos):
    words, draw = tiny.tokenizer(), random.Random(0)  # the same token begins and ends a document
    texts = [" ".join(draw.choices(tiny.WORDS, k=draw.randrange(1, 30))) for _ in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = TextSource("jsonl", path=str(tmp_path / "text.jsonl"))
    sizes = {"seq_length": 16, "train_rows": 60, "heldout_rows": 0, "heldout_fraction": 0.0}
    pack(source, words, str(tmp_path / "rows"), **sizes, add_bos=add_bos)
    rows = Rows.open(str(tmp_path / "rows"), "train")
    numbers = rows.boundaries.numbers(ids := rows.take(range(len(rows))))
    eos, expected = words.eos_token_id, [words(text)["input_ids"] for text in texts]
    parts: list[list[int]] = [[]]  # documents rebuilt from their parts, without their special tokens
    for row, own in zip(ids, numbers, strict=True):
        for number in own.unique():
            part = row[own == number].tolist()[1 if add_bos else 0 :]
            parts[-1] += [token for token in part if token != eos]
            if eos in part:
                parts.append([])
    assert len(parts) > 15
    assert parts[:-1] == expected[: len(parts) - 1]


def test_an_end_token_among_several_beginning_tokens_is_refused():
    with pytest.raises(InputError, match=r"begin with the tokens \[3, 7\], among them the end-of-text token 7"):
        DocumentBoundaries(7, (3, 7))


@pytest.mark.parametrize(("after_each", "known"), [("<eos>", False), (" end", True)])
def test_chats_whose_messages_end_like_documents_have_no_boundaries(tmp_path, after_each, known):
    words = tiny.tokenizer()
    words.chat_template = f"{{% for m in messages %}}{{{{ m.content }}}}{after_each}{{% endfor %}}"
    chat = [{"role": role, "content": f"{role} river stone"} for role in ("user", "assistant") * 2]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"chat": chat}) + "\n") * 30)
    source = TextSource("jsonl", path=str(tmp_path / "chats.jsonl"), messages="chat")
    sizes = {"seq_length": 200, "train_rows": 4, "heldout_rows": 0, "heldout_fraction": 0.0}
    rows = pack(source, words, str(tmp_path / "rows"), **sizes)
    length = len(words(words.apply_chat_template(chat, tokenize=False))["input_ids"]) + known
    if not known:
        with pytest.raises(InputError, match="template ends messages with the end-of-text token"):
            rows.boundaries  # noqa: B018
        return
    numbers = rows.boundaries.numbers(ids := rows.take(range(2)))
    assert ids[0, length - 1] == words.eos_token_id
    assert numbers[0].tolist() == [1 + position // length for position in range(200)]
