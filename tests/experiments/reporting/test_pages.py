"""The page that is made of what a study printed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from experiments import cli
from experiments.reporting import pages, tables


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    task: str = "digits"
    rounds: int = 5
    seed: int = 1
    quick: bool = False
    runs_dir: Path = Path("runs")
    name: str | None = None


def test_page_of_a_study() -> None:
    console = cli.console(80, quiet=True)
    console.print("text with <angle> [brackets]")
    view = tables.table(["way", "ms\nper step"], "a title")
    view.add_row("plain", "1,234.5 (1,000–2,000)")
    view.add_row("whole", "", style="bold")
    console.print(view)
    options = Options(rounds=7, seed=0, runs_dir=Path("/somewhere"), name="mine")
    picture = {"a picture": b"<svg/>"}
    page = pages.study("Head & line", "python -m x", options, console.printed, picture)
    assert "<h1>Head &amp; line</h1>" in page
    assert "text with &lt;angle&gt; [brackets]</p>" in page
    assert "<h2>a title</h2>" in page
    assert re.findall(r"<th .*>(.*)</th>", page) == ["way", "ms per step"]
    assert '<td title="ms per step: 1,234.5 (1,000–2,000)">1,234.5 (1,000–2,000)</td>' in page
    assert page.count('<tr class="best">') == 1
    assert "data:image/svg+xml;base64,PHN2Zy8+" in page
    assert "<td>python -m x --rounds 7 --seed 0</td>" in page
    assert "<td>seed</td><td>0</td>" in page
    assert "<td>quick</td>" not in page
    assert "/somewhere" not in page
    assert "mine" not in page
