"""Where the models of a run come from: the teacher as the root of a tree, and its facts as text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from minitron import __version__
from minitron.storage import redact
from minitron_platform.recipes.build import text_sources
from minitron_platform.report.variants import Version
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.order import steps
from minitron_platform.stages.register import Register
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher
from minitron_platform.tracking.restarts import Restart

LIBRARIES = ("torch", "transformers", "ray", "mlflow", "lm_eval")


@dataclass
class Node:
    """A model of the tree."""

    title: str
    lines: list[str]
    children: list[Node] = field(default_factory=list)


def lineage(state: RunState, versions: Sequence[Version] = ()) -> Node:
    """The tree of the run's models. versions: the students with variants, and these."""
    teacher = state.output(Teacher)
    hashes = [f"{name} sha256 {value}" for name, value in teacher.sha256.items()]
    root = Node(state.recipe.teacher.model, [f"teacher · {teacher.summary}", *hashes])
    correct = state.output(Correct)
    origin = root
    if correct.corrected:
        origin = Node("corrected teacher", [correct.summary])
        root.children.append(origin)
    nodes: dict[str, Node] = {}
    for member in state.recipe.family:
        distilled = state.output(Distill, member)
        registered = state.output(Register, member)
        previous = state.recipe.origin(member)
        lines = [
            f"cut from {previous.model if previous else 'the teacher'} · {state.output(Calibrate, member).summary}",
            str(distilled.architecture),
            f"{distilled.summary} · {distilled.losses_chosen}",
            f"alias {registered.alias} · {distilled.student}",
        ]
        node = Node(registered.title, lines)
        (nodes[previous.model] if previous else origin).children.append(node)
        nodes[member.model] = node
    by_title = {node.title: node for node in nodes.values()}
    for each in versions:
        if each.kind:
            by_title[each.title] = Node(each.title, [each.made_from])
            by_title[each.parent].children.append(by_title[each.title])
    return root


def restarts(state: RunState) -> list[tuple[str, Restart]]:
    """All failures of the run's workers and trials, with the name of the stage."""
    known = []
    for stage, member in steps(state.recipe):
        name = stage.name + (f" {member.model}" if member and len(state.recipe.family) > 1 else "")
        known += [(name, restart) for restart in state.output(type(stage), member).restarts]
    return known


def facts(state: RunState) -> dict[str, str]:
    """What was run, on what data and where its records are."""
    data = state.output(Data)
    # Minitron itself is not installed where its code was sent with a job
    code = [f"minitron {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    sources = ", ".join(source.label for source in text_sources(state.recipe.data).values())
    return {
        "run": state.run_key,
        "text": f"{sources} · {data.summary} · training rows {data.train}",
        "correction": state.output(Correct).summary,
        "MLflow": f"{redact(state.locations.tracking_uri)} · experiment {state.recipe.experiment}",
        "storage": redact(state.locations.storage),
        "page written by": " · ".join([*code, f"Python {platform.python_version()}"]),
    }


def model_links(state: RunState) -> dict[str, str]:
    """Addresses of the registered versions in MLflow's web interface, if MLflow is a server."""
    uri = redact(state.locations.tracking_uri).rstrip("/")
    if not uri.startswith(("http://", "https://")):
        return {}
    outputs = [state.output(Register, member) for member in state.recipe.family]
    return {o.title: f"{uri}/#/models/{o.model}/versions/{o.version}" for o in outputs if o.is_final}
