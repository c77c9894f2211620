"""Opens a report in Chromium, as phones and desktops show it, in light and dark, and as a PDF.

    python -m benchmarks.report_page runs/runs/RUN/report.html --pictures FOLDER

Needs Chromium (Debian: apt-get install chromium) and `pip install playwright`, which are no dependencies of Minitron. For each
width and colour scheme it changes every switch of every chart, and ends with an error if the page is wider than the window, the
console has a message, a request is made, or a chart is empty.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

WIDTHS = (390, 768, 1400)
SCHEMES = ("light", "dark")
EMPTY = """() => [...document.querySelectorAll('figure[data-chart]')]
  .filter(figure => !figure.querySelector('.chart svg .role-mark path, .chart svg .role-mark line'))
  .map(figure => figure.querySelector('.title').textContent)"""
SIZE = "() => [document.documentElement.scrollWidth, window.innerWidth]"


def check(browser: Any, address: str, width: int, scheme: str, pictures: Path | None) -> list[str]:
    """The faults of the page at one width and colour scheme."""
    faults: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda request: request.url == address or faults.append(f"request: {request.url}"))
        page.goto(address)
        page.wait_for_function("() => !document.querySelector('.chart:not(.vega-embed)')")
        if pictures:
            page.screenshot(path=pictures / f"{width}-{scheme}.png", full_page=True)
            if (width, scheme) == (WIDTHS[-1], "light"):
                page.pdf(path=pictures / "printed.pdf", format="A4")
        states = 0
        for select in page.query_selector_all("select"):
            for option in select.query_selector_all("option"):
                select.select_option(option.text_content())
                page.wait_for_timeout(50)
                faults += [f"empty chart: {title}, {option.text_content()}" for title in page.evaluate(EMPTY)]
                states += 1
        shown, window = page.evaluate(SIZE)
        if shown > window:
            faults.append(f"{shown} pixels wide")
        charts = len(page.query_selector_all("figure[data-chart]"))
        print(f"{width} px, {scheme}: {charts} charts, {states} options, {len(faults)} faults")
    return [f"{width} px, {scheme}: {fault}" for fault in faults]


@click.command()
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--pictures", type=click.Path(file_okay=False, path_type=Path), help="Folder for screenshots and the PDF."
)
def main(report: Path, pictures: Path | None) -> None:
    from playwright.sync_api import sync_playwright

    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        sandbox = [] if sys.platform != "linux" else ["--no-sandbox"]  # in containers there is none
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        address = report.resolve().as_uri()
        faults = [fault for w in WIDTHS for s in SCHEMES for fault in check(browser, address, w, s, pictures)]
        browser.close()
    print(*faults, sep="\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
