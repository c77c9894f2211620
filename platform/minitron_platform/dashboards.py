"""The Grafana dashboard and the Prometheus alerts that ship with Minitron: written to a folder, or installed in a Grafana."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from minitron.errors import InputError, MinitronError, one_line
from minitron.loopback import is_loopback
from minitron.storage import disk_errors, redact
from minitron_platform.posting import post_json
from minitron_platform.shipped_files import data_folder

FILES = ("grafana/minitron.json", "prometheus/alerts.yml", "prometheus/prometheus.yml")
PROVIDER = "grafana/provisioning.yml"
SECONDS = 30.0  # that Grafana has for its answer


def export_dashboards(folder: str | Path) -> list[Path]:
    """Write the dashboard, what makes Grafana find it, the alerts and a configuration of Prometheus; returns their paths.

    Raises StorageError if the folder cannot be written.
    """
    target = Path(folder).absolute()
    provider = {
        "name": "minitron",
        "folder": "Minitron",
        "type": "file",
        "options": {"path": str(target / "grafana")},
    }
    contents = {name: (data_folder("dashboards") / name).read_text(encoding="utf-8") for name in FILES}
    contents[PROVIDER] = yaml.safe_dump({"apiVersion": 1, "providers": [provider]}, sort_keys=False)
    with disk_errors(str(target)):
        for name, text in contents.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text, encoding="utf-8")
    return [target / name for name in contents]


def install_dashboard(address: str, token: str, *, insecure: bool = False) -> str:
    """Create the dashboard in the Grafana at `address`, or replace an earlier one; returns the dashboard's address.

    token: of a service account that may edit dashboards. insecure: allow an unencrypted address of another machine.
    Raises InputError for an address or token that cannot be used, MinitronError if Grafana refuses or does not answer.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise InputError(
            f"Grafana's address {redact(address)!r} is not supported",
            "give http(s)://HOST:PORT, and the token by itself",
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
        raise InputError(
            f"Grafana's address {address!r}: the token would be sent to another machine without encryption",
            "use https://, or forward the port; in a network where nobody can listen, use --insecure",
        )
    if not token:
        raise InputError(
            "Grafana's token is not set", "set GRAFANA_TOKEN to that of a service account with the role Editor"
        )
    dashboard = json.loads((data_folder("dashboards") / FILES[0]).read_text(encoding="utf-8"))
    body = json.dumps({"dashboard": dashboard, "overwrite": True, "message": "minitron dashboards install"}).encode()
    base = address.rstrip("/")
    try:
        answer = post_json(
            f"{base}/api/dashboards/db", body, timeout=SECONDS, headers={"Authorization": f"Bearer {token}"}
        )
        path = str(json.loads(answer).get("url", ""))
    except (urllib.error.URLError, OSError, ValueError, AttributeError) as error:
        raise MinitronError(
            f"Grafana at {address!r} has not taken the dashboard: {one_line(error)}",
            "check the address and GRAFANA_TOKEN, or import the file that `minitron dashboards export` writes",
        ) from error
    return f"{base}{path[path.find('/d/') :]}" if "/d/" in path else base
