"""Whether the nodes of a cluster that is still to be started have the main memory for a recipe."""

from __future__ import annotations

from minitron.device import compute_dtype
from minitron.errors import InputError, StorageError
from minitron.models import source_architecture
from minitron_platform.cluster.room import trials_at_once
from minitron_platform.estimates.node_memory import GpuNode
from minitron_platform.estimates.outlook import Outlook
from minitron_platform.planning.cluster import Cluster
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.schema import Recipe
from minitron_platform.stages.order import steps


def missing_memory(recipe: Recipe, cluster: Cluster, memory: int) -> InputError | None:
    """The error with which `plan` refuses the stage that needs most main memory of a node of `cluster`, if that is more than
    `memory` bytes. It is not known here which stages are finished, whose memory does not matter. None also if this machine
    cannot read the teacher."""
    try:
        teacher, _ = source_architecture(recipe.teacher.model, recipe.teacher.revision)
    except (InputError, StorageError):  # it may be on the nodes; who submits the recipe or runs it is told
        return None
    resources = cluster.resources(recipe)
    value_bytes = compute_dtype("bfloat16" if recipe.teacher.dtype == "auto" else recipe.teacher.dtype).itemsize
    outlook = Outlook.of(
        recipe,
        teacher,
        resources,
        family=family_candidates(recipe, teacher),
        value_bytes=value_bytes,
        concurrent_trials=trials_at_once(resources, cluster.node_list),
    )
    most = 0
    refusal = None
    node = GpuNode(cluster.gpus_per_node, memory)
    for stage, member in steps(recipe):
        work = stage.estimate(outlook, member).node
        if work is None or work.fits_on([node]) or work.on(node.gpus).total <= most:
            continue
        most = work.on(node.gpus).total
        try:
            work.check(f"{stage.name} of {member.model}" if member else stage.name, [node])
        except InputError as error:
            refusal = error
    return refusal
