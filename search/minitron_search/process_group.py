"""The process group of Ray Train's workers, which listens no wider than it must.

torch.distributed's store, where the processes find each other, asks for no password, and by itself listens on all network
interfaces of the first worker's node. Here it listens on the loopback interface if all workers are on one node, and so do the
connections for gradients unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is set; else at that node's address in the cluster.

Ray Train's controller reads this module, and has no use for torch, whose import takes a second.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.util import TrainingFramework

from minitron.garbage import collector_off
from minitron_search.worker_imports import import_libraries

LOOPBACK = "127.0.0.1"
TIMEOUT_SECONDS = 1800.0  # of an operation of the group
_listening: list[socket.socket] = []  # of the first worker, from `listen` to `join`


class ProcessGroupConfig(BackendConfig):
    """Ray Train's configuration of the process group, with NCCL on GPUs and Gloo on CPUs."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    @property
    def train_func_context(self) -> type:
        """What the workers' function runs in: it chooses the process's GPU. For the driver and the workers."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_import_libraries)
        on_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        addresses = worker_group.execute(ray.util.get_node_ip_address)
        address = LOOPBACK if len(set(addresses)) == 1 else addresses[0]
        port = worker_group.execute_single(0, listen, address)
        worker_group.execute(_set_rank_variables)
        joins = [
            worker_group.execute_single_async(
                rank,
                join,
                "nccl" if on_gpus else "gloo",
                rank,
                len(addresses),
                (address, port),
                TIMEOUT_SECONDS,
            )
            for rank in range(len(addresses))
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        set_limit = os.environ.get(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)  # as in Ray's own backend
        limit = float(set_limit or DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=limit)
        except GetTimeoutError:
            logging.getLogger("ray.train").warning("the processes have not left their group after %g s", limit)


def _import_libraries() -> None:
    """On the GPU of this process, because some libraries look at the current one when they are imported."""
    with collector_off():
        from ray.train.torch.config import TorchConfigContextManager

        with TorchConfigContextManager():
            import_libraries()


def _set_rank_variables() -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()


def _leave(destroy_process_group: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group)


def listen(address: str) -> int:
    """Open the store's socket at `address` in the first process; returns its port. `join` takes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listening.append(socket.create_server((address, 0), family=family))
    return int(_listening[-1].getsockname()[1])


def join(backend: str, rank: int, world: int, store: tuple[str, int], timeout_s: float) -> None:
    """Make this process one of the group. store: address and port of the first process's store."""
    import torch.distributed as dist

    if store[0] == LOOPBACK:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _loopback_interface())
    timeout = timedelta(seconds=timeout_s)
    descriptor = _listening.pop().detach() if rank == 0 else None
    tcp_store = dist.TCPStore(*store, world, rank == 0, timeout, master_listen_fd=descriptor)
    dist.init_process_group(backend, store=tcp_store, rank=rank, world_size=world, timeout=timeout)


def _loopback_interface() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
