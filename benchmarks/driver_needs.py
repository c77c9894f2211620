"""What the run's own process needs on a head that has no resources: its memory, and what it reads from the storage.

    python -m benchmarks.driver_needs

starts a cluster on this machine, a head without CPUs and two nodes with one CPU each, and an S3 server; uploads the tests'
small teacher, text and benchmark there; and runs their recipe from a home folder of its own. It prints the largest resident
memory of the process that runs `minitron_platform.run`, before it begins and in all, how many bytes it has received from the
storage, and how many bytes of weights the storage has in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from benchmarks.kills.nodes import ROOT, Machines
from benchmarks.kills.storage import GatedStorage


def peak() -> int:
    """Largest resident memory of this process so far in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drive(recipe: str, address: str, tracking_uri: str) -> None:
    """Run the recipe in this process, and print what that needed as a line of JSON."""
    import ray  # noqa: F401
    import s3fs

    from minitron_platform import load_recipe, run

    received: dict[str, int] = {}
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        answer = await call(self, method, *arguments, **options)
        if method == "get_object":
            kind = "weights" if str(options.get("Key", arguments)).count(".safetensors") else "other"
            received[kind] = received.get(kind, 0) + int(answer["ContentLength"])
        return answer

    s3fs.S3FileSystem._call_s3 = counted
    before = peak()
    run(load_recipe(recipe), storage_path="s3://bucket/m", tracking_uri=tracking_uri, address=address)
    print(json.dumps({"before": before, "peak": peak(), "received": received}))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.driver_needs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(*given.drive)
        return
    from helpers import tiny

    from minitron_platform import load_recipe
    from minitron_platform.recipes.load import recipe_yaml
    from minitron_platform.uploads import with_uploads

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ["OMP_NUM_THREADS"] = "1"
        (folder / "inputs").mkdir()
        tiny.bench(folder / "inputs")
        storage = GatedStorage(folder / "s3")
        machines = Machines(folder, storage.variables)
        try:
            storage.files.mkdir("bucket")
            os.environ.update(storage.variables)
            recipe = load_recipe(str(folder / "inputs/recipe.yaml"), ["resources.workers=2"])
            (folder / "recipe.yaml").write_text(recipe_yaml(with_uploads(recipe, "s3://bucket/m", print)))
            machines.start()
            arguments = [str(folder / "recipe.yaml"), machines.address, f"sqlite:///{folder}/mlflow.db"]
            result = subprocess.run(
                [sys.executable, "-m", "benchmarks.driver_needs", "--drive", *arguments],
                cwd=ROOT,
                env=machines.environment("driver"),
                stdout=subprocess.PIPE,
                text=True,
            )
            print(result.stdout)
            result.check_returncode()
            needs = json.loads(result.stdout.splitlines()[-1])
            stored = storage.files.find("bucket", detail=True)
            weights = sum(info["size"] for path, info in stored.items() if path.endswith(".safetensors"))
            print(
                f"memory: {needs['before'] / 1e6:,.0f} MB before the run, at most {needs['peak'] / 1e6:,.0f} MB in it"
            )
            print(f"received: {needs['received']} bytes; weights stored: {weights:,} bytes")
        finally:
            machines.close()
            storage.close()


if __name__ == "__main__":
    main()
