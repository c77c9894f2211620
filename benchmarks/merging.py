"""What comes after tokenising, in processor time: placing documents, writing shards, and going on after an interruption.

    python -m benchmarks.merging [--megabytes 100] [--rounds 3]

The text is that of `benchmarks.tokenising`, in two files of JSON lines. It is tokenised once for each layout; the finished
parts are put back for every round. All calls are made in one process with one thread. Every round is made twice: in one go, and
stopped when half of the shards are written, then continued.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.materials import MODEL
from benchmarks.measure import machine, markdown, spread
from benchmarks.tokenising import rows_of_text, write_text
from minitron.data import InParts, TextSource, pack, parts
from minitron.data.in_parts import tokenise_part
from minitron.data.part_placing import place_parts
from minitron.data.shard_writing import write_shard
from minitron.models import source_tokenizer

TOKENS_PER_ROW = 4096
SHARD_ROWS = 256  # 8192 in a run
HELDOUT_ROWS = 20
PLACE, WRITE = place_parts.__name__, write_shard.__name__


class Stopped(Exception):
    pass


class Round:
    """Makes the calls of a packing here, and adds up the processor time by function.

    kept: where finished parts are copied to when the first call of another function comes. stop: number of shards after which
    it raises Stopped.
    """

    def __init__(self, folder: Path, kept: Path, stop: int | None = None) -> None:
        self.folder, self.kept, self.stop = folder, kept, stop
        self.seconds: dict[str, float] = defaultdict(float)

    def run(self, function: Callable[[Any, Any], Any], common: Any, jobs: Iterable[Any]) -> Iterator[Any]:
        if function is not tokenise_part and not self.kept.exists():
            shutil.copytree(self.folder, self.kept)
        for number, job in enumerate(jobs):
            if function is write_shard and number == self.stop:
                raise Stopped
            started = time.process_time()
            result = function(common, job)
            self.seconds[function.__name__] += time.process_time() - started
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, default=100, help="of text")
    parser.add_argument("--rounds", type=int, default=3, help="of each layout")
    given = parser.parse_args()
    parts.PART_BYTES = 8 * 2**20
    tokenizer = source_tokenizer(MODEL)
    columns = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, size in (("a", given.megabytes * 3 // 4), ("b", given.megabytes // 4)):
            (folder / file).mkdir()
            write_text(folder / file, size * 10**6)
        a, b = (TextSource("jsonl", str(folder / file / "text.jsonl"), weight=w) for file, w in (("a", 3), ("b", 1)))
        rows = rows_of_text(folder / "a" / "text.jsonl", tokenizer)
        sizes = {
            "seq_length": TOKENS_PER_ROW,
            "train_rows": rows,
            "heldout_rows": HELDOUT_ROWS,
            "shard_rows": SHARD_ROWS,
        }
        tokens = (rows + HELDOUT_ROWS) * TOKENS_PER_ROW
        for layout, sources, options in (
            ("one source", [a], {}),
            ("one source, with BOS", [a], {"add_bos": True}),
            ("two sources", [a, b], {}),
        ):
            took = defaultdict(list)
            documents = 0
            working, kept = folder / "parts", folder / "kept"

            def packed(this: Round, target: Path, sources: Any = sources, options: Any = options) -> Any:
                in_parts = InParts(str(working), this.run)  # noqa: B023
                return pack(sources, tokenizer, str(target), in_parts=in_parts, **sizes, **options)

            first = packed(Round(working, kept), folder / "first")
            documents = sum(sum(one.documents.values()) for one in first.sources)
            for _ in range(given.rounds):
                shutil.copytree(kept, working)
                whole = Round(working, kept)
                assert packed(whole, folder / "rows").fingerprint == first.fingerprint
                shutil.rmtree(folder / "rows")
                shutil.copytree(kept, working)
                with suppress(Stopped):
                    packed(Round(working, kept, stop=(rows // SHARD_ROWS) // 2), folder / "rows")
                again = Round(working, kept)
                assert packed(again, folder / "rows").fingerprint == first.fingerprint
                shutil.rmtree(folder / "rows")
                for seconds, key in ((whole, ""), (again, " again")):
                    for function in (PLACE, WRITE):
                        took[function + key].append(seconds.seconds[function])
            shutil.rmtree(kept)
            shutil.rmtree(folder / "first")
            columns.append(
                {
                    "": layout,
                    "placing, s": spread(took[PLACE], 3),
                    "million documents/s": spread([documents / each / 1e6 for each in took[PLACE]], 2),
                    "million tokens/s": spread([tokens / each / 1e6 for each in took[PLACE]], 0),
                    "writing shards, s": spread(took[WRITE], 3),
                    "million tokens/s on one CPU": spread([tokens / each / 1e6 for each in took[WRITE]], 0),
                    "continued: placing, s": spread(took[PLACE + " again"], 3),
                    "continued: writing shards, s": spread(took[WRITE + " again"], 3),
                }
            )
    print(f"{machine()}; {tokens:,} tokens in about {documents:,} documents, shards of {SHARD_ROWS} rows\n")
    print("\n".join(markdown("Processor time, median (lowest to highest)", list(columns[0]), columns)))


if __name__ == "__main__":
    main()
