"""The image of clusters/docker is built by buildah, on Debian in place of NVIDIA's base, and runs a recipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import tiny
from helpers.command import ROOT

CHROOT = ("--isolation", "chroot")


def _run(*command, timeout=600):
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


@contextmanager
def _deleted(kind, name):
    """Delete the image ("rmi") or the container ("rm") afterwards."""
    try:
        yield name
    finally:
        subprocess.run(["buildah", kind, name], capture_output=True)


def _debian(folder):
    """Make an image of Debian by debootstrap, because registries may be out of reach; returns its name."""
    _run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", folder)
    name = f"localhost/minitron-test-base:{uuid.uuid4().hex[:8]}"
    container = _run("buildah", "from", "scratch")
    with _deleted("rm", container):
        _run("buildah", "copy", container, folder, "/")
        _run("buildah", "commit", container, name)
    shutil.rmtree(folder)
    return name


def _pip_settings():
    """Options that give the build this machine's settings of pip, with the local files that they name."""
    listed = _run(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {key.rsplit(".", 1)[1]: value.strip("'\"") for key, value in (line.split("=", 1) for line in listed)}
    paths = {Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()}
    folders = {path.parent if path.is_file() else path for path in paths if path.is_absolute() and path.exists()}
    return [
        *(f"--volume={folder}:{folder}:ro" for folder in sorted(folders)),
        *(f"--env=PIP_{key.upper().replace('-', '_')}={value}" for key, value in settings.items()),
    ]


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_image_builds_without_a_daemon_and_runs_a_recipe_without_root(tmp_path):
    missing = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    assert missing == [], f"apt-get install {' '.join(missing)}"
    with _deleted("rmi", _debian(tmp_path / "debian")) as base:
        image = f"localhost/minitron-test:{uuid.uuid4().hex[:8]}"
        files = ("-f", "clusters/docker/Dockerfile", "--ignorefile", "clusters/docker/Dockerfile.dockerignore")
        with _deleted("rmi", image):
            options = (*CHROOT, "--build-arg", f"BASE={base}", *_pip_settings())
            _run("buildah", "bud", *options, *files, "-t", image, ".", timeout=2400)
            config = json.loads(_run("buildah", "inspect", "--type", "image", image))["OCIv1"]["config"]
            assert config["User"] == "1000:1000"
            container = _run("buildah", "from", image)
            with _deleted("rm", container):
                folder = tmp_path / "bench"
                folder.mkdir()
                tiny.bench(folder)
                _run("chown", "-R", "1000:1000", folder)
                inside = ("buildah", "run", *CHROOT, f"--volume={folder}:{folder}", f"--workingdir={folder}", container)
                assert _run(*inside, "id", "-u") == "1000"
                printed = _run(*inside, "minitron", "run", "recipe.yaml", "--storage", "runs")
                assert "minitron promote tiny-student --version 1" in printed
                assert _run(*inside, "bwrap", "--version").startswith("bubblewrap")
