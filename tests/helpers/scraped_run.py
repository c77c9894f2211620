"""A run of mixture.yaml in the current folder whose metrics are read at Ray's endpoint, in the middle of the distillation and
after the end. In a process of its own: how and how often a process sends metrics depends on the first Ray that it starts.

Writes scraped.json: what was printed, and the metrics as pairs of [name, tags without Ray's own] and value.
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from pathlib import Path
from unittest import mock

from helpers.command import minitron_here
from prometheus_client.parser import text_string_to_metric_families

from minitron_platform.cluster.ray_session import METRICS_PORT, ray_session
from minitron_platform.monitoring import Monitor

TAGS = ("part", "what", "kind", "state")


def exported(port, is_there):
    """Metrics at the endpoint once `is_there` is true of them, or after a minute: {(name, *tags): value}."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if "_minitron_" in sample.name]
        found = {
            (s.name, *sorted((k, v) for k, v in s.labels.items() if k in TAGS)): s.value
            for s in samples
            if s.labels["run"].startswith("mixture-")
        }
        if is_there(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def main():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ[METRICS_PORT] = str(port)
    during = {}

    def scraped(monitor, event):
        """The run goes on after the first step of its distillation when Ray's endpoint has the metrics of that step."""
        take_notice(monitor, event)
        if event["key"].endswith(".distill") and "tokens_per_second" in event.get("values", {}) and not during:
            during.update(exported(port, lambda found: ("ray_minitron_step", ("part", "distill")) in found))

    take_notice = Monitor.event
    with ray_session(None, num_cpus=2, seats=2), mock.patch.object(Monitor, "event", scraped):
        done = minitron_here("run", "mixture.yaml", "--storage", "mixture-runs", cwd=Path.cwd())
        assert done.returncode == 0, done.stdout + done.stderr
        after = exported(port, lambda found: found.get(("ray_minitron_running", ("kind", "run"), ("part", ""))) == 0)
    said = {"printed": done.stdout, "during": list(during.items()), "after": list(after.items())}
    Path("scraped.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
