"""What is refused alike by the check of a plan and when it is loaded."""

from __future__ import annotations

import pytest

from minitron.errors import InputError
from minitron.models import check_contents, load_source


def refused_alike(source: str) -> InputError:
    """The error with which both ways refuse a model source."""
    errors = []
    for read in (check_contents, load_source):
        with pytest.raises(InputError) as refused:
            read(source)
        errors.append(refused.value)
    assert str(errors[0]) == str(errors[1])
    return errors[0]
