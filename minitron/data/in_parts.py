"""Packing in parts, in any number of processes: parts of the sources are tokenised, then the shards of the rows are written.

In between, one call places the documents: it reads tables of their lengths and hashes, and decides which of them are in the
rows, and where. Every part and shard that is finished is kept if the work is interrupted. The rows are those of packing in one
go, whatever the number of processes and of interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minitron.data.compression import is_compressed
from minitron.data.merging import complete_index
from minitron.data.part_files import PartJob, PartTokens, tokenise_part
from minitron.data.part_placing import Finished, Placed, PlaceJob, place_parts
from minitron.data.parts import Part, source_parts
from minitron.data.placing import Layout
from minitron.data.shard_writing import ShardJob, publish_shards, write_shard
from minitron.data.tokenising import Tokenising
from minitron.storage import is_local, join, remove

TOKENS_PER_BYTE = 0.25  # of plain text, assumed until a part is finished
TOKENS_PER_PACKED_BYTE = 0.6  # of compressed text and parquet
SHARD_TOKENS = 2**24  # in a shard whose size is unknown
MARGIN = 1.02  # a blend rarely takes from each source exactly its share of the documents


class Run(Protocol):
    """Calls a function on (common, part) for each part and gives the results in order; `parts` is read lazily, when another
    part can be started. The calls may be made in other processes."""

    def __call__(self, function: Callable[[Any, Any], Any], common: Any, parts: Iterable[Any]) -> Iterator[Any]: ...


def in_this_process(function: Callable[[Any, Any], Any], common: Any, parts: Iterable[Any]) -> Iterator[Any]:
    """A `Run` that makes one call after the other."""
    return (function(common, part) for part in parts)


@dataclass(frozen=True)
class InParts:
    """folder: where finished parts and shards are kept until the rows are written, those of one target; all processes can reach
    it. run: makes the calls."""

    folder: str
    run: Run = in_this_process


class _Source:
    """The parts of one source, finished and to come."""

    def __init__(self, job: PartJob, tokens: float) -> None:
        self.job = job
        self.needed = tokens
        self.finished: list[PartTokens] = []
        self.ended = False
        self._parts = source_parts(job.how.source)
        self._waiting: list[Part] = []  # being tokenised
        self._sizes: list[int | None] = []  # of the finished parts

    @property
    def tokens(self) -> int:
        return sum(sum(part.tokens.values()) for part in self.finished)

    @property
    def enough(self) -> bool:
        return self.ended or self.tokens >= self.needed

    def wanted(self) -> Iterator[Part]:
        """Parts to tokenise, as long as those that are finished or under way seem too few."""
        while self.tokens + sum(map(self._estimate, self._waiting)) < self.needed and not self.ended:
            part = next(self._parts, None)
            if part is None:
                return
            self._waiting.append(part)
            yield part

    def finish(self, part: PartTokens) -> None:
        """Record the result of the first part that is under way."""
        self._sizes.append(self._waiting.pop(0).bytes)
        self.finished.append(part)
        self.ended = self.ended or part.failure is not None

    def _estimate(self, part: Part) -> float:
        """Tokens in a part that is not finished."""
        if part.bytes is None:
            return self.tokens / len(self.finished) if self.finished else SHARD_TOKENS
        known = sum(size or 0 for size in self._sizes)
        if known:
            return part.bytes * self.tokens / known
        packed = self.job.how.source.kind == "parquet" or any(is_compressed(path) for path, *_ in part.files)
        return part.bytes * (TOKENS_PER_PACKED_BYTE if packed else TOKENS_PER_BYTE)

    def tokenise(self, run: Run, progress: Callable[[], None]) -> None:
        """Tokenise parts until there are enough of them."""
        while not self.enough:
            before = len(self.finished)
            for part in run(tokenise_part, self.job, self.wanted()):
                self.finish(part)
                progress()
            self.ended = self.ended or len(self.finished) == before


def pack_in_parts(
    layout: Layout,
    hows: Sequence[Tokenising],
    heldout: Tokenising | None,
    tokenizer: str,
    target: str,
    in_parts: InParts,
    progress: Callable[[int, int], None] | None,
    before_commit: Callable[[], None],
) -> None:
    """Write the rows of `layout` into `target`.

    hows, heldout: how each source is tokenised, and the held-out text if that has a source of its own. tokenizer: its
    identity. progress: called with (tokens of finished parts, tokens wanted), then with (tokens in finished shards, in all).
    before_commit: called before the rows are committed.
    """
    wanted = _wanted_tokens(layout, hows)
    jobs = [PartJob.of(how, in_parts.folder, number, tokenizer) for number, how in enumerate(hows)]
    sources = [_Source(job, tokens) for job, tokens in zip(jobs, wanted, strict=True)]
    if heldout is not None:
        heldout_tokens = layout.rows["heldout"] * layout.seq_length
        sources.append(_Source(PartJob.of(heldout, in_parts.folder, len(hows), tokenizer), heldout_tokens))

    def report() -> None:
        if progress:
            done = sum(source.tokens for source in sources)
            progress(done, max(done, int(sum(source.needed for source in sources))))

    while True:
        for source in sources:
            source.tokenise(in_parts.run, report)
        finished = tuple(Finished(tuple(source.finished), source.ended) for source in sources)
        (placed,) = in_parts.run(place_parts, PlaceJob(layout, in_parts.folder), [finished])
        if isinstance(placed, Placed):
            break
        short = sources[placed.source]
        short.needed = max(short.needed, short.tokens) * 1.1 + 1
    _write_shards(layout, placed, target, in_parts, progress, before_commit)
    remove(in_parts.folder)


def _write_shards(
    layout: Layout,
    placed: Placed,
    target: str,
    in_parts: InParts,
    progress: Callable[[int, int], None] | None,
    before_commit: Callable[[], None],
) -> None:
    """Write all shards, and publish them."""
    # A local target does not exist until it is complete; of a remote one, nobody reads what its manifest does not name.
    rows = join(in_parts.folder, "rows") if is_local(target) else target
    job = ShardJob(in_parts.folder, rows, layout.dtype, layout.around.begin)
    shards = placed.shards(layout)
    total = sum(shard.bytes for shard in shards)
    entries: dict[str, Any] = {}
    for shard, entry in zip(shards, in_parts.run(write_shard, job, shards), strict=True):
        entries[shard.name] = entry
        if progress:
            done = sum(one["bytes"] for one in entries.values())
            progress(done // layout.dtype.itemsize, total // layout.dtype.itemsize)
    before_commit()
    publish_shards(rows, target, complete_index(placed.index, entries), entries)


def _wanted_tokens(layout: Layout, hows: Sequence[Tokenising]) -> list[float]:
    """Tokens of each source that will probably suffice."""
    fraction = hows[0].heldout_fraction
    shares = {"train": 1 - fraction, "heldout": fraction}
    total = max(layout.rows[split] * layout.seq_length / share for split, share in shares.items() if share)  # type: ignore[index]
    margin = MARGIN if len(hows) > 1 else 1
    return [total * margin * weight / sum(layout.weights) for weight in layout.weights]
