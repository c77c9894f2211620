"""A corpus that every machine already has: docstrings of the standard library and of the installed packages.

Files are parsed with `ast` and never imported, so reading them runs no third-party code and needs no network.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

LARGEST_FILE = 2_000_000  # bytes; larger files are generated tables
SHORTEST_DOCUMENT = 200  # characters
EXTRACTION = 1  # raise it if the text extracted from a file changes: it is part of the source's identity
TOPICS = "pydoc_data.topics"  # the language reference that `help()` shows, one dictionary in one file

_OWN = {"minitron", "minitron_search", "minitron_platform"}
_TESTS = re.compile(r"(^|_)tests?$|^test_|^conftest$")
# Copies of other packages: the same text under two names is not more text.
_COPIES = {"_vendor", "vendor", "_vendored", "vendored", "externals", "third_party", "thirdparty", "thirdparty_files"}


def module_files() -> dict[str, Path]:
    """Every module of the standard library and of site-packages as {dotted name: file}.

    The folders come from the interpreter's installation scheme, not from sys.path. Left out: tests, vendored copies, this
    project's own packages, and files whose path is not a dotted name (which excludes a site-packages folder inside the
    standard library's). If both have a module, the standard library's is used.
    """
    paths = sysconfig.get_paths()
    modules: dict[str, Path] = {}
    for root in dict.fromkeys(os.path.realpath(paths[kind]) for kind in ("stdlib", "purelib", "platlib")):
        for folder, subfolders, files in os.walk(root):
            relative = os.path.relpath(folder, root)
            parents = () if relative == "." else tuple(relative.split(os.sep))
            subfolders[:] = [name for name in subfolders if _is_included(name) and (parents or name not in _OWN)]
            for file in files:
                stem, extension = os.path.splitext(file)
                if extension != ".py" or not _is_included(stem) or (not parents and stem in _OWN):
                    continue
                name = ".".join(parents if stem == "__init__" else (*parents, stem))
                if name:
                    modules.setdefault(name, Path(folder, file))
    return modules


def _is_included(name: str) -> bool:
    return name.isidentifier() and name != "__pycache__" and name not in _COPIES and not _TESTS.search(name)


def python_documents() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every module with at least 200 characters of docstrings, in the order of the names' hashes.

    Files over 2 MB and files that do not parse are left out.
    """
    files = module_files()
    topics = _topics(files.pop(TOPICS)) if TOPICS in files else {}
    for name in sorted([*files, *topics], key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = topics[name] if name in topics else module_text(files[name])
        if len(text) >= SHORTEST_DOCUMENT:
            # A docstring may contain a lone surrogate, which tokenizers do not accept.
            yield name, text.encode("utf-8", "replace").decode("utf-8")


def module_text(file: Path) -> str:
    """The docstrings of one module, each under its signature; empty if there are none or the file does not parse.

    The module's own name is left out, so that two copies of a file give the same text and go to the same split.
    """
    tree = _parse(file)
    return "\n\n".join(_docstrings(tree, "")) + "\n" if tree else ""


def _parse(file: Path) -> ast.Module | None:
    if file.stat().st_size > LARGEST_FILE:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # templates and old sources; the parser raises MemoryError for deep nesting


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    """The docstrings of `node` and of the classes and functions in it, without those nested inside a function."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield f"{_heading(node, prefix)}{text.strip()}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        prefix = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child, prefix)


def _heading(node: ast.AST, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})\n\n" if bases else f"class {prefix}{node.name}\n\n"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"{prefix}{node.name}({ast.unparse(node.args)})\n\n"
    return ""


def _topics(file: Path) -> dict[str, str]:
    """The topics of pydoc, {"pydoc_data.topics.<topic>": text}: the file assigns one dictionary of strings."""
    tree = _parse(file)
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)] if tree else []
    return {
        f"{TOPICS}.{key.value}": item.value.strip() + "\n"
        for value in values
        if isinstance(value, ast.Dict)
        for key, item in zip(value.keys, value.values, strict=True)
        if isinstance(key, ast.Constant)
        and isinstance(key.value, str)
        and isinstance(item, ast.Constant)
        and isinstance(item.value, str)
    }


def python_identity() -> dict[str, Any]:
    """Everything that determines the text: the interpreter's version and the sorted (distribution, version) pairs installed."""
    paths = sysconfig.get_paths()
    folders = list(dict.fromkeys([paths["purelib"], paths["platlib"]]))
    pairs = {(str(package.name).lower(), package.version) for package in metadata.distributions(path=folders)}
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "extraction": EXTRACTION,
        "distributions": sorted([name, version] for name, version in pairs if name not in _OWN),
    }
