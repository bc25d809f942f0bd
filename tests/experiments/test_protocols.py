"""`python -m experiments.protocols` as a person types it, on a study that trains nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from experiments import protocols
from experiments.cli import UsageError
from experiments.reporting import tables
from experiments.reporting.referee import protocols as report
from experiments.reporting.referee.judging import (
    AllOf,
    ByBootstrap,
    InEverySeed,
    LowerError,
    Within,
)
from experiments.reporting.referee.protocols import (
    ERROR,
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)
from experiments.reporting.referee.study import FAILS, HOLDS, Results
from experiments.runs import ledger

RATES = (0.1, 0.2, 0.4)
TINY = ("tiny", "--name", "tiny")


class Runner:
    """A run's error is its bias plus the distance of its rate from .2, and a little of its seed."""

    trained: ClassVar[list[tuple[str, float, int]]] = []
    interrupt_after = math.inf

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        self.setting = setting

    def config(self) -> dict[str, Any]:
        return {"checksum": 1}

    def gradients(self, options: Mapping[str, Any]) -> float:
        return 100.0

    def seconds(self) -> float:
        return 0.036

    def run(
        self, options: Mapping[str, Any], runs: Sequence[tuple[float, int]]
    ) -> Iterator[dict[str, Any]]:
        for rate, seed in runs:
            if len(self.trained) >= self.interrupt_after:
                raise KeyboardInterrupt
            self.trained.append((options["as"], rate, seed))
            error = self.setting["base"] + options["bias"] + abs(rate - 0.2) + 0.001 * seed
            lost = math.nan if options["bias"] > 0.3 else error
            yield {"validation": lost, "error": lost, "state": options["bias"], "curve": [error, 1]}


def member(name: str, bias: float, rates: tuple[float, ...] = RATES) -> Contestant:
    return Contestant(name=name, options={"as": name, "bias": bias}, learning_rates=rates)


