"""Addresses lead where they say, and show no secrets."""

from __future__ import annotations

import time

import fsspec
import pytest

from minitron import storage
from minitron.data import TextSource, documents
from minitron.errors import InputError, StorageError, one_line
from minitron.storage import redact, secret_in


@pytest.fixture
def internal():
    """A file that a chain leads to; a server in the internal network in the attack."""
    fs, _ = fsspec.url_to_fs("memory://internal")
    fs.pipe_file("/internal/secret.txt", b"secret")
    return "memory://internal/secret.txt"


CHAINS = [
    "simplecache::{internal}",
    "reference::{internal}",
    "zip://secret.txt::{internal}",
    "memory://x::{internal}",
    "filecache::http://169.254.169.254/latest/meta-data",
    "git::/etc",
    "dir::file:///etc",
]


@pytest.mark.parametrize("chain", CHAINS)
def test_an_address_inside_another_is_refused(internal, chain):
    address = chain.format(internal=internal)
    for read in (storage.exists, storage.read_bytes, lambda path: list(documents(TextSource("text", path)))):
        with pytest.raises(StorageError, match="chains several addresses"):
            read(address)


def test_an_address_that_fsspec_opens_with_another_driver_is_refused(internal, monkeypatch):
    monkeypatch.setattr("minitron.storage.addresses.url_to_fs", lambda path, **_: fsspec.url_to_fs(internal))
    with pytest.raises(StorageError, match="opened as memory, not as hf"):
        storage.filesystem("hf://datasets/a/b")


@pytest.mark.parametrize(
    ("address", "shown", "secret"),
    [
        ("http://me:hunter2@host:5000/x", "http://host:5000/x", "a password"),
        ("http://me:hunter2@2@host/x", "http://host/x", "a password"),
        ("http://me:2/hunter2@host/x", "http://host/x", "a password"),
        ("http://me:2?hunter2@host/x", "http://host/x", "a password"),
        ("http://host/x?password=hunter2", "http://host/x", "the parameter 'password'"),
        ("http://host/x#hunter2", "http://host/x", ""),
        ("postgresql+psycopg2://me:hunter2@db/mlflow?sslmode=require", "postgresql+psycopg2://db/mlflow", "a password"),
        ("postgresql://db/mlflow?user=a@b&password=hunter2", None, "the parameter 'password'"),
        ("postgresql://me@db/mlflow?sslmode=require", "postgresql://db/mlflow", ""),
        ("s3://key:hunter2@bucket/x", "s3://bucket/x", "a password"),
        ("s3://key:hunter2/2@bucket/x", "s3://bucket/x", "a password"),
        ("az://container@account/x?sig=hunter2", "az://container@account/x", "the parameter 'sig'"),
        ("hf://datasets/user/name@branch/part-?.jsonl", "hf://datasets/user/name@branch/part-?.jsonl", ""),
        ("s3://bucket/a@b/part-?.jsonl", "s3://bucket/a@b/part-?.jsonl", ""),
        ("sqlite:////runs/a@b/mlflow.db", "sqlite:////runs/a@b/mlflow.db", ""),
    ],
)
def test_user_and_query_of_an_address_are_not_shown(address, shown, secret):
    text = redact(f"MLflow at {address} refuses: see {address}")
    assert "hunter2" not in text
    if shown:
        assert text == f"MLflow at {shown} refuses: see {shown}"
    assert secret_in(f"run --storage {address}") == secret
    if address.startswith(("s3", "az")) and "hunter2" in address:
        with pytest.raises(StorageError, match="may be secrets") as refused:
            storage.filesystem(address)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("refused with url: /a?pass=hunter2&x=1 (again)", "refused with url: /a (again)"),
        ("'/a?page=2&access_token=hunter2' and ?sig=hunter2", "'/a' and ?sig=..."),
        ("/b?X-Amz-Signature=hunter2", "/b"),
        ("host=db password=hunter2 dbname=x", "host=db password=... dbname=x"),
        ("SECRET_KEY=hunter2", "SECRET_KEY=..."),
        ("connect(PASSWORD=hunter2, port=1)", "connect(PASSWORD=..., port=1)"),
        ("SECRET_KEY=hunter2;", "SECRET_KEY=...;"),
        ("max_tokens=4096 bos_token=<s> key=text", "max_tokens=4096 bos_token=<s> key=text"),
    ],
)
def test_values_of_what_is_called_a_secret_are_not_shown(text, shown):
    assert redact(text) == shown


def test_every_error_shows_addresses_without_secrets():
    error = InputError("'https://me:hunter2@host/x' is not a file", "try http://host/x?sig=hunter2")
    assert (error.problem, error.remedy) == ("'https://host/x' is not a file", "try http://host/x")
    assert one_line(OSError("http://me:hunter2@host refuses")) == "OSError: http://host refuses"


def test_a_storage_that_does_not_answer_is_refused_without_the_secrets_of_its_endpoint(monkeypatch, free_port):
    values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in {**values, "AWS_ENDPOINT_URL": f"http://me:hunter2@127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StorageError, match="cannot be accessed") as refused:
        list(documents(TextSource("jsonl", "s3://bucket/text.jsonl")))
    assert "hunter2" not in str(refused.value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_a_storage_that_stops_answering_while_text_is_read_is_named(monkeypatch, name):
    class DriverError(Exception):
        """As botocore's, which are no OSErrors."""

    def fail(file, size=-1):
        raise DriverError("no answer")

    fsspec.filesystem("memory").pipe_file(f"/texts/{name}", b"{}")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with pytest.raises(StorageError, match=rf"memory:///?texts/{name}: cannot be accessed"):
        list(documents(TextSource("jsonl", f"memory://texts/{name}")))


@pytest.mark.parametrize("piece", ["a", "/", "/a+", "password", "&a", "http://", "x='", "/?a='", "a ", "://", "?a=/"])
def test_a_text_of_megabytes_takes_time_in_proportion_to_its_length(piece):
    started = time.process_time()
    redact(piece * (400_000 // len(piece)))
    assert time.process_time() - started < 5
