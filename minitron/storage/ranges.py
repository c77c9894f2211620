"""Byte ranges of files, checked on reading against the SHA-256 of the parts that a manifest lists.

A file's entry in a manifest may have `parts`: where each part ends, and its SHA-256. Whoever reads a range then reads and
checks the parts that it lies in, and not the rest of the file.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from minitron.errors import StorageError
from minitron.storage.addresses import filesystem, is_local, local_path
from minitron.storage.problems import access_errors, missing_errors

READERS = 4  # threads; of a request to an object store most is waiting
Buffer = bytes | bytearray | memoryview
NewBuffer = Callable[[int], bytearray | memoryview]
"""Makes a buffer of this number of bytes to read into."""
T = TypeVar("T")
R = TypeVar("R")


def read_ranges(path: str, ranges: Sequence[tuple[int, int]], new_buffer: NewBuffer = bytearray) -> list[Buffer]:
    """The bytes [start, end) of a file for each range, on object stores all requested at once; those of a local file are in
    what `new_buffer` returns.

    Raises StorageError for a file that is missing or shorter.
    """
    with access_errors(path), missing_errors(path, "delete its folder and run again"):
        data = _local(path, ranges, new_buffer) if is_local(path) else _remote(path, ranges)
    for (start, end), value in zip(ranges, data, strict=True):
        if len(value) != end - start:
            raise StorageError(f"{path}: ends before byte {end}, which was written", "delete its folder and run again")
    return data


def _local(path: str, ranges: Sequence[tuple[int, int]], new_buffer: NewBuffer) -> list[Buffer]:
    result: list[Buffer] = []
    with open(local_path(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for start, end in ranges:
            data = new_buffer(max(0, min(end, size) - start))
            done = 0
            while done < len(data) and (count := os.preadv(file.fileno(), [memoryview(data)[done:]], start + done)):
                done += count
            result.append(data)
    return result


def _remote(path: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
    fs, inner = filesystem(path)
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    return list(fs.cat_ranges([inner] * len(ranges), starts, ends, on_error="raise"))


def read_checked(
    path: str, entry: Mapping[str, Any], ranges: Sequence[tuple[int, int]], new_buffer: NewBuffer = bytearray
) -> list[Buffer]:
    """As `read_ranges`, with the parts of these ranges checked. entry: the file's in its manifest; without parts nothing is
    checked.

    Raises StorageError naming a part that is altered.
    """
    if not entry.get("parts"):
        return read_ranges(path, ranges, new_buffer)
    parts = [parts_of(entry, start, end) for start, end in ranges]
    wide = [(_start(entry, numbers[0]), entry["parts"]["ends"][numbers[-1]]) for numbers in parts]
    result: list[Buffer] = []
    read = read_ranges(path, wide, new_buffer)
    for (start, end), (begin, _), numbers, data in zip(ranges, wide, parts, read, strict=True):
        view = memoryview(data)
        for number in numbers:
            first, last = _start(entry, number), entry["parts"]["ends"][number]
            _check(path, entry, number, view[first - begin : last - begin])
        result.append(data if len(data) == end - start else bytearray(view[start - begin : end - begin]))
    return result


def check_part(path: str, entry: Mapping[str, Any], number: int) -> None:
    """Raise StorageError if this part of a file is missing or altered."""
    [data] = read_ranges(path, [(_start(entry, number), entry["parts"]["ends"][number])])
    _check(path, entry, number, data)


def parts_of(entry: Mapping[str, Any], start: int, end: int) -> range:
    """The numbers of the parts that [start, end) lies in."""
    ends = entry["parts"]["ends"]
    return range(bisect_right(ends, start), bisect_right(ends, max(start, end - 1)) + 1)


def read_ahead(work: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
    """`work` of each item, in order, run in threads a few items ahead of whoever takes the results.

    Whoever does not take all of them closes the generator: it waits for its threads, which must not happen when the garbage
    collector comes to it, for example while another thread is being started.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as pool:
        pending = []
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > READERS:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def _start(entry: Mapping[str, Any], number: int) -> int:
    return int(entry["parts"]["ends"][number - 1]) if number else 0


def _check(path: str, entry: Mapping[str, Any], number: int, data: Buffer) -> None:
    actual, expected = hashlib.sha256(data).hexdigest(), entry["parts"]["sha256"][number]
    if actual != expected:
        raise StorageError(
            f"{path}: SHA-256 of bytes {_start(entry, number)} to {entry['parts']['ends'][number]} is {actual}, "
            f"expected {expected}",
            "delete its folder and run again",
        )


def check_entry(entry: Any) -> None:
    """Raise ValueError, TypeError or KeyError for what cannot be a file's entry in a manifest."""
    size, parts = entry["bytes"], entry.get("parts")
    if type(size) is not int or size < 0 or not _is_sha256(entry["sha256"]):
        raise ValueError("bytes or sha256")
    if parts is None:
        return
    ends, hashes = parts["ends"], parts["sha256"]
    ascending = all(type(end) is int for end in ends) and ends == sorted(set(ends))
    if not ends or not ascending or ends[0] <= 0 or ends[-1] != size:
        raise ValueError("parts")
    if len(hashes) != len(ends) or not all(map(_is_sha256, hashes)):
        raise ValueError("parts")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64
