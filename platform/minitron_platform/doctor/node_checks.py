"""Judges what the nodes say about themselves. Each function is one check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from minitron_platform.cluster.requirements import direct_requirements, lacks, python_lack
from minitron_platform.doctor.finding import Finding, State
from minitron_platform.doctor.node import NodeFacts

OPEN_FILES = (1024, 8192)  # fewer stop a run; fewer are a problem with many workers
SHARED_MEMORY = (64 << 20, 1 << 30)  # bytes; Docker's default is 64 MiB
TEMP_SPACE = (2e9, 10e9)  # bytes
STORAGE_SPEED = 20e6  # bytes per second


def node_findings(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """The findings of all checks of the nodes."""
    findings = [*versions(nodes)]
    for node in nodes:
        findings += [open_files(node), shared_memory(node), temp_space(node), gpus(node), storage(node)]
    return [*findings, *drivers(nodes)]


def versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Whether every node can run Minitron, and all have the same versions of Python and of what it needs."""
    for node in nodes:
        problems = [*map(str, lacks(node.environment))]
        if needed := python_lack(node.environment):
            problems.append(f"Python {node.environment.python}, {needed} is needed")
        if problems:
            yield Finding(
                "versions", node.node, "failed", "; ".join(problems), "install them, or start from another image"
            )
    differing = []
    for name in ["python", *direct_requirements()]:
        counts = Counter(_version(node, name) for node in nodes)
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            odd = [f"{_version(node, name)} on {node.node}" for node in nodes if _version(node, name) != usual]
            differing.append(f"{name} {usual}, but {', '.join(odd)}")
    if differing:
        remedy = "start all nodes from one image, because functions and results travel between them"
        yield Finding("versions", "all nodes", "failed", "; ".join(differing), remedy)
    else:
        shown = ", ".join(f"{name} {_version(nodes[0], name)}" for name in ("python", "ray", "torch", "transformers"))
        yield Finding("versions", "all nodes" if len(nodes) > 1 else nodes[0].node, "ok", shown)


def _version(node: NodeFacts, name: str) -> str:
    return node.environment.python if name == "python" else node.environment.packages.get(name, "missing")


def open_files(node: NodeFacts) -> Finding:
    """Every worker, connection and checkpoint file takes one."""
    state = _state(node.open_files, OPEN_FILES)
    remedy = f"ulimit -n {OPEN_FILES[1] * 8} before Ray is started there (LimitNOFILE in a systemd unit)"
    return _finding("open files", node, state, f"{node.open_files:,}", remedy)


def shared_memory(node: NodeFacts) -> Finding:
    """Ray keeps objects in it, and NCCL its buffers."""
    size = node.shared_memory_bytes
    if size is None:
        return Finding("shared memory", node.node, "skipped", "no /dev/shm")
    remedy = "docker run --shm-size=8g, or an emptyDir with medium: Memory at /dev/shm in Kubernetes"
    return _finding("shared memory", node, _state(size, SHARED_MEMORY), f"{size / 1e9:,.1f} GB", remedy)


def temp_space(node: NodeFacts) -> Finding:
    """Logs, uploads and copies of checkpoints go to the temporary folder."""
    remedy = f"free space at {node.temp_folder}, or set TMPDIR, and Ray's --temp-dir, to a larger disk"
    value = f"{node.temp_free_bytes / 1e9:,.1f} GB free at {node.temp_folder}"
    return _finding("temporary space", node, _state(node.temp_free_bytes, TEMP_SPACE), value, remedy)


def gpus(node: NodeFacts) -> Finding:
    """Whether PyTorch can use the GPUs that the driver has, and how they are connected."""
    if not node.gpus:
        return Finding("GPUs", node.node, "skipped", "none")
    names = ", ".join(f"{count} {name}" for name, count in Counter(gpu.name for gpu in node.gpus).items())
    links = {True: ", NVLink", False: ", no NVLink", None: ""}[node.nvlink]
    rdma = f", RDMA {' '.join(node.rdma)}" if node.rdma else ""
    value = f"{names}, driver {node.gpus[0].driver}{links}{rdma}"
    offered = len(node.gpus)
    if node.visible_gpus is not None:
        offered = min(offered, len([name for name in node.visible_gpus.split(",") if name.strip()]))
        value += f", of which CUDA_VISIBLE_DEVICES={node.visible_gpus!r} leaves {offered}"
    if node.torch_gpus < offered:
        remedy = "install PyTorch built for the driver's CUDA, and offer all GPUs to the container"
        if node.visible_gpus is not None:
            remedy = f"unset CUDA_VISIBLE_DEVICES or name GPUs that nvidia-smi -L lists; else {remedy}"
        return Finding("GPUs", node.node, "failed", f"{value}; PyTorch uses {node.torch_gpus}", remedy)
    if not offered:
        remedy = "to use them unset CUDA_VISIBLE_DEVICES, or offer them to Ray (`ray start --num-gpus`)"
        return Finding("GPUs", node.node, "skipped", value, remedy)
    if node.nvlink is False:
        return Finding("GPUs", node.node, "warning", value, "keep workers on one GPU each, or use nodes with NVLink")
    return Finding("GPUs", node.node, "ok", value)


def drivers(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Whether all nodes have the same GPU driver and the same GPUs."""
    for what, values in (
        ("driver", {gpu.driver for node in nodes for gpu in node.gpus}),
        ("GPU", {gpu.name for node in nodes for gpu in node.gpus}),
    ):
        if len(values) > 1:
            remedy = "use equal nodes: the slowest decides, and results must come from the same kind of hardware"
            yield Finding(
                "GPUs", "all nodes", "warning", f"several kinds of {what}: {', '.join(sorted(values))}", remedy
            )


def storage(node: NodeFacts) -> Finding:
    """Whether the node can write to the storage, sees what others write, and how fast."""
    speed = node.storage
    if speed.error:
        problem, _, remedy = speed.error.partition("; ")
        return Finding("storage", node.node, "failed", problem, remedy or "choose another with --storage")
    value = f"writes {speed.write_bytes / 1e6:,.0f} MB/s, reads {speed.read_bytes / 1e6:,.0f} MB/s"
    if not speed.shared:
        remedy = "use a folder that all nodes share, or an address such as s3://bucket/minitron"
        return Finding("storage", node.node, "failed", "does not see what other nodes write", remedy)
    if speed.write_bytes < STORAGE_SPEED:
        return Finding(
            "storage", node.node, "warning", value, "checkpoints will take long; use a faster disk or bucket"
        )
    return Finding("storage", node.node, "ok", value)


def _state(value: float, limits: tuple[float, float]) -> State:
    least, good = limits
    return "failed" if value < least else "warning" if value < good else "ok"


def _finding(check: str, node: NodeFacts, state: State, value: str, remedy: str) -> Finding:
    return Finding(check, node.node, state, value, "" if state == "ok" else remedy)
