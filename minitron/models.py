"""Loading and saving of transformers models, and access to their layers and head."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.arguments import check_model, check_tokenizer, check_type
from minitron.attention import WRAPPED, row_arguments, softcap_of, use_own_attention
from minitron.checkpoints.companions import check_links
from minitron.checkpoints.contents import Difference, filled, is_harmless, refusal, untied_head
from minitron.checkpoints.gguf import read_once
from minitron.checkpoints.gguf_contents import check_tensors
from minitron.checkpoints.gguf_header import check_gguf
from minitron.checkpoints.gguf_remote import header_copy
from minitron.checkpoints.gguf_rope import add_scaling
from minitron.checkpoints.headers import (
    check_no_adapter,
    has_adapters,
    has_pickles,
    has_safetensors,
    hub_headers,
    read_headers,
)
from minitron.checkpoints.hub_errors import given_by_hub
from minitron.checkpoints.pickles import pickled_headers
from minitron.checkpoints.quantised import as_ordinary, check_blocks, load_arguments, method_of, plain_model
from minitron.checkpoints.reading import check_files, quiet_transformers, read_config, readable
from minitron.checkpoints.tokenizer_files import read_tokenizer
from minitron.data.boundaries import DocumentBoundaries
from minitron.errors import InputError
from minitron.families import family_of
from minitron.families.config import make_plain
from minitron.files import file_stat
from minitron.model_imports import import_models
from minitron.packages import PACKAGE, package_path

# Keys that transformers writes into tokenizer_config.json about the machine it ran on and about code outside the folder.
NOT_THE_TOKENIZERS = ("auto_map", "is_local", "local_files_only")


def check_source(source: str) -> None:
    """Raise InputError if a model source is a missing file or package, or a folder with links that lead out of it (see
    `minitron.checkpoints.companions`); hub names are only checked when they are loaded."""
    check_type("source", source, str, "a model folder, a .gguf file or a hub name")
    if source.startswith(PACKAGE):
        package_path(source)
    elif is_remote_source(source):
        storage.uploaded_hashes(source)
    elif is_local_source(source):
        path = storage.local_path(source)
        if not path.exists():
            raise InputError(f"{source} does not exist", "give a model folder, a .gguf file or a hub name")
        if not path.is_dir() and not source.endswith(".gguf"):
            raise InputError(f"{source} is a file", "give the folder of a transformers checkpoint, or a .gguf file")
        if path.is_dir() and not (path / "config.json").is_file():
            raise InputError(f"{source} has no config.json", "give the folder of a transformers checkpoint")
        if path.is_dir():
            check_files(path)
            check_links(path)


def is_local_source(source: str) -> bool:
    """Whether a model source is a path on this machine, not the name of a model on the hub."""
    return source.startswith((".", "/", "~")) or source.endswith(".gguf") or os.path.exists(source)


def is_remote_source(source: str) -> bool:
    """Whether a model source is in remote storage (see `minitron.storage.uploads`)."""
    return not source.startswith(PACKAGE) and not storage.is_local(source)


def source_identity(source: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON value that changes when a model source changes, cheap to compute: SHA-256 of a single file, sizes and times of a
    folder's files, SHA-256 of those in remote storage, name and commit on the hub. Raises InputError if the hub cannot be
    reached."""
    check_source(source)
    if source.startswith(PACKAGE):
        path = package_path(source)
    elif is_remote_source(source):
        return {"uploaded": storage.uploaded_hashes(source)}
    elif is_local_source(source):
        path = storage.local_path(source)
    else:
        return {"hub": source, "revision": _on_hub(source, revision)[0]}
    if path.is_file():
        return {"file": path.name, "sha256": storage.sha256(path)}
    stats = [(p.name, stat) for p in sorted(path.iterdir()) if (stat := file_stat(p))]
    return {"folder": str(path), "files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats]}


def _on_hub(name: str, revision: str | None) -> tuple[str, bool]:
    """The commit of a hub model, or of the copy in the local cache if the hub cannot be reached; and whether it can."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().model_info(name, revision=revision, timeout=30).sha), True
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at_revision = f" with revision {revision!r}" if revision else ""
        raise InputError(
            f"no model {name!r}{at_revision} on the hub, or you have no access to it",
            "check the name, or give a folder or a .gguf file; for a private or gated model run `hf auth login`",
        ) from error
    except (HTTPError, OSError) as error:
        cached = try_to_load_from_cache(name, "config.json", revision=revision or "main")
        if isinstance(cached, str):
            return Path(cached).parent.name, False
        raise InputError(
            f"{name!r} is not a local folder or file, and the hub cannot be reached",
            "check the path or the name, or connect to the network",
        ) from error


def source_architecture(source: str, revision: str | None = None) -> tuple[Architecture, int | None]:
    """The architecture of a model source and its maximum sequence length (None if the config has none), from its config or
    GGUF header alone.

    Raises InputError as `load_source` does.
    """
    check_source(source)
    folder, arguments = _arguments(source, revision, weights=False)
    config = read_config(folder, source, **arguments)
    return Architecture.from_config(config), getattr(config, "max_position_embeddings", None)


def check_contents(source: str, revision: str | None = None) -> None:
    """Raise InputError unless the tensors of a model source have the names, shapes and dtypes of the model in its config.

    `load_source` checks the rest, and everything for a folder in remote storage.
    """
    remote = is_remote_source(source)
    if remote and not source.endswith(".gguf"):
        return
    folder, arguments = _arguments(source, revision, weights=not remote)
    config = read_config(folder, source, **arguments)
    if "gguf_file" in arguments:
        header = check_gguf(Path(folder, arguments["gguf_file"]))
        check_tensors(header, Architecture.from_config(config), source)
        if not remote:
            add_scaling(config, header, source)
        return
    method = method_of(config, source)
    if not is_local_source(folder):
        headers = hub_headers(folder, revision)
    else:
        check_no_adapter(Path(folder))
        headers = pickled_headers(Path(folder)) if _is_pickled(folder) else read_headers(Path(folder))
    if method == "fp8":
        check_blocks(headers, config, source)
    ordinary, quantised = as_ordinary(headers, method)
    filled(ordinary, Architecture.from_config(config), source, quantised)


def _is_pickled(folder: str) -> bool:
    """Whether the weights of a local folder are only in .bin files, which torch reads as tensors and nothing else."""
    return is_local_source(folder) and has_pickles(Path(folder)) and not has_safetensors(Path(folder))


def _arguments(source: str, revision: str | None, *, weights: bool = True) -> tuple[str, dict[str, Any]]:
    """Path or hub name, and further arguments, with which transformers' from_pretrained loads a source. weights: whether
    the weights of a remote one are copied to this machine too."""
    check_type("source", source, str, "a model folder, a .gguf file or a hub name")
    if revision is not None:
        check_type("revision", revision, str)
    path = str(package_path(source)) if source.startswith(PACKAGE) else source
    if is_remote_source(source):
        header_only = source.endswith(".gguf") and not weights
        path = str(header_copy(source) if header_only else storage.uploaded_copy(source, weights=weights))
    if is_local_source(path):
        path = str(storage.local_path(path))
    arguments: dict[str, Any] = {"trust_remote_code": False}
    if revision:
        arguments["revision"] = revision
    if not is_local_source(path) and not _on_hub(path, revision)[1]:
        arguments["local_files_only"] = True  # transformers would retry every file for 25 s
    if path.endswith(".gguf"):
        path, arguments["gguf_file"] = os.path.split(path)
    return path, arguments


def load_source(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The model and tokenizer of a GGUF file, a local folder, `package:NAME/FILE`, remote storage, or a hub name.

    A quantised model is dequantised. Raises InputError if the source cannot be read, if its tensors are not those of the model
    in its config, if a weight is not finite, or if its family is not supported.
    """
    check_type("dtype", dtype, torch.dtype, "a torch dtype")
    check_source(source)
    with read_once():
        check_contents(source, revision)
        folder, arguments = _arguments(source, revision)
        if is_remote_source(source) and "gguf_file" not in arguments:
            check_contents(folder)
        config = read_config(folder, source, **arguments)
        method = method_of(config, source)
        tokenizer = read_tokenizer(folder, source, **arguments)
        if "gguf_file" in arguments:
            add_scaling(config, check_gguf(Path(folder, arguments["gguf_file"])), source)
            arguments["config"] = config
        else:
            arguments["use_safetensors"] = not _is_pickled(folder)
        if is_other_attention(config):
            arguments["attn_implementation"] = "eager" if softcap_of(config) else "sdpa"
        with readable(repr(source)), quiet_transformers():
            model = _filled_model(folder, source, dtype=dtype, **arguments, **load_arguments(method))
    wrong = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if wrong:
        raise not_finite(source, wrong)
    return plain_model(model, method, dtype), tokenizer


def is_other_attention(config: Any) -> bool:
    """Whether a config names an attention implementation that may need a package; transformers' default is used instead."""
    return config._attn_implementation not in (None, *WRAPPED)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass without memory for a mask."""
    return not tensor.numel() or all(math.isfinite(value) for value in torch.aminmax(tensor.detach()))


def not_finite(where: str, names: Sequence[str]) -> InputError:
    """The error for a model whose parameters of these names have values that are not finite."""
    return InputError(
        f"{where}: {len(names):,} tensors contain values that are not finite ({', '.join(names[:3])})",
        "download or copy it again, or use an earlier checkpoint of its training",
    )


def _filled_model(folder: str, where: str, **arguments: Any) -> Any:
    """Load a causal language model. Raises InputError unless the checkpoint has every parameter and nothing else."""
    import_models()
    from transformers import AutoModelForCausalLM

    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatched ones are refused below
    model, info = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    if getattr(model, "_hf_peft_config_loaded", False):  # for hub models the headers do not show adapters
        raise has_adapters(where)
    architecture = Architecture.from_config(model.config)
    difference = Difference(
        missing=tuple(info["missing_keys"]),
        unexpected=tuple(name for name in info["unexpected_keys"] if not is_harmless(name)),
        shapes=tuple(
            f"{name} is {list(stored)}, not {list(expected)}"
            for name, stored, expected in sorted(info["mismatched_keys"])
        ),
    )
    if difference:
        raise refusal(difference, architecture, where)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if architecture.tied and head is not embedding:
        raise untied_head(architecture, where)
    use_own_attention(model.config)
    return model


def source_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a model source, without its model. Raises InputError as `load_source` does."""
    check_source(source)
    folder, arguments = _arguments(source, revision, weights=False)
    return read_tokenizer(folder, source, **arguments)


def source_folder(source: str, revision: str | None = None) -> str:
    """The local folder of a model source; that of a hub name is downloaded. Raises InputError for a GGUF file."""
    check_source(source)
    folder, arguments = _arguments(source, revision)
    if "gguf_file" in arguments:
        raise InputError(
            f"{source}: a GGUF file cannot be split over several GPUs, and it does not fit on one",
            "give the model as a folder of safetensors",
        )
    return _downloaded(folder, revision, arguments)


def plain_folder(source: str, revision: str | None = None) -> str | None:
    """The local folder of a model source that can be read a tensor at a time (see `minitron.meta_models.open_model`); None for
    one that `load_source` has to convert: a GGUF file, quantised weights and pickles. That of a hub name is downloaded.

    Raises InputError if the source cannot be read, or if its tensors are not those of the model in its config.
    """
    check_source(source)
    check_contents(source, revision)
    folder, arguments = _arguments(source, revision)
    if is_remote_source(source):
        check_contents(folder)
    if "gguf_file" in arguments or _is_pickled(folder) or method_of(read_config(folder, source, **arguments), source):
        return None
    folder = _downloaded(folder, revision, arguments)
    check_no_adapter(Path(folder))
    return folder


def _downloaded(folder: str, revision: str | None, arguments: dict[str, Any]) -> str:
    """The local folder of what `_arguments` gives for a source that is not a GGUF file."""
    if is_local_source(folder):
        return folder
    from huggingface_hub import snapshot_download

    weights = {header.file for header in hub_headers(folder, revision).values()}
    with given_by_hub(folder):
        return str(
            snapshot_download(
                folder,
                revision=revision,
                allow_patterns=["*.json", *weights, "tokenizer*", "*.model"],
                local_files_only=arguments.get("local_files_only", False),
            )
        )


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a transformers checkpoint to `folder`: config, safetensors, tokenizer."""
    check_model("model", model)
    check_tokenizer("tokenizer", tokenizer)
    make_plain(model.config)
    with quiet_transformers():
        model.save_pretrained(str(folder))  # type: ignore[operator]
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer to `folder`, without what transformers notes of the machine."""
    for key in NOT_THE_TOKENIZERS:
        tokenizer.init_kwargs.pop(key, None)
    with quiet_transformers():
        tokenizer.save_pretrained(str(folder))


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal language model from a local checkpoint folder, in eval mode."""
    check_type("folder", folder, (str, Path), "the path of a checkpoint folder")
    check_type("dtype", dtype, torch.dtype, "a torch dtype")
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    config = read_config(str(folder), str(folder), **local)
    if is_other_attention(config):
        config._attn_implementation = None
    with quiet_transformers():
        model: nn.Module = _filled_model(
            str(folder), str(folder), config=config, dtype=dtype, use_safetensors=True, **local
        )
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a local checkpoint folder."""
    check_type("folder", folder, (str, Path), "the path of a checkpoint folder")
    from transformers import AutoTokenizer

    check_links(Path(folder))
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def decoder_and_head(model: Any) -> tuple[nn.Module, Tensor]:
    """The decoder of a transformers causal LM, which computes the final hidden states, and its head's weight [vocab, hidden].

    Raises InputError if the head has more parameters than one matrix (a bias, an adapter). Scaling and soft-capping of the
    logits are part of `minitron.logits.Head`.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{name} has no output head", "give a causal language model, for example LlamaForCausalLM")
    more = [key for key, _ in head.named_parameters() if key != "weight"]
    if more:
        raise InputError(
            f"{name}: its logits are not hidden states times one matrix (the head also has {', '.join(more)})",
            "use a model whose head has no bias and no adapter",
        )
    return model.get_decoder(), head.weight


def head_of(model: nn.Module) -> Tensor:
    """The head's weight [vocab, hidden]; the embedding matrix itself if the two are tied."""
    return decoder_and_head(model)[1]


def final_hidden(model: nn.Module, input_ids: Tensor, documents: DocumentBoundaries | None = None) -> Tensor:
    """Hidden states after the final norm, [rows, seq_length, hidden] in the model's dtype, of rows without padding.

    With `documents` none of a row's documents sees another, and positions begin anew in each.
    """
    decoder, _ = decoder_and_head(model)
    return decoder(input_ids=input_ids, use_cache=False, **row_arguments(model, input_ids, documents)).last_hidden_state


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order."""
    table = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
    return model.get_submodule(table.layers)  # type: ignore[return-value]
