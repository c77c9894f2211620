"""A store of rows on disk: `shard-00000`, ... with a fixed number of rows each, committed one by one, and an index that
completes the folder.

A row's number gives its shard and its position there, so any process reads any row, in any order and at any batch size.
Some rows may be all that is stored; they keep their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minitron import storage
from minitron.errors import StorageError

FILE = "rows.safetensors"
INDEX = "index.json"
ROWS_PER_SHARD = 64  # in stores written before the manifests of shards had the number of rows
_COMMITTED = re.compile(rf"shard-(\d{{5,}})/{re.escape(storage.MANIFEST)}")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def shard_folder(folder: str, number: int) -> str:
    return storage.join(folder, shard_name(number))


def committed_shards(files: Iterable[str]) -> set[int]:
    """The numbers of the shards with a manifest among the names of a folder's files."""
    return {int(match[1]) for name in files if (match := _COMMITTED.fullmatch(name))}


def key_of_rows(key: str, numbers: Sequence[int] | None) -> str:
    """The key with which rows are stored, so that shards of other rows are never mixed in."""
    return key if numbers is None else f"{key}-{storage.fingerprint(list(numbers))}"


def check_key(folder: str, stored: Any, key: str) -> None:
    """Raise StorageError if what is in the folder was not stored under `key`."""
    if stored != key:
        raise StorageError(f"{folder}: holds the store {stored}, not {key}", f"delete {folder} and run again")


@dataclass(frozen=True)
class Index:
    """What completes a store. numbers: of the rows that are stored, ascending; None if they are 0 to num_rows - 1."""

    key: str
    num_rows: int
    rows_per_shard: int
    numbers: list[int] | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of_shard(self, number: int) -> int:
        return min(self.rows_per_shard, self.num_rows - number * self.rows_per_shard)

    def rows_of(self, shards: Iterable[int]) -> int:
        return sum(map(self.rows_of_shard, shards))

    def write(self, folder: str) -> None:
        value = {"key": self.key, "num_rows": self.num_rows, "rows_per_shard": self.rows_per_shard}
        chosen = {} if self.numbers is None else {"numbers": self.numbers}
        storage.write_json(storage.join(folder, INDEX), {**value, **chosen})

    @classmethod
    def read(cls, folder: str) -> Index:
        """Raises StorageError for a store that is not complete, and for a file that is not an index."""
        path = storage.join(folder, INDEX)
        value = storage.read_json_if_exists(path)
        if value is None:
            raise StorageError(f"{folder}: not completely written", "run what writes it again; it resumes where it was")
        try:
            index = cls(value["key"], value["num_rows"], value["rows_per_shard"], value.get("numbers"))
            counts = index.num_rows, index.rows_per_shard
            if type(index.key) is not str or any(type(count) is not int or count < 1 for count in counts):
                raise ValueError(f"{index.key!r}, {counts}")
            if index.numbers is not None and not _are_row_numbers(index.numbers, index.num_rows):
                raise ValueError("numbers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{path}: not the index of a store ({error!r})", f"delete {path} and run what writes it again"
            ) from error
        return index


def _are_row_numbers(numbers: Any, count: int) -> bool:
    if not isinstance(numbers, list) or len(numbers) != count or any(type(number) is not int for number in numbers):
        return False
    return numbers[0] >= 0 and all(one < other for one, other in zip(numbers, numbers[1:], strict=False))
