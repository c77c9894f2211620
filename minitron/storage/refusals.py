"""What the error of a remote storage's driver means, and what to do about it.

s3fs, gcsfs and adlfs have types of errors of their own, and those of the libraries below them. They retry a few times where
that can help, with growing and random pauses.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from minitron.errors import StorageError, one_line

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a section of ~/.aws/credentials",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run: gcloud auth application-default login",
    "az": "set AZURE_STORAGE_CONNECTION_STRING; or AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or a login",
}
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST", "az": "AZURE_STORAGE_CONNECTION_STRING"}
SAME_AS = {"gcs": "gs", "abfs": "az"}

NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("DefaultCredentialsError", "RefreshError", "CredentialUnavailableError"),
}
UNREACHABLE = {
    # botocore
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
    # aiohttp
    *(
        "ClientConnectorError",
        "ClientConnectorDNSError",
        "ClientOSError",
        "ServerDisconnectedError",
        "ServerTimeoutError",
    ),
    # azure.core
    *("ServiceRequestError", "ServiceResponseError", "ServiceRequestTimeoutError", "ServiceResponseTimeoutError"),
    "TimeoutError",
}
NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
OTHER_REGION = {
    *("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "InvalidRegionError"),
    "RecursionError",  # s3fs follows a redirect that names no region without end
}
BUSY = {"SlowDown", "ServerBusy", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}


@dataclass(frozen=True)
class Refusal:
    """What an error means, and what to do about it."""

    meaning: str
    remedy: str


def storage_error(path: str, error: Exception) -> StorageError:
    """The error to raise for `error`, with which a driver did not open, read or write the address `path`."""
    found = _refusal(path, error) or Refusal("cannot be accessed", "check the address, its permissions and the network")
    return StorageError(f"{path}: {found.meaning} ({_short(error)})", found.remedy)


@cache
def quiet_drivers() -> None:
    """Once in a process, keep drivers from printing the traces of errors that they also raise."""
    for name in ("gcsfs", "azure"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _refusal(path: str, error: Exception) -> Refusal | None:
    scheme, _, inner = path.partition("://")
    scheme = SAME_AS.get(scheme, scheme)
    if scheme not in CREDENTIALS:
        return None
    chain = list(_chain(error))
    names = {type(each).__name__ for each in chain} | {code for each in chain for code in _codes(each)}
    statuses = {status for each in chain if (status := _status(each))}
    text = str(chain[0])
    bucket = inner.split("/")[0]
    no_token = "ClientAuthenticationError" in names and not statuses  # Azure's login, before the storage was asked
    if names & NO_CREDENTIALS or no_token or "connection_string" in text or "Anonymous caller" in text:
        return Refusal("no credentials were found for this storage", CREDENTIALS[scheme])
    if "Connection string" in text:
        return Refusal("its connection string cannot be read", CREDENTIALS[scheme])
    if "RequestTimeTooSkewed" in names:
        return Refusal("the storage refuses the time of this machine", "set this machine's clock")
    if names & OTHER_REGION:
        return Refusal(
            "the bucket is in another region, or the region is not one",
            "set AWS_DEFAULT_REGION to the bucket's region, and AWS_ENDPOINT_URL for a server that is not Amazon's",
        )
    if "PermissionError" in names or statuses & {401, 403} or text.startswith("Forbidden"):
        return Refusal(
            "the storage refuses these credentials",
            f"check that they are right, have not expired, and may list, read, write and delete in {bucket}",
        )
    if names & NO_BUCKET or isinstance(error, FileNotFoundError):  # a write needs nothing else to exist
        return Refusal(f"there is no bucket or container {bucket}", "create it, or correct the address")
    if "FileExpired" in names:
        return Refusal("the file was replaced while it was read", "run again")
    if names & BUSY or statuses & {429, 503} or getattr(chain[0], "errno", None) == errno.EBUSY:
        return Refusal(
            "the storage limits requests, after several attempts too",
            "run again later, with fewer workers or a higher limit; what is stored is used again",
        )
    if names & UNREACHABLE or "Invalid endpoint" in text:
        return Refusal("the storage does not answer", f"check the network, and {ENDPOINTS[scheme]} if it is set")
    if any(status >= 500 for status in statuses):
        return Refusal("the storage has a fault, after several attempts too", "run again later")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> Iterator[str]:
    """The codes by which S3 and Azure name what is wrong."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        yield str(response.get("Error", {}).get("Code", ""))
    code = getattr(error, "error_code", None)
    if code is not None:
        yield str(getattr(code, "value", code))


def _status(error: BaseException) -> int | None:
    """The status of the HTTP response, where a driver keeps it: botocore, azure.core, gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status_code", None) or getattr(error, "code", None)
    return int(status) if isinstance(status, int) or (isinstance(status, str) and status.isdigit()) else None


def _short(error: Exception) -> str:
    """An error as one line, without the document that Azure appends to its message."""
    lines = str(error).splitlines()
    if any(line.startswith("ErrorCode:") for line in lines):
        code = next(_codes(error), type(error).__name__)
        return f"{code}: {one_line(Exception(lines[0])).removeprefix('Exception: ')}"
    return one_line(error)
