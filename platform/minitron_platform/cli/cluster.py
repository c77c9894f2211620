"""The command `minitron cluster`: starts Ray clusters."""

from __future__ import annotations

import click

from minitron.errors import InputError
from minitron_platform.cli.cluster_render import render
from minitron_platform.console import echo


@click.group()
def cluster() -> None:
    """Start Ray clusters.

    `render` writes the files that start one at a cloud or under a scheduler. `launch` is Ray for one command on the nodes of a
    job; the files for Slurm and SkyPilot call it.
    """


cluster.add_command(render)


@cluster.command(context_settings={"allow_interspersed_args": False})  # options behind COMMAND are its own
@click.option("--nodes", type=click.IntRange(1), required=True, metavar="N", help="Number of nodes.")
@click.option(
    "--rank", type=click.IntRange(0), required=True, metavar="N", help="0 on one node, 1 or more on the others."
)
@click.option("--head", required=True, metavar="HOST", help="Name or address of the node with rank 0.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=6379,
    show_default=True,
    metavar="N",
    help="Of Ray's head; must be free.",
)
@click.option("--cpus", type=click.IntRange(0), metavar="N", help="CPUs of this node for Ray. [default: all]")
@click.option("--gpus", type=click.IntRange(0), metavar="N", help="GPUs of this node for Ray. [default: all]")
@click.option(
    "--notice",
    type=click.FloatRange(0),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="From SIGUSR1 until the end.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=900,
    show_default=True,
    metavar="SECONDS",
    help="For all nodes to join.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def launch(
    nodes: int,
    rank: int,
    head: str,
    port: int,
    cpus: int | None,
    gpus: int | None,
    notice: float,
    timeout: float,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with a Ray of all nodes of a job. Call it once on every node.

    Rank 0 runs a head without GPUs, a worker and COMMAND, whose exit code it has; the others run a worker until the head ends.
    Each stops exactly the processes that it has started. The nodes need the same RAY_AUTH_TOKEN. At SIGUSR1 to rank 0,
    trainings save a checkpoint, COMMAND ends after at most --notice seconds, and the exit code is 75.
    """
    from minitron_platform.cluster.launch import JobNode
    from minitron_platform.cluster.launch import launch as launch_command

    if rank >= nodes:
        raise InputError(
            f"--rank {rank} of --nodes {nodes}: the nodes have the ranks 0 to {nodes - 1}", "correct one of them"
        )
    if rank == 0 and not command:
        raise InputError("--rank 0 without a command", "give it behind --")
    node = JobNode(rank=rank, nodes=nodes, head=head, port=port, cpus=cpus, gpus=gpus)
    code = launch_command(command, node, notice=notice, timeout=timeout, say=lambda line: echo(line, err=True))
    raise SystemExit(code)
