"""The packages that Minitron needs, and which of them an environment lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from minitron.errors import InputError
from minitron.storage.addresses import EXTRAS as STORAGE_EXTRAS

PROJECT = "minitron"
EXTRAS = {**STORAGE_EXTRAS, "postgresql+psycopg": "postgres"}  # by the scheme of an address


@dataclass(frozen=True)
class Environment:
    """A Python and its packages, such as `minitron_platform.cluster.probe` reports it."""

    python: str
    packages: Mapping[str, str]
    """Versions by normalised name."""
    nodes: Sequence[Mapping[str, float]] = ()
    """Resources of the cluster's nodes, and of those that it may start; empty if they are not known."""

    @classmethod
    def read(cls, value: Any) -> Environment:
        """From the probe's JSON. Raises InputError for anything else."""
        if not (isinstance(value, dict) and isinstance(value.get("packages"), dict)):
            raise InputError("the check of the cluster's environment has not printed one", "see the job's log")
        packages = {str(name): str(each) for name, each in value["packages"].items()}
        return cls(str(value.get("python")), packages, value.get("nodes") or ())


@dataclass(frozen=True)
class Lack:
    """A package that an environment does not have, or not in a version that is needed."""

    name: str
    needed: str
    """The versions that would do, such as ">=14.2"; empty for any."""
    installed: str | None

    def __str__(self) -> str:
        needed = f", {self.needed} is needed" if self.needed else ""
        return f"{self.name} {self.installed or 'is missing'}{needed}"


def extras_for(addresses: Iterable[str]) -> list[str]:
    """The extras of Minitron for storages and databases at these addresses."""
    schemes = {address.partition("://")[0] for address in addresses if "://" in address}
    return sorted({EXTRAS[scheme] for scheme in schemes if scheme in EXTRAS})


def lacks(there: Environment, extras: Iterable[str] = ()) -> list[Lack]:
    """What `there` lacks of Minitron's requirements, with those of its `extras`."""
    return [lack for requirement in _requirements(PROJECT, extras) if (lack := _lack(requirement, there))]


def direct_requirements() -> list[str]:
    """The normalised names of the packages that Minitron itself needs."""
    return sorted({canonicalize_name(requirement.name) for requirement in _requirements(PROJECT)})


def python_lack(there: Environment) -> str:
    """The versions of Python that Minitron needs, if `there` has another one; empty otherwise."""
    needed = SpecifierSet(str(metadata(PROJECT).json.get("requires_python", "")))
    return "" if needed.contains(there.python, prereleases=True) else ",".join(sorted(map(str, needed), reverse=True))


def pins(missing: Iterable[Lack], there: Environment) -> list[str]:
    """Requirements that bring the missing packages and what they need in turn, in the versions that this machine has, such as
    "rich==14.2.0". Packages that `there` has in a version that will do are not among them.

    Raises InputError for a missing package that this machine does not have either, and for Ray.
    """
    chosen: dict[str, str] = {}
    waiting = [Requirement(lack.name) for lack in missing]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in chosen:
            continue
        if name == "ray":
            raise InputError(
                f"the cluster's Ray is {there.packages.get('ray')}, and a job cannot bring another one",
                f"start the cluster with Ray {version('ray')}, as on this machine",
            )
        try:
            here = version(name)
        except PackageNotFoundError:
            raise InputError(
                f"{name} is missing on the cluster, and on this machine too",
                f"install it here ({PROJECT}'s extras are in pyproject.toml), so that its version is known",
            ) from None
        chosen[name] = here.split("+")[0]  # not the local part of a build, such as +cpu
        waiting += [each for each in _requirements(name, requirement.extras) if _lack(each, there)]
    return [f"{name}=={chosen[name]}" for name in sorted(chosen)]


def _requirements(package: str, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """What an installed package needs on this platform, with those of its `extras`."""
    extras = list(extras)
    for text in requires(package) or ():
        requirement = Requirement(re.sub(r"\s*#.*", "", text))
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            yield requirement


def _lack(requirement: Requirement, there: Environment) -> Lack | None:
    name = canonicalize_name(requirement.name)
    installed = there.packages.get(name)
    if installed is not None and requirement.specifier.contains(installed, prereleases=True):
        return None
    return Lack(name, str(requirement.specifier), installed)
