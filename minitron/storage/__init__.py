"""Files, and folders that are whole or invisible, on local disks and at any address that fsspec reaches."""

from minitron.redaction import redact, secret_in
from minitron.storage.addresses import absolute, check_address, filesystem, is_local, join, local_path
from minitron.storage.copies import fetch, fetch_file
from minitron.storage.files import (
    MANIFEST,
    create_bytes,
    exists,
    file_sizes,
    names,
    read_bytes,
    read_bytes_if_exists,
    read_json,
    read_json_if_exists,
    remove,
    size,
    write_bytes,
    write_json,
)
from minitron.storage.folders import (
    committed_folder,
    is_committed,
    manifest,
    publish,
    staging_folder,
    upload,
    verify,
)
from minitron.storage.hashing import fingerprint, sha256
from minitron.storage.private import PRIVATE, lock_file, write_new
from minitron.storage.problems import access_errors, disk_errors, free_bytes
from minitron.storage.uploads import (
    commit_files,
    hashes_of,
    upload_files,
    uploaded_copy,
    uploaded_hashes,
    uploaded_size,
)
from minitron.storage.writable import check_file_writable, check_folder_writable, check_local_folder

__all__ = [
    "MANIFEST",
    "PRIVATE",
    "absolute",
    "access_errors",
    "check_address",
    "check_file_writable",
    "check_folder_writable",
    "check_local_folder",
    "commit_files",
    "committed_folder",
    "create_bytes",
    "disk_errors",
    "exists",
    "fetch",
    "fetch_file",
    "file_sizes",
    "filesystem",
    "fingerprint",
    "free_bytes",
    "hashes_of",
    "is_committed",
    "is_local",
    "join",
    "local_path",
    "lock_file",
    "manifest",
    "names",
    "publish",
    "read_bytes",
    "read_bytes_if_exists",
    "read_json",
    "read_json_if_exists",
    "redact",
    "remove",
    "secret_in",
    "sha256",
    "size",
    "staging_folder",
    "upload",
    "upload_files",
    "uploaded_copy",
    "uploaded_hashes",
    "uploaded_size",
    "verify",
    "write_bytes",
    "write_json",
    "write_new",
]
