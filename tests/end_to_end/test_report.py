"""The page that a run writes about itself."""

from __future__ import annotations

import html
import shutil
import warnings

from helpers.browser import WIDTHS, look_at
from helpers.command import minitron_here
from helpers.finished_run import STAGES, results
from helpers.report_page import ELEMENTS, ReportPage, drawn
from helpers.tiny import DISTILL_STEPS

from minitron_platform.locations import resolve_locations
from minitron_platform.report.curves import MAX_ROWS
from minitron_platform.report.finished_run import finished_run
from minitron_platform.report.page import page


def test_the_report_is_one_file_without_requests_and_its_charts_have_data(finished):
    text = next((finished.folder / "runs" / "runs").glob("*/report.html")).read_text()
    page = ReportPage(text)
    assert page.elements <= ELEMENTS
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert "default-src 'none'" in page.policy
    assert len(page.code) == 1 == len(page.allowed_code())
    done = results(finished.folder)
    first = {name: next(iter(chart["views"])) for name, chart in page.charts.items()}
    quality, benchmarks, candidates, curves, layers, _, stages = page.charts
    assert len(page.charts[quality]["views"]) == 4 * 3  # loss, KL, agreement and a benchmark against three costs
    assert drawn(page.charts[quality], first[quality]) >= 3
    assert drawn(page.charts[benchmarks], first[benchmarks]) == 2 * 3  # a point and its error for each model
    assert set(page.charts[candidates]["views"]) == {"size", "compute", "memory", "training"}
    assert drawn(page.charts[candidates], "memory") >= len(done["search"]["ranking"])
    assert drawn(page.charts[layers], first[layers]) == 2 * done["teacher"]["architecture"]["num_layers"]
    assert drawn(page.charts[curves], first[curves]) >= DISTILL_STEPS
    table = text.partition("The curves as a table")[2].partition("</table>")[0]
    steps = set(range(1, DISTILL_STEPS + 1, -(-DISTILL_STEPS // MAX_ROWS))) | {DISTILL_STEPS}
    assert table.count("<tr>") - 1 == len(steps) + 2  # before and after on the held-out rows
    assert drawn(page.charts[stages], first[stages]) == len(STAGES)


def test_the_report_fits_phones_and_desktops_in_light_and_dark_in_chromium(finished, tmp_path):
    chromium = shutil.which("chromium")  # of Debian's package; CI has it
    if chromium is None:
        warnings.warn("the report was not looked at: Chromium is not installed", stacklevel=1)
        return
    report = next((finished.folder / "runs" / "runs").glob("*/report.html")).read_text()
    seen, said = look_at(report, chromium, tmp_path)
    assert said == []
    assert {(each["width"], each["dark"]) for each in seen} == {(w, dark) for w in WIDTHS for dark in (False, True)}
    for each in seen:
        assert each["shown"] <= each["window"] <= each["width"]
        assert each["outside"] == []  # nothing is cut off at the right
        assert (each["charts"], each["empty"]) == (7, [])
        assert each["texts"] > 100
        assert each["faint"] == []  # contrast below 4.5 to 1


def test_texts_of_others_are_text_in_the_report(finished):
    evil = '</script><img src=x onerror="alert(1)">\x1b]0;owned\x07'
    state = finished_run(
        resolve_locations(str(finished.folder / "runs")), next((finished.folder / "runs" / "runs").glob("*-*")).name
    )
    (member,) = state.recipe.family
    changes = {"description": evil, "family": [member.model_copy(update={"model": evil})]}
    state.recipe = state.recipe.model_copy(update=changes)
    state.family = {evil: state.family[member.model]}
    text = page([state])
    shown = ReportPage(text)
    assert shown.elements <= ELEMENTS
    assert len(shown.code) == 1 == len(shown.allowed_code())
    assert html.escape("<img src=x") in text
    assert any(row.get("name", "").startswith("</script><img") for row in shown.charts["chart-1"]["rows"])
    assert "\x1b" not in text + str(shown.charts)


def test_runs_are_compared_on_one_page_and_one_is_written_again(finished, tmp_path):
    for name in ("stages", "trials", "runs"):
        shutil.copytree(finished.folder / "runs" / name, tmp_path / "runs" / name)
    (one,) = (tmp_path / "runs" / "runs").iterdir()
    other = one.with_name("other-1f")
    shutil.copytree(one, other)
    (other / "results.json").write_text((one / "results.json").read_text().replace(one.name, other.name))
    (one / "report.html").unlink()
    listed = minitron_here("report", "--storage", "runs", cwd=tmp_path)
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {one.name, other.name}
    again = minitron_here("report", one.name, "--storage", "runs", cwd=tmp_path)
    assert str(one / "report.html") in again.stdout.replace("\n", "")
    assert len(ReportPage((one / "report.html").read_text()).charts) == 7
    both = minitron_here("report", one.name, "other", "--storage", "runs", "--out", "both.html", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    text = (tmp_path / "both.html").read_text()
    page = ReportPage(text)
    assert page.elements <= ELEMENTS
    assert len(page.charts) == 2 + 2 * 5
    assert {row["name"] for row in page.charts["chart-1"]["rows"]} == {
        f"{run} {model}" for run in (one.name, other.name) for model in ("teacher", "tiny-student")
    }
    unknown = minitron_here("report", "absent", "--storage", "runs", cwd=tmp_path)
    assert unknown.returncode == 2
    assert other.name in unknown.stderr
