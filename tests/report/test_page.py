"""The page escapes text from runs, requests nothing, and fits wide and narrow screens (in headless Chromium)."""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest

from roundoff.report.assemble import build_report
from roundoff.report.render import markdown, page
from roundoff.runs.record import find_runs
from tests.report.test_sections import declared, scan
from tests.simulated import experiment, quickstart, write_run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)
PROBE = """<script>
const rows = () => [...document.querySelectorAll("#scores tbody tr[data-search]")];
const found = { inner: innerWidth, page: document.documentElement.scrollWidth };
document.querySelectorAll("#scores thead th")[2].click();
found.sorted = rows().map((row) => Number(row.children[2].dataset.value));
const box = document.getElementById("filter");
box.value = "MXFP4";
box.dispatchEvent(new Event("input"));
found.filtered = rows().filter((row) => !row.hidden).length;
parent.document.title = JSON.stringify(found);
</script>"""


def hostile_runs(root: Path) -> None:
    """Two arms whose names and responses try to break out of the page."""
    rng = np.random.default_rng(0)
    for name, rate in (("a", 0.6), ("b", 0.5)):
        for seed in range(3):
            solved = (rng.random(60) < rate).astype(float)
            what = experiment(name, title=HOSTILE, family=HOSTILE, baseline="a" if name == "b" else None)
            write_run(root, what, seed, solved, solved, text=HOSTILE)
    write_run(root, experiment("c", title=HOSTILE), 0, solved, solved, reached=10, state="failed", text=HOSTILE)


def test_text_from_runs_is_escaped(tmp_path: Path) -> None:
    hostile_runs(tmp_path)
    report = build_report(find_runs([tmp_path])[0], [HOSTILE])
    html = page(report)
    assert "<script>alert" not in html and "<img" not in html
    assert html.count("&lt;script&gt;alert(1)") > 10
    assert "{{ 7*7 }}" in html
    assert len(re.findall(r"<script", html)) == 1
    assert "<script" not in markdown(report)


def test_the_page_makes_no_requests(tmp_path: Path) -> None:
    quickstart(tmp_path, problems=50)
    html = page(build_report(*find_runs([tmp_path])))
    assert "default-src 'none'" in html
    links = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']([^"']*)""", html)
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"url\(|@import|https?://", html)


def test_a_report_without_any_score_is_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, experiment("a"), 0, np.ones(5), np.ones(5), reached=10, state="failed")
    report = build_report(*find_runs([tmp_path]))
    html = page(report)
    assert "No run of this family is complete yet." in html and "failed at step 10 of 40: killed" in html
    assert "1 run of 1 experiment, 1 of them without a final score" in html
    assert "failed at step 10" in markdown(report)


def browse(html: str, width: int, scratch: Path) -> tuple[dict, str, list[str]]:
    """Sizes of the page in a frame (a window is never below 500 px), the console, and the requested addresses."""
    assert CHROMIUM
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{escape(html)}"></iframe>'
    outer, log = scratch / "outer.html", scratch / "net.json"
    outer.write_text(f'<!doctype html><link rel="icon" href="data:,"><title></title>{frame}', "utf-8")
    own = [f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom"]
    command = [CHROMIUM, *FLAGS, *own, outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.+?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    urls = re.findall(r'"url":"((?:https?|wss?|ftp):[^"]*)"', log.read_text("utf-8", "replace"))
    asked = [url for url in urls if not re.match(r"https?://[\w.-]+\.(google|googleapis|gvt1)\.com[/:]", url)]
    return json.loads(title[1]), "\n".join(re.findall(r".*CONSOLE.*", done.stderr)), asked


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install the package `chromium`")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("runs", ["quickstart", "hostile", "declared"])
def test_the_page_fits_the_width_of_a_browser(tmp_path: Path, width: int, runs: str) -> None:
    if runs == "declared":
        report = declared(tmp_path / "runs", scans={"E5": scan(), "E5b": scan(tokens=512)})
    else:
        (quickstart if runs == "quickstart" else hostile_runs)(tmp_path / "runs")
        report = build_report(*find_runs([tmp_path / "runs"]))
    html = page(report).replace("</body>", PROBE + "</body>")
    found, console, urls = browse(html, width, tmp_path)
    assert found["inner"] == width
    assert found["page"] <= width
    assert console == ""
    assert urls == []
    if runs == "quickstart":
        assert found["sorted"] == sorted(found["sorted"], reverse=True)
        assert found["filtered"] == 1
