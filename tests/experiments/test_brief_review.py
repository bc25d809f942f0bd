"""`python -m experiments.brief_review` trains, measures and concludes; how fast, is not tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments import brief_review
from experiments.reporting import brief_review as report
from experiments.reporting.referee.study import FAILS, HOLDS
from experiments.runs import ledger

TINY = brief_review.Scale(
    {"cnn": ("cnn", {"channels": [4, 4]}), "mlp": ("mlp", {"hidden_sizes": [16]})},
    epochs=1,
    batch_size=64,
    accumulate=2,
    seeds=1,
)
COMMAND = ["--task", "digits", "--scale", "tiny", "--augment", "crop", "--steps", "30"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(brief_review.SCALES, "tiny", TINY)


@pytest.mark.slow
def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMMAND, "--runs-dir", str(tmp_path), "--models", "mlp"]
    assert brief_review.main([*arguments, "--variants", "baseline,accumulation,all"]) == 0
    out = capsys.readouterr().out
    assert "3 runs of 30 steps of 64 examples" in out
    assert "accumulation" in out

    folder = tmp_path / "brief_review-digits-tiny"
    assert (folder / "brief_review.png").read_bytes().startswith(b"\x89PNG")
    records = json.loads((folder / "results.json").read_text())["records"]
    rows = {row["variant"]: row for row in report.summarize(records)}
    assert list(rows) == ["baseline", "accumulation", "all"]
    assert rows["baseline"]["examples_per_second_ratio"] == 1
    assert rows["accumulation"]["bytes"] != rows["baseline"]["bytes"]
    # The same steps, up to rounding; bfloat16 rounds more.
    one, other, third = (record["loss"] for record in records)
    assert one == pytest.approx(other, rel=1e-4)
    assert one == pytest.approx(third, rel=0.05)
    assert one != third

    # The same command has nothing left to do; another study needs another folder.
    assert brief_review.main([*arguments, "--variants", "baseline,accumulation,all"]) == 0
    assert json.loads((folder / "results.json").read_text())["records"] == records
    assert brief_review.main([*arguments, "--variants", "all"]) == 2
    assert "holds a study with variants" in capsys.readouterr().err


def test_ratios_and_spread() -> None:
    def record(variant: str, seed: int, **values: Any) -> dict[str, Any]:
        numbers = {"examples_per_second": 10.0, "bytes": 100, "accuracy": 0.5, "loss": 1.0}
        return {"model": "m", "variant": variant, "seed": seed} | numbers | values

    records = [
        record("baseline", 0, examples_per_second=8.0),
        record("baseline", 1, examples_per_second=12.0, accuracy=0.7),
        record("all", 0, examples_per_second=30.0, bytes=25, accuracy=None),
        record("all", 1, examples_per_second=30.0, bytes=25),
    ]
    base, other = report.summarize(records)
    assert base["examples_per_second"] == 10
    assert (base["accuracy"], base["accuracy_error"]) == pytest.approx((0.6, 0.1))
    assert (other["examples_per_second_ratio"], other["bytes_ratio"]) == (3, 0.25)
    assert other["accuracy"] is None  # one diverged
    about = dict.fromkeys(("scale", "budget", "command", "run", "date"), "") | {"versions": {}}
    lines = {line["claim"]: line for line in report.entries(records, about)}
    assert set(lines) == {"d", "g"}
    assert set(lines["d"]) >= set(ledger.FIELDS)
    assert (lines["d"]["verdict"], lines["g"]["verdict"]) == (HOLDS, FAILS)
    assert lines["d"]["estimate"] == pytest.approx(math.log(30) - math.log(8 * 12) / 2)
    assert (lines["d"]["runs"], lines["d"]["diverged"]) == (4, 1)
    (alone,) = report.summarize(records[2:])
    assert alone["bytes_ratio"] is None
    assert report.table([base, other]).row_count == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "unknown scale 'huge'; valid: small, full, tiny"),
        (["--models", "cnn,lenet"], "unknown model 'lenet'; valid: cnn, mlp"),
        (["--variants", "fast"], "unknown variant 'fast'"),
        (["--precision", "f8"], "unknown precision 'f8'; valid: bf16, f16"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--accumulate", "1"], "--accumulate must be at least 2, got 1"),
        (["--steps", "5"], "--steps must be more than 5"),
        (["--task", "sst2_1k"], "sst2_1k"),
    ],
)
def test_wrong_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert brief_review.main([*COMMAND, "--runs-dir", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
