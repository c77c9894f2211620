"""A stranger's model: nothing of the user's is read through it, and nothing large is built before it is checked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny

from minitron.errors import InputError
from minitron.models import check_source, load_source, load_tokenizer
from minitron.packages import package_path
from minitron.pruning.streaming import prune_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny.model()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A model's folder to which a stranger has added something."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/a.jinja"]
)
def test_a_link_out_of_a_model_is_named_and_what_it_leads_to_is_not_copied(folder, tmp_path, name):
    (tmp_path / "id_rsa").write_text("private")
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "id_rsa")
    architecture = tiny.architecture(tiny.model())
    smaller, scores = replace(architecture, num_layers=3), tiny.scores(architecture)
    for read in (
        lambda: check_source(str(folder)),
        lambda: load_source(str(folder)),
        lambda: load_tokenizer(folder),
        lambda: prune_checkpoint(folder, tmp_path / "pruned", smaller, scores),
    ):
        with pytest.raises(InputError, match=f"{name}: a link to .*id_rsa, which is not part of the model"):
            read()
    assert not (tmp_path / "pruned").exists()


def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load_source(str(snapshot))
    architecture = tiny.architecture(tiny.model())
    prune_checkpoint(snapshot, tmp_path / "pruned", replace(architecture, num_layers=3), tiny.scores(architecture))
    assert not (tmp_path / "pruned" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("path", ["../minitron/models.py", "/etc/passwd", "inner/../../yaml/loader.py"])
def test_a_package_address_stays_in_its_package(path):
    with pytest.raises(InputError, match="leads out of the package"):
        package_path(f"package:yaml/{path}")
    assert package_path("package:yaml/loader.py").exists()