def study() -> Protocols:
    settings = tuple(
        Setting(
            name=name,
            options={"base": base},
            budget="100 steps",
            contestants=(member("Free", 0.1), member("Ours, 5 %", 0.0), member("Broken", 0.5)),
            files=name == "two",
        )
        for name, base in (("one", 0.1), ("two", 0.2))
    )

    def claim(name: str, judge: Any, measure: str = "error") -> Claim:
        return Claim(
            name=name, text=name, source="ours", criterion="> 0", judge=judge, measure=measure
        )

    ours = LowerError(method="Ours, 5 %", rival="Free", among=("one",))
    return Protocols(
        name="tiny",
        summary="a study that trains nothing",
        free_rival="Free",
        measures={"error": ERROR, "state": Measure(text="a number", worst=1.0, form=".2f")},
        scales={
            "smoke": Scale(settings=settings[:1], tuning_seeds=1, seeds=2),
            "small": Scale(settings=settings, tuning_seeds=2, seeds=3),
        },
        claims=(
            claim("a", ByBootstrap(ours, settings=False)),
            claim("b", InEverySeed(LowerError(method="Free", rival="Ours, 5 %", among=("one",)))),
            claim("c", InEverySeed(Within(method="Free", high=0.2, among=("one",))), "state"),
            claim("d", InEverySeed(AllOf((ours, Within(method="Broken", high=0.9))))),
            claim("e", InEverySeed(LowerError(method="Free", rival="Broken", among=("two",)))),
        ),
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and the study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(protocols.DATA, raising=False)
    monkeypatch.setattr(Runner, "trained", [])
    monkeypatch.setitem(protocols.STUDIES, "tiny", (study(), Runner))
    return tmp_path


def test_a_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert protocols.main((*TINY, "--data-dir", "DATA")) == 0
    out = capsys.readouterr().out
    ours = [run[1:] for run in Runner.trained if run[0] == "Ours, 5 %"][:9]
    assert ours == [(r, s) for r in RATES for s in (0, 1)] + [(0.2, s) for s in (2, 3, 4)]
    results = json.loads((here / "runs" / "tiny" / "results.json").read_text())
    assert results["chosen"]["one"] == {"Free": 0.2, "Ours, 5 %": 0.2, "Broken": 0.1}
    verdicts = {line["claim"]: line for line in results["verdicts"]}
    assert {name: line["verdict"] for name, line in verdicts.items()} == {
        "a": HOLDS,
        "b": FAILS,
        "c": HOLDS,
        "d": FAILS,
        "e": HOLDS,
    }
    assert verdicts["a"]["estimate"] == pytest.approx(0.1)
    assert verdicts["b"]["note"] == "0 of 3 seeds"
    assert verdicts["e"]["note"] == "3 of 3 seeds; tuned to other rates: Free 0.2, Broken 0.1"
    assert (verdicts["a"]["unit"], verdicts["c"]["unit"]) == ("error", "state")
    assert verdicts["a"]["runs"] == 18
    assert verdicts["a"]["diverged"] == 6
    assert verdicts["a"]["command"].endswith("protocols tiny --scale small --data-dir DATA")
    assert ledger.read(here / "evidence" / "tiny.jsonl") == results["verdicts"]
    assert "10.30 ± 0.06" in out
    assert " 0.10" in out
    assert "3 diverged" in out


def test_settings_without_their_files_are_left_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert protocols.main((*TINY, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert Runner.trained == []
    assert not (here / "runs").exists()
    # 3 contestants x (3 rates x 2 + 3) runs of 100 gradients of 0.036 seconds.
    assert "27, finished ones included" in out
    assert "about 2 min" in out
    assert protocols.main(TINY) == 0
    out = capsys.readouterr().out
    assert "left out: two" in out
    assert "(e)" not in out
    lines = ledger.read(here / "evidence" / "tiny.jsonl")
    assert [line["claim"] for line in lines] == ["a", "b", "c", "d"]


def test_an_interrupted_study_continues(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*TINY, "--scale", "smoke")
    monkeypatch.setattr(Runner, "interrupt_after", 7)
    assert protocols.main(arguments) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(Runner, "interrupt_after", math.inf)
    assert protocols.main(arguments) == 0
    assert len(Runner.trained) == len(set(Runner.trained)) == 15
    assert not (here / "evidence").exists()  # what is tried out is no evidence
    assert protocols.main((*TINY, "--scale", "small")) == 2
    assert "holds a study with scale smoke, now small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no study given; valid:\n  feedback "),
        (("huge",), "unknown study 'huge'; valid: "),
        ((*TINY, "--settings", "one,three"), "unknown setting 'three'; valid: one, two"),
    ],
)
def test_wrong_input(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert protocols.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_study_is_fair() -> None:
    for name in protocols.STUDIES:
        found, _ = protocols.find_study(name)
        assert found.name == name


def test_unfair_studies_are_refused() -> None:
    fair = study()
    fair.check()
    (setting, _), first = fair.scales["small"].settings, fair.claims[0]

    def of(*contestants: Contestant, seeds: int = 3) -> dict[str, Any]:
        changed = dataclasses.replace(setting, contestants=contestants)
        return {"scales": {"small": Scale(settings=(changed,), tuning_seeds=1, seeds=seeds)}}

    free, ours = setting.contestants[:2]
    cases: list[tuple[dict[str, Any], str]] = [
        (of(free, member("Ours, 5 %", 0.0, (0.1,))), "Ours, 5 % has 1 rate, Free has 3"),
        (of(ours), "lacks Free"),
        (of(free, ours, member("ours 5", 0.0)), "'ours_5' is there more than once"),
        (of(free, ours, seeds=1), "2 or more for the final runs, got 1 and 1"),
        ({"claims": (dataclasses.replace(first, criterion=" "),)}, "has no criterion"),
        ({"claims": (dataclasses.replace(first, measure="eror"),)}, "unknown measure of claim"),
        ({"claims": (first, first)}, "claim 'a' is there more than once"),
        (of(free, member("Others", 0.0)), "claim 'a' is about settings or contestants"),
    ]
    for change, message in cases:
        changed = dataclasses.replace(fair, **{"claims": fair.claims[:1], **change})
        with pytest.raises(UsageError, match=message):
            changed.check()


def test_a_run_without_an_optional_score_has_not_diverged() -> None:
    fair = study()
    may = dataclasses.replace(fair.measures["state"], optional=True)
    studied = dataclasses.replace(fair, measures={**fair.measures, "state": may})
    (setting, _) = studied.scales["small"].settings
    run = {"seed": 1, "learning_rate": 0.1, "scores": {"error": 0.1, "state": None}}
    assert not report.diverged(studied, run)
    assert report.diverged(fair, run)
    final = {each.name: [run] for each in setting.contestants}
    chosen = dict.fromkeys(final, 0.1)
    for which, word in ((studied, "1 without"), (fair, "1 diverged")):
        _, rows = tables.plain(report.scores_table(which, setting, chosen, final))
        assert rows[0][-1] == word


def test_a_claim_about_two_bounds() -> None:
    results = Results.of_errors(["s"], ["m"], np.array([[[0.2, 0.4, 0.9]]]), "x")
    found = InEverySeed(Within(method="m", low=0.3, high=1.0))(results)
    assert found.verdict == FAILS
    np.testing.assert_allclose((found.low, found.high), (-0.1, 0.1))
    assert found.note == "2 of 3 seeds"
    for lost in (np.inf, np.nan):  # diverged, or without the score
        results = Results.of_errors(["s"], ["m"], np.array([[[0.4, lost]]]), "x")
        found = InEverySeed(Within(method="m", low=0.3, high=1.0))(results)
        assert (found.verdict, found.note) == (FAILS, "1 of 2 seeds")
        assert found.estimate is found.low is found.high is None


def test_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("fine_tuning", "--scale", "smoke", "--name", "smoke")
    assert protocols.main(arguments) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    scores = {name: runs[0]["scores"] for name, runs in results["final"]["digits"].items()}
    assert scores["Full"]["state"] == scores["Full"]["trained"] == 1.0
    # 16 x 64 + 16 entries, of which 52 and 1 are trained, beside all 170 of the new layer: a moment
    # of each, and 10 of the old last layer's 170 gradients, which are zero.
    trained = (52 + 1 + 9 + 1 + 170) / (1040 + 170 + 170)
    assert scores["SIFT, 5 %"]["trained"] == pytest.approx(trained, rel=1e-6)
    assert 0 < scores["SIFT, 5 %"]["outside"] < 1 - 53 / 1210  # less than of any entries
    assert [line["claim"] for line in results["verdicts"]] == ["h"]
    assert protocols.main((*arguments, "--dry-run")) == 0


@pytest.mark.slow
def test_feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("feedback", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    final = results["final"]["CNN, 50 %"]
    for name, runs in final.items():
        for scores in (run["scores"] for run in runs):
            angles = np.reshape(scores["angles"], (5, 3))  # at five times, of three layers
            if name == "Back-propagation":
                assert angles.max() < 0.1
                continue
            # The gradient of the last layer is the true one.
            assert angles[:, 2].max() < 0.1
            assert 20 < angles[:, :2].max() < 160
            assert scores["angle"] == pytest.approx(angles[2].max(), abs=1e-3)  # two steps
    assert [line["claim"] for line in results["verdicts"]] == ["a"]


def test_help_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        protocols.main(("--help",))
    assert set(protocols.STUDIES) <= set(re.findall(r"\w+", capsys.readouterr().out))


@pytest.mark.slow
def test_sampled_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("sampled_operations", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    final = results["final"]["digits"]
    scores = {name: runs[0]["scores"] for name, runs in final.items()}
    assert scores["Exact"]["flops"] == 1
    assert scores["Exact"]["bias"] == scores["Exact"]["variance"] == 0
    assert scores["Top-k, 40 %"]["variance"] < 1e-6 < scores["CRS, 40 %"]["variance"]
    assert 0.3 < scores["Top-k, 40 %"]["flops"] < 0.7
    assert {line["claim"] for line in results["verdicts"]} == {"a", "b", "c", "d"}


@pytest.mark.slow
def test_equilibrium_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("equilibrium_flow", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    final = results["final"]["moving_digits"]
    for runs in final.values():
        for scores in (run["scores"] for run in runs):
            cold, warm = (
                np.array(scores[f"steps of pairs {kind}"]) for kind in ("from zeros", "with reuse")
            )
            assert cold.shape == warm.shape == (7,)
            assert cold[0] == warm[0]  # the first pair has no past
            assert scores["steps"] == pytest.approx(cold[1:].mean(), rel=1e-5)
            assert scores["reuse"] == pytest.approx(warm[1:].mean() / cold[1:].mean(), rel=1e-5)
            assert min(scores["epe"], scores["digit"]) > 0
    one, three = (final[name][0]["scores"]["epe"] for name in ("One output", "Three corrections"))
    assert one != three
    assert [line["claim"] for line in results["verdicts"]] == ["a", "b", "c"]


@pytest.mark.slow
def test_local_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("local_losses", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    runs = results["final"]["digits"]["Forward, local, activations, 1 pass"]
    for scores in (run["scores"] for run in runs):
        assert scores["noise of groups"][1] == pytest.approx(
            scores["noise of groups"][0] * 2 ** scores["slope"], rel=1e-3
        )
        # Of few estimates, so that they are far from what many would give.
        assert 0.5 < scores["closed"] < 1.5
        assert 0 < scores["angle"] < 1 < scores["noise"]
        assert len(scores["cosines"]) == 4  # two layers with bias
    assert [line["claim"] for line in results["verdicts"]] == ["e", "f"]


@pytest.mark.slow
def test_low_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinyshakespeare.txt").write_text(
        "To be, or not to be: that is the question.\n" * 99
    )
    arguments = ("low_memory", "--scale", "smoke", "--name", "smoke", "--data-dir", str(tmp_path))
    assert protocols.main(arguments) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    final = results["final"]["tiny_shakespeare"]
    scores = {name: runs[0]["scores"] for name, runs in final.items()}
    assert scores["Adam"]["state"] == 1 > scores["GaLore, high rank, short period"]["state"]
    assert scores["GaLore, high rank, short period"]["refresh"] > 0
    assert 0.25 <= scores["AdaRankGrad"]["rank"] <= 1
    assert len(scores["AdaRankGrad"]["rank of matrix 0"]) == 4  # each step was read
    assert [line["claim"] for line in results["verdicts"]] == ["a", "b", "c", "d"]


def test_skipped_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("skipped_epochs", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    scores = {name: runs[0]["scores"] for name, runs in results["final"]["digits"].items()}
    # Of nine epochs that of number 7 is skipped; without it, and without a sample, others differ.
    assert {name: each["gradients"] for name, each in scores.items()} == pytest.approx(
        {"30 epochs": 1.0, "22 epochs": 8 / 9, "GradSamp, tensor": 8 / 9}, rel=1e-6
    )
    assert len({each["error"] for each in scores.values()}) > 1
    assert [line["claim"] for line in results["verdicts"]] == ["a"]


def test_continual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("continual", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    final = results["final"]["digits_50"]
    for runs in final.values():
        assert [run["scores"]["sparsity"] for run in runs] == [0.5, 0.5]
        assert len(runs[0]["scores"]["real_increase"]) == 5
    one, other = (final[name][0]["scores"]["real_increase"] for name in ("Magnitude", "Directed"))
    assert one != other
    assert [line["claim"] for line in results["verdicts"]] == ["d1c"]


@pytest.mark.slow
def test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert protocols.main(("scale", "--scale", "smoke", "--name", "smoke")) == 0
    results = json.loads((tmp_path / "runs" / "smoke" / "results.json").read_text())
    final = results["final"]["digits"]
    scores = {name: [run["scores"] for run in runs] for name, runs in final.items()}
    assert [each["stitched"] for each in scores["Regular"]] == [0, 0]
    assert [each["stitched"] for each in scores["Stitched"]] == [1, 1]
    assert [each["seen"] for each in scores["Stitched"]] == [4, 4]
    # Without stitching both readings are of the same step, and with it of another one.
    for each in scores["Regular"]:
        assert each["ap"] == each["ap (pictures)"]
    # The random mix has as many stitched batches as the run with feedback, of each seed.
    for mixed, led in zip(scores["Random mix"], scores["Feedback, box loss"], strict=True):
        assert mixed["stitched"] == led["stitched"]
        assert 1 / 6 <= led["stitched"] < 1  # the first batch is stitched
    assert [line["claim"] for line in results["verdicts"]] == ["a", "b", "c", "d", "e"]
