"""The processes of a training listen no wider than they must, and exchange nothing that can run code."""

from __future__ import annotations

import ast
import os
import re

from helpers.command import ROOT
from helpers.joining import join_two

from minitron_search.worker_imports import import_libraries


def test_workers_listen_only_at_the_chosen_address_and_exchange_values_exactly():
    """127.0.0.1 is for workers of one node; 127.0.0.2 stands for the address of a node in its cluster."""
    expected = [
        {"rank": rank, "third": rank / 3, "nothing": float("inf"), "text": "ä" * (1 + 99 * rank)} for rank in range(2)
    ]
    addresses = ["127.0.0.2", "127.0.0.1"]
    for address, reports in zip(addresses, join_two(addresses), strict=True):
        for report in reports:
            assert report["gathered"] == expected
            assert report["error"] == ["a key", "a remedy"]
            assert report["total"] == 3.0
        listening = {ip for report in reports for ip in report["listening"]}
        assert address in listening
        assert not listening & {"0.0.0.0", "::"}
        assert address != "127.0.0.1" or listening == {address}


def test_a_worker_allows_deterministic_products_before_it_computes(monkeypatch):
    """PyTorch looks at the variable once, in a process's first product on a GPU, which may be in calibration."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    import_libraries.__wrapped__()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_no_code_of_ours_exchanges_objects_as_pickles():
    """torch.distributed's functions for objects unpickle what other processes send."""
    found = [
        f"{file}:{node.lineno} {node.attr}"
        for folder in ("minitron", "search", "platform")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        if re.fullmatch(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?", node.attr)
    ]
    assert found == []
