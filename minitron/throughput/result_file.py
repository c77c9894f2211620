"""The file that `minitron throughput --out` writes. Its JSON schema is `results.schema.json`, in this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron import __version__
from minitron.throughput.measure import Throughput

FORMAT = 1
SCHEMA = Path(__file__).resolve().parent / "results.schema.json"


def results_json(results: Sequence[Throughput], *, device: str, dtype: str) -> dict[str, Any]:
    """The content of the file. device, dtype: of models that this process or vLLM loaded, not of servers."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"minitron": __version__, **{name: version(name) for name in ("transformers", "torch")}},
        "device": device,
        "dtype": dtype,
        "results": [asdict(each) for each in results],
    }
