"""The object store of the runs: its server, the request that it holds, and what was written to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import s3fs

from benchmarks.kills.gated_s3 import GATE, HELD, LOG


@dataclass(frozen=True)
class Write:
    """A finished request that changed an object."""

    at: float
    """Seconds since the epoch."""
    request: str
    """Method and path."""


class GatedStorage:
    """A server with its files in `folder`. variables: environment that directs s3:// addresses to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        command = [sys.executable, "-m", "benchmarks.kills.gated_s3", str(folder)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        port = self.server.stdout.readline().strip()
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        s3fs.S3FileSystem.clear_instance_cache()
        self.files = s3fs.S3FileSystem(
            key="test",
            secret="test",
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
        )

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(30)

    def hold_next(self, pattern: str, *, stored: bool) -> None:
        """Hold the next request that matches `pattern`, before it is carried out or, if `stored`, before it is answered."""
        text = json.dumps({"pattern": pattern, "stored": stored})
        (self.folder / "new.json").write_text(text)
        (self.folder / "new.json").replace(self.folder / GATE)

    @property
    def is_holding(self) -> bool:
        return (self.folder / HELD).exists()

    @property
    def holder_port(self) -> int:
        """Port from which the held request came."""
        return int((self.folder / HELD).read_text())

    def go_on(self) -> None:
        """Let the held request go on."""
        (self.folder / HELD).unlink(missing_ok=True)
        (self.folder / GATE).unlink(missing_ok=True)

    def writes(self, bucket: str) -> list[Write]:
        """All finished writes to a bucket, in order."""
        lines = (self.folder / LOG).read_text().splitlines() if (self.folder / LOG).exists() else []
        entries = [json.loads(line) for line in lines]
        return [Write(at, request) for at, request, _ in entries if f" /{bucket}/" in request]


def wait_for(condition: object, what: str, seconds: float = 600) -> None:
    """Wait until `condition()` is true. Raises TimeoutError."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.05)
