"""Templates in `clusters/` into files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron.errors import InputError, StorageError
from minitron_platform.shipped_files import data_folder

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process without GPUs sees none
}


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template. template: its path in `clusters/`, such as "kuberay/cluster.yaml.j2".

    `ray_version` is that of the Ray installed here, which client, head and workers must have in common. The filter `quoted`
    writes a value as YAML and JSON do, `shell` as one word of a shell command.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("clusters")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["shell"] = shlex.quote
    return environment.get_template(template).render(ray_version=version("ray"), **values)


def write(files: Mapping[str, str], folder: str) -> list[Path]:
    """Write texts by file name into `folder`, which is created; returns their paths.

    Raises InputError if one of them exists with another content, which the user may have written, and StorageError if they
    cannot be written.
    """
    paths = [Path(folder, name) for name in files]
    try:
        for path, text in zip(paths, files.values(), strict=True):
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise InputError(f"--out {folder}: {path.name} exists and differs", "give another folder, or remove it")
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text, encoding="utf-8")
            if text.startswith("#!"):
                path.chmod(0o755)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--out {folder}: {error}", "give a folder that you may write to") from error
    return paths
