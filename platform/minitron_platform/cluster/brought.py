"""What a job installs on a cluster's nodes with uv, beside the packages that they have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minitron_platform.cluster.requirements import Environment

# uv takes a package out of what it resolves if an override says that the package is for another platform.
NOWHERE = "sys_platform == 'nowhere'"
OVERRIDES = "packages-of-the-node.txt"  # in the working directory that is sent with the job


@dataclass(frozen=True)
class Brought:
    """The packages that a job brings.

    uv resolves them on the node, because a package can need others on another platform: torch needs the CUDA libraries on a
    node with GPUs, not on the laptop that submits. What the node has is left out, as uv would install it a second time.
    """

    packages: tuple[str, ...] = ()
    """Requirements such as "rich==14.2.0"."""
    kept: tuple[str, ...] = ()
    """Normalised names of the packages that the node has and keeps."""

    @classmethod
    def beside(cls, there: Environment, packages: Iterable[str]) -> Brought:
        """`packages`, and of `there` all others."""
        packages = tuple(packages)
        names = {canonicalize_name(Requirement(package).name) for package in packages}
        return cls(packages, tuple(sorted({canonicalize_name(name) for name in there.packages} - names)))

    def runtime_env(self, working_dir: Path) -> dict[str, Any]:
        """The part of Ray's runtime environment that installs them; writes a file that it needs to the job's `working_dir`."""
        if not self.packages:
            return {}
        (working_dir / OVERRIDES).write_text("".join(f"{name}; {NOWHERE}\n" for name in self.kept))
        overrides = f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{OVERRIDES}"
        return {"uv": {"packages": list(self.packages), "uv_pip_install_options": ["--override", overrides]}}
