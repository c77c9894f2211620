"""What object stores refuse, through their real drivers: what is wrong, and what to do."""

from __future__ import annotations

import json

import fsspec
import pytest
from helpers.refusing_store import refusing_store

from minitron.errors import StorageError
from minitron.storage import exists, read_bytes, write_bytes

VARIABLES = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:{port}",
    },
    "gs": {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
    "az": {
        "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;AccountName=test;AccountKey=dGVzdA==;"
        "BlobEndpoint=http://127.0.0.1:{port}/test;"
    },
}


def _forget():
    """Let the drivers read their variables again."""
    for scheme in VARIABLES:
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(autouse=True)
def fresh_drivers():
    _forget()
    yield
    _forget()


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Directs a scheme's addresses to a port, with credentials; all other settings of stores are gone."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    for variables in VARIABLES.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    def direct(scheme, port):
        for name, value in VARIABLES[scheme].items():
            monkeypatch.setenv(name, value.format(port=port))

    return direct


def _refused(action, *arguments):
    with pytest.raises(StorageError) as refused:
        action(*arguments)
    return refused.value


def _xml(code):
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>words of the store</Message></Error>'


@pytest.mark.parametrize(
    ("code", "status", "meaning", "remedy"),
    [
        ("AccessDenied", 403, "the storage refuses these credentials", "delete in bucket"),
        ("InvalidAccessKeyId", 403, "the storage refuses these credentials", "check that they are right"),
        ("SignatureDoesNotMatch", 403, "the storage refuses these credentials", "check that they are right"),
        ("ExpiredToken", 400, "the storage refuses these credentials", "have not expired"),
        ("RequestTimeTooSkewed", 403, "refuses the time of this machine", "set this machine's clock"),
        ("NoSuchBucket", 404, "there is no bucket or container bucket", "create it"),
        ("AuthorizationHeaderMalformed", 400, "the bucket is in another region", "set AWS_DEFAULT_REGION"),
        ("PermanentRedirect", 301, "the bucket is in another region", "set AWS_DEFAULT_REGION"),
        ("SlowDown", 503, "the storage limits requests", "run again later"),
        ("InternalError", 500, "the storage has a fault", "run again later"),
    ],
)
def test_what_s3_refuses_is_said_with_what_to_do(use, code, status, meaning, remedy):
    with refusing_store(status, _xml(code), Content_Type="application/xml") as store:
        use("s3", store.server_port)
        error = _refused(write_bytes, "s3://bucket/runs/file", b"1")
        assert error.problem.startswith("s3://bucket/runs/file: ")
        assert meaning in error.problem
        assert remedy in error.remedy
        assert store.requests <= 5 or code == "PermanentRedirect"  # which s3fs follows until Python stops it


@pytest.mark.parametrize(
    ("code", "status", "meaning", "remedy"),
    [
        ("AuthorizationFailure", 403, "the storage refuses these credentials (AuthorizationFailure: words", "have not"),
        ("InvalidAuthenticationInfo", 401, "the storage refuses these credentials", "check that they are right"),
        ("ContainerNotFound", 404, "there is no bucket or container bucket (ContainerNotFound: words", "create it"),
    ],
)
def test_what_azure_refuses_is_said_without_its_document(use, code, status, meaning, remedy):
    with refusing_store(status, _xml(code), Content_Type="application/xml", x_ms_error_code=code) as store:
        use("az", store.server_port)
        error = _refused(write_bytes, "az://bucket/runs/file", b"1")
    assert meaning in error.problem
    assert "<Error>" not in error.problem
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("text", "status", "meaning", "remedy"),
    [
        ("Anonymous caller does not have storage.objects.get access", 401, "no credentials", "gcloud auth"),
        ("me does not have storage.objects.create access", 403, "the storage refuses these credentials", "delete in"),
        ("The specified bucket does not exist.", 404, "there is no bucket or container bucket", "create it"),
    ],
)
def test_what_google_refuses_is_said_without_a_trace(use, capfd, text, status, meaning, remedy):
    body = json.dumps({"error": {"code": status, "message": text}})
    with refusing_store(status, body, Content_Type="application/json") as store:
        use("gs", store.server_port)
        error = _refused(write_bytes, "gs://bucket/runs/file", b"1")
    assert meaning in error.problem
    assert remedy in error.remedy
    assert "Traceback" not in capfd.readouterr().err


def test_missing_credentials_are_named_with_the_variables_of_the_store(use, monkeypatch):
    error = _refused(read_bytes, "s3://bucket/file")
    assert "no credentials were found" in error.problem
    assert "set AWS_ACCESS_KEY_ID" in error.remedy
    error = _refused(read_bytes, "az://bucket/file")
    assert "no credentials were found" in error.problem
    assert "set AZURE_STORAGE_CONNECTION_STRING" in error.remedy
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "nonsense")
    assert "its connection string cannot be read" in _refused(read_bytes, "az://bucket/file").problem
    _forget()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    error = _refused(exists, "s3://bucket/file")
    assert "nobody" in error.problem
    assert "AWS_PROFILE for a section of ~/.aws/credentials" in error.remedy


def test_a_store_that_is_away_or_has_no_address_is_named_with_the_variable_of_its_address(use, monkeypatch, free_port):
    use("s3", free_port())
    error = _refused(read_bytes, "s3://bucket/file")
    assert "the storage does not answer" in error.problem
    assert "AWS_ENDPOINT_URL" in error.remedy
    _forget()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    assert (
        "the storage does not answer (ValueError: Invalid endpoint" in _refused(read_bytes, "s3://bucket/file").problem
    )
    _forget()
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us east")
    assert "the region is not one" in _refused(read_bytes, "s3://bucket/file").problem
