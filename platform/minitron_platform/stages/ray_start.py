"""Ray for a run: a private Ray starts in the background while the stages before the search compute.

Ray is imported with its start: a run whose stages are all finished needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import TracebackType

import torch
from rich.markup import escape

from minitron.device import DTYPES, compute_dtype
from minitron_platform.cluster.room import (
    check_cluster,
    cluster_cpu_dtype,
    cluster_nodes,
    joins_cluster,
    private_node,
    resources_here,
    resources_of_cluster,
    room_text,
    starting_text,
)
from minitron_platform.recipes.resources import ResolvedResources, gpu_warnings
from minitron_platform.stages.context import Context
from minitron_platform.stages.teacher import Teacher
from minitron_search.memory import release_memory
from minitron_search.nodes import present_nodes


class RayStart:
    """Ray until `stack` closes: the cluster at `address`, or a private Ray on this machine.

    logs: folder that gets the output of the private Ray's workers if the run fails. joined: called with HOST:PORT of the
    cluster's head when this process has joined it.
    """

    def __init__(self, stack: ExitStack, address: str | None, logs: str, joined: Callable[[str], None]) -> None:
        self.stack, self.address, self.logs, self.joined = stack, address, logs, joined
        self.resources: ResolvedResources | None = None
        self.private: _PrivateRay | None = None

    def computes_here(self) -> bool:
        """Whether this process computes with models where one process is enough: it is on the machine that has all devices, and
        there is at most one GPU."""
        return not joins_cluster(self.address) and torch.cuda.device_count() <= 1

    def choose_devices(self, context: Context) -> None:
        """Tell the run on what its models compute, where the recipe leaves to that what they compute.

        On a cluster it is what the nodes have that trials and workers run on, whatever this machine has. Joins the cluster to
        know.
        """
        recipe = context.recipe
        if not joins_cluster(self.address) or "auto" not in (recipe.teacher.dtype, recipe.data.separate_documents):
            return
        context.on_gpus = self.need(context).uses_gpus
        if recipe.teacher.dtype == "auto":
            context.auto_dtype = self._cluster_dtype(context, context.on_gpus)

    def _cluster_dtype(self, context: Context, on_gpus: bool) -> torch.dtype:
        """The dtype for `teacher.dtype: auto`; says so if it is not that of this machine."""
        dtype = torch.bfloat16 if on_gpus else cluster_cpu_dtype()
        if dtype != compute_dtype():
            devices = "GPUs compute" if on_gpus else "CPUs compute"
            context.console.say(
                f"  dtype: {str(dtype).removeprefix('torch.')}, because the cluster's {devices}; this machine's own would be "
                f"{str(compute_dtype()).removeprefix('torch.')}"
            )
        return dtype

    def ahead(self, context: Context) -> None:
        """Begin to start a private Ray without waiting for it. The teacher stage must be finished."""
        if self.private is None and not joins_cluster(self.address):
            self.private = _PrivateRay(self._here(context), self.address, self.logs)
            self.stack.push(self.private.end)

    def need(self, context: Context) -> ResolvedResources:
        """Wait until Ray runs; returns the resources of trials and workers there.

        Raises InputError if the machine or the cluster does not have these resources.
        """
        release_memory()  # workers share this process's GPU, and the stage so far may have left memory reserved
        if self.resources is not None:
            return self.resources
        if joins_cluster(self.address):
            from minitron_platform.cluster.ray_session import head_address, ray_session

            context.console.status("joining the cluster")
            self.stack.enter_context(ray_session(self.address, keep_logs=self.logs))
            self.joined(head_address(self.address))
            self.resources = resources_of_cluster(context.recipe)
            check_cluster(self.resources)
            self._report_cluster(context, self.resources)
        else:
            self.ahead(context)
            assert self.private
            context.console.status("starting Ray")
            self.private.wait()
            self.resources = self._here(context)
            check_cluster(self.resources)
        return self.resources

    def _report_cluster(self, context: Context, resources: ResolvedResources) -> None:
        """Print the resources of trials and workers, and warnings about the cluster's GPUs."""
        nodes = cluster_nodes()
        context.console.say(f"  resources: {room_text(resources, nodes)}{starting_text(nodes, present_nodes())}")
        # auto means bfloat16 on GPUs
        dtype = torch.float32 if context.recipe.teacher.dtype == "float32" else torch.bfloat16
        for warning in gpu_warnings(context.recipe, resources, nodes, dtype):
            context.console.say(f"  [yellow]{escape(warning)}[/]")

    def _here(self, context: Context) -> ResolvedResources:
        teacher = context.output(Teacher)
        return resources_here(context.recipe, teacher.architecture, DTYPES[teacher.dtype].itemsize)


class _RunFailedError(Exception):
    """Makes the session of a private Ray keep its logs."""


class _PrivateRay:
    """A private Ray that lives in a thread of its own, because the kernel ends Ray's processes with the thread that started
    them.

    Ray offers the memory that is free now, before the next stages load their models.
    """

    def __init__(self, resources: ResolvedResources, address: str | None, logs: str) -> None:
        from ray._private.utils import estimate_available_memory, resolve_object_store_memory

        from minitron_platform.cluster.ray_session import ray_session

        node = private_node(resources)
        free_memory = estimate_available_memory()
        object_store_memory = resolve_object_store_memory(free_memory)
        self.session = ray_session(
            address,
            num_cpus=int(node["CPU"]),
            num_gpus=int(node["GPU"]),
            memory=free_memory - object_store_memory,
            object_store_memory=object_store_memory,
            seats=resources.workers,
            keep_logs=logs,
        )
        self.started = threading.Event()
        self.ending = threading.Event()
        self.run_failed = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self.session_ended = self.thread.submit(self._hold_session)
        self.session_ended.add_done_callback(lambda _: self.started.set())

    def wait(self) -> None:
        """Wait until Ray runs. Raises the error that has kept it from starting."""
        self.started.wait()
        if self.session_ended.done():
            self.session_ended.result()

    def end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop Ray; an exit callback of the stack."""
        self.run_failed = error is not None
        self.ending.set()
        self.thread.shutdown()

    def _hold_session(self) -> None:
        """Keep Ray running until `end` is called."""
        with suppress(_RunFailedError), self.session:
            self.started.set()
            self.ending.wait()
            if self.run_failed:
                raise _RunFailedError
