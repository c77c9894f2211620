"""Texts that are tokenised together have the ids that each has alone."""

from __future__ import annotations

from helpers.evaluating import byte_tokenizer

from minitron.evaluation import encoding
from minitron.evaluation.encoding import EncodedAhead


class Counted:
    """A tokenizer that counts how many texts it was given at a time."""

    def __init__(self):
        self.tokenizer, self.given = byte_tokenizer(), []

    def __call__(self, texts, **options):
        self.given.append(len(texts))
        return self.tokenizer(texts, **options)

    def encode(self, text, **options):
        self.given.append(1)
        return self.tokenizer.encode(text, **options)


def test_announced_texts_are_tokenised_together_and_others_one_by_one(monkeypatch):
    monkeypatch.setattr(encoding, "AHEAD", 20)
    counted = Counted()
    encoded = EncodedAhead(counted)
    texts = [text for n in range(15) for text in (f"{n}? yes", f"{n}?", f"{n}? no", f"{n}?", f"{n}? é", f"{n}?")]
    encoded.plan(texts)
    for text in [*texts, "", texts[0], "something else"]:
        assert encoded(text) == byte_tokenizer().encode(text, add_special_tokens=False)
    assert counted.given[:3] == [20, 28, 28]
    assert sum(counted.given) < len(texts)
    assert counted.given[-1] == 1
