"""What is wrong if the hub does not give a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from minitron.errors import InputError, one_line

LONGEST_REASON = 300


@contextmanager
def given_by_hub(name: str) -> Iterator[None]:
    """Raise InputError if the hub refuses weights of the model `name` inside the block, cannot be reached, or stops sending
    them."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:  # it has answered
        raise InputError(
            f"{name}: the hub does not give all of its weights ({one_line(error, LONGEST_REASON)})",
            "for a gated model get access on its page and run `hf auth login`; otherwise try again, or use another revision",
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"{name}: the weights are not all in the local cache, and the hub cannot be reached",
            f"connect to the network, or run `hf download {name}` first",
        ) from error
