"""Odd values as users and damaged files bring them, and changes of sound JSON values by them."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from minitron.errors import MinitronError

ODD = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30)),
    *(0.0, -0.5, 0.5, 1e-30, 1e308, 1e23, 8e7, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        " ",
        "\0",
        "\n",
        "\x1b[31m",
        "é",
        "\ud83d",
        "💥",
        "a" * 5000,
        "../..",
        "/",
        "~",
        "~nobody/x",
        ".",
        "auto",
        "1",
        "1e3",
    ),
    *("s3://", "s3:/x", "a::b", "package:", "package:os/x", "package:..", "{}", "[", "!!python/none", "*a", "&a", "<<"),
    *([], {}, [[]], [None], [1, "a"], {"": 0}, {"a": {"b": []}}),
)
odd = st.sampled_from(ODD).map(copy.deepcopy) | st.recursive(  # copied, because a further change may be inside it
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, sound: Any, most: int = 3) -> Any:
    """A copy of a JSON value in which up to `most` values, at any depth, are odd, missing or in addition."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, most))):
        value = _change(draw, value)
    return value


def _change(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(odd)
    if isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.sampled_from(("inside", "inside", "inside", "remove", "add")))
        if action == "remove":
            del value[key]
        elif action == "add":
            value[draw(st.sampled_from(sorted(value)) | st.text(max_size=8))] = draw(odd)
        else:
            value[key] = _change(draw, value[key])
        return value
    index = draw(st.integers(0, len(value) - 1))
    value[index] = _change(draw, value[index])
    return value


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes of which some are others, missing or in addition."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        action = draw(st.sampled_from(("replace", "insert", "cut", "end")))
        part = draw(
            st.binary(max_size=8) | st.sampled_from((b"\xff" * 8, b"\0" * 8, b"{}", b"\xef\xbb\xbf", b'"', b"\n"))
        )
        if action == "replace":
            content[at : at + len(part)] = part
        elif action == "insert":
            content[at:at] = part
        elif action == "cut":
            del content[at : at + draw(st.integers(1, 16))]
        else:
            del content[at:]
    return bytes(content)


def check_sentence(error: MinitronError) -> None:
    """An error is one sentence that fits on a screen, with a remedy."""
    assert error.problem.strip()
    assert error.remedy.strip()
    assert len(error.problem) < 2000
