"""The Grafana dashboard and the Prometheus alerts: made of metrics that exist, and installed where the user says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from helpers.command import minitron_here
from helpers.serving import serving

from minitron_platform.monitoring import METRICS, Monitor

FOLDER = Path(__file__).resolve().parents[2] / "dashboards"
DASHBOARD = FOLDER / "grafana" / "minitron.json"
ALERTS = FOLDER / "prometheus" / "alerts.yml"
# Ray's own of its nodes
NODES = {"gpus_utilization", "gram_used", "mem_used_host", "cpu_utilization"}


def _rules():
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


def _metrics(expressions):
    """The names of Minitron's metrics in PromQL expressions, which have no metrics but these and Ray's of its nodes."""
    names = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    assert {name.removeprefix("ray_node_") for name in names if name.startswith("ray_node_")} <= NODES
    return {name.removeprefix("ray_minitron_") for name in names if not name.startswith("ray_node_")}


def test_the_dashboard_is_that_of_its_generator_and_of_grafanas_types(tmp_path):
    subprocess.run([sys.executable, FOLDER / "grafana" / "make.py", tmp_path / "made.json"], check=True)
    assert DASHBOARD.read_text() == (tmp_path / "made.json").read_text(), "run `make dashboards`"
    stored = json.loads(DASHBOARD.read_text())
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(stored))) == stored


def test_the_dashboard_shows_metrics_that_exist_and_leaves_few_out():
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    shown = _metrics(target["expr"] for panel in panels for target in panel["targets"])
    assert shown == METRICS.keys() - {"step", "tokens", "heldout_loss", "stage_seconds"}
    assert all(panel["title"] and panel["description"] for panel in panels)


def test_the_alerts_are_about_metrics_that_exist_and_each_is_tested():
    assert _metrics(rule["expr"] for rule in _rules()) <= METRICS.keys()
    tests = yaml.safe_load(ALERTS.with_name("alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in _rules():
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys()
        raised = {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == rule["alert"]}
        assert raised == {True, False}, rule["alert"]  # a case in which it is raised, and one in which it is not
    if promtool := shutil.which("promtool"):  # of Debian's package prometheus; those without have the checks above
        subprocess.run([promtool, "test", "rules", ALERTS.with_name("alerts.test.yml")], check=True)


def test_the_dashboard_and_the_alerts_are_exported_for_grafana_and_prometheus(tmp_path):
    done = minitron_here("dashboards", "export", "there", cwd=tmp_path)
    assert done.returncode == 0
    assert {Path(line) for line in done.stdout.splitlines()} == {
        p for p in (tmp_path / "there").rglob("*") if p.is_file()
    }
    (provider,) = yaml.safe_load((tmp_path / "there/grafana/provisioning.yml").read_text())["providers"]
    (dashboard,) = Path(provider["options"]["path"]).glob("*.json")
    assert json.loads(dashboard.read_text())["uid"] == "minitron"
    prometheus = tmp_path / "there" / "prometheus"
    (rules,) = yaml.safe_load((prometheus / "prometheus.yml").read_text())["rule_files"]
    assert (prometheus / rules).read_bytes() == ALERTS.read_bytes()


class _Grafana(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] == "Bearer test"
        self.send_response(200 if known else 401)
        self.end_headers()
        if known:
            self.server.taken[self.path] = body
            self.wfile.write(json.dumps({"uid": "minitron", "url": "/grafana/d/minitron/minitron"}).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def grafana():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Grafana)
    server.taken = {}
    with serving(server):
        yield server


def test_the_dashboard_is_installed_in_a_grafana_that_knows_the_token(grafana, tmp_path, monkeypatch):
    address = f"http://127.0.0.1:{grafana.server_port}/grafana/"
    monkeypatch.setenv("GRAFANA_TOKEN", "secret")
    refused = minitron_here("dashboards", "install", address, cwd=tmp_path)
    assert refused.returncode == 2
    assert "401" in refused.stderr
    assert "secret" not in refused.stderr
    monkeypatch.setenv("GRAFANA_TOKEN", "test")
    done = minitron_here("dashboards", "install", address, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{address}d/minitron/minitron" in done.stdout
    (path, body) = next(iter(grafana.taken.items()))
    assert path == "/grafana/api/dashboards/db"
    assert body["overwrite"] is True
    assert body["dashboard"] == json.loads(DASHBOARD.read_text())


@pytest.mark.parametrize("address", ["http://grafana.example", "http://me:test@127.0.0.1", "grafana.example"])
def test_the_token_is_sent_to_no_address_that_others_can_read_or_that_is_none(address, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFANA_TOKEN", "test")
    refused = minitron_here("dashboards", "install", address, cwd=tmp_path)
    assert refused.returncode == 2
    assert "Grafana's address" in refused.stderr
    assert ":test@" not in refused.stderr


def test_nothing_is_exported_while_another_thread_imports_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    with Monitor("run") as monitor:
        monitor.unsent(3)
