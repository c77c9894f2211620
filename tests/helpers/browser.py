"""A report in Chromium, in frames of several widths, in light and in dark."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers.serving import serving

WIDTHS = (390, 768, 1400)
SECONDS = 240.0  # until the browser has answered
# A frame, because a window of Chromium has at least 500 pixels. What a frame prefers is the colour scheme of its element.
LOOK = """<!doctype html><meta charset="utf-8"><body><script>
const frames = WIDTHS.flatMap(width => ["light", "dark"].map(scheme => ({width, scheme})));
const luminance = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (view, element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = view.getComputedStyle(at).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
  return "none";
};
function contrast(view, element) {
  const style = view.getComputedStyle(element);
  const colours = [element.ownerSVGElement ? style.fill : style.color, ground(view, element)];
  const [low, high] = colours.map(luminance).sort((a, b) => a - b);
  return {text: element.textContent.trim().slice(0, 40), colours, value: (high + 0.05) / (low + 0.05)};
}
function look(frame) {
  const {contentDocument: page, contentWindow: view} = frame;
  const root = page.documentElement, right = root.clientWidth + 1;
  const texts = [...page.body.querySelectorAll("*")].filter(e => [...e.childNodes].some(
    n => n.nodeType === 3 && n.textContent.trim()) && !e.closest("script, select") && e.getClientRects().length);
  return {
    width: Number(frame.width), dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    shown: root.scrollWidth, window: root.clientWidth,
    outside: [...page.body.querySelectorAll("*")].filter(e => !e.closest(".wide") && e.getBoundingClientRect().right > right)
      .map(e => e.outerHTML.slice(0, 80)),
    charts: page.querySelectorAll("figure[data-chart]").length,
    empty: [...page.querySelectorAll("figure[data-chart]")]
      .filter(f => !f.querySelector(".chart svg .role-mark path, .chart svg .role-mark line"))
      .map(f => f.querySelector(".title").textContent),
    texts: texts.length,
    faint: texts.map(e => contrast(view, e)).filter(c => !(c.value >= 4.5)),
  };
}
// when a chart is not drawn in a minute and a half, it is reported as empty
const drawn = page => performance.now() > 90000 || !page.querySelector(".chart:not(.vega-embed)");
async function show({width, scheme}) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0; color-scheme: ${scheme}`;
  frame.width = width;
  frame.src = "/report.html";
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  while (!drawn(frame.contentDocument)) await new Promise(done => setTimeout(done, 20));
  await new Promise(done => setTimeout(done, 0));
  const seen = look(frame);
  frame.remove();
  return seen;
}
(async () => {
  const seen = [];
  for (const frame of frames) seen.push(await show(frame));
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


def look_at(report: str, chromium: str, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What Chromium shows of a report at each width and colour scheme, and what it says on its console.

    chromium: the program. folder: for its profile.
    """
    with _server(report) as (address, answers):
        # Chromium's own sandbox does not start as root, nor in most containers; the page is ours
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command += [f"--user-data-dir={folder}", "--no-first-run", "--disable-extensions", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        lines: list[str] = []
        assert browser.stderr is not None
        reader = threading.Thread(target=lines.extend, args=(browser.stderr,))
        reader.start()
        try:
            seen = answers.get(timeout=SECONDS)
        finally:
            browser.terminate()
            browser.wait(30)
            reader.join()
    return seen, [line for line in lines if ":CONSOLE" in line]


@contextmanager
def _server(report: str) -> Iterator[tuple[str, queue.Queue[Any]]]:
    answers: queue.Queue[Any] = queue.Queue()
    pages = {"/": LOOK.replace("WIDTHS", json.dumps(WIDTHS), 1), "/report.html": report}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(200 if page else 204)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def do_POST(self) -> None:
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}/", answers
