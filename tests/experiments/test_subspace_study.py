"""`python -m experiments.subspace_study` as a person types it, and what its report says."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import subspace_study
from experiments.reporting import subspace
from experiments.training import engine

TINY = ["--scale", "tiny", "--panels", "switch"]


def run(*arguments: str) -> int:
    try:
        return subspace_study.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def study() -> subspace_study.Study:
    """One for all tests: what it compiles, it compiles once."""
    return subspace_study.Study(subspace_study.resolve(subspace_study.Options(scale="tiny"))[0])


@pytest.fixture(scope="module")
def folder(study: subspace_study.Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run of one panel (and of alignment, where it starts)."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace_study, "Study", lambda plan: study)
        assert run(*TINY, "--runs-dir", str(runs), "--name", "a") == 0
    return runs / "a"


def again(folder: Path, *arguments: str) -> int:
    return run(*TINY, "--runs-dir", str(folder.parent), "--name", folder.name, *arguments)


def table(folder: Path, panel: str) -> list[dict[str, str]]:
    with (folder / f"{panel}.csv").open() as file:
        return list(csv.DictReader(file))


def test_files(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    panels = ("alignment", "switch")
    pictures = {f"{panel}.{kind}" for panel in panels for kind in ("png", "csv")}
    others = {
        "run.lock",
        "config.json",
        "units",
        "snapshots",
        "claims.json",
        "report.md",
        "report.html",
    }
    assert names == pictures | others
    for panel in panels:
        assert (folder / f"{panel}.png").read_bytes().startswith(b"\x89PNG")


def test_branches_leave_from_one_point(folder: Path) -> None:
    rows = table(folder, "switch")
    methods = {(row["method"], row["alpha"]) for row in rows}
    assert len(methods) == 3 + 2 * 3
    starts = {row["train_loss"] for row in rows if row["step"] == "20"}
    # The same weights; evaluated by the same program.
    assert len(starts) == 1
    ends = {row["train_loss"] for row in rows if row["step"] == "40"}
    assert len(ends) == len(methods)
    along = {row["step"]: row["train_loss"] for row in table(folder, "alignment")}
    assert along["20"] in starts
    # The branch (1, 1) is SGD itself, step by step.
    sgd = [row for row in rows if row["method"] == "sgd"]
    assert [along[row["step"]] for row in sgd] == [row["train_loss"] for row in sgd]


def test_alignment_is_measured(folder: Path) -> None:
    rows = table(folder, "alignment")
    solved = [row for row in rows if row["chi"]]
    assert [row["step"] for row in solved] == ["0", "10", "20", "30", "40"]
    for row in solved:
        assert row["converged"] == "True"
        values = [float(row[f"eigenvalue_{i}"]) for i in range(1, 15)]
        assert values == sorted(values, reverse=True)
        assert 0 < float(row["chi"]) <= 1
    # The tracked basis of the same point, on fewer examples.
    (switch,) = (row for row in solved if row["step"] == "20")
    assert float(switch["tracked_chi"]) == pytest.approx(float(switch["chi"]), abs=0.1)


def test_resumed_run_makes_the_same_files(
    folder: Path, study: subspace_study.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace_study, "Study", lambda plan: study)
    units = sorted((folder / "units").rglob("*.json"))
    assert len(units) == 1 + 9
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in units}
    report = (folder / "report.html").read_bytes()
    lost = folder / "units/switch/sgd-1.0-1.0-0.json"
    for path in (lost, folder / "report.html"):
        path.unlink()
    assert again(folder) == 0
    for path in units:
        time, content = before[path]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != lost)
    assert (folder / "report.html").read_bytes() == report


def test_nothing_is_trained_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(subspace_study.Study, "walk", fail)
    assert again(folder) == 0


def test_damaged_files_are_named(
    folder: Path,
    study: subspace_study.Study,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(subspace_study, "Study", lambda plan: study)
    unit = folder / "units/switch/sgd-1.0-1.0-0.json"
    snapshots = folder / "snapshots/seed0.npz"
    units = unit.read_bytes(), snapshots.read_bytes()
    for content in (b"null", b"[" * 100_000, b"\xff", units[0].replace(b'"step"', b'"stop"')):
        unit.write_bytes(content)
        assert again(folder) == 2
        error = capsys.readouterr().err
        assert f"{unit} is damaged" in error
        assert error.count("\n") == 1
    unit.unlink()  # its training starts from the snapshots
    for damaged in (None, b"", units[1][:-100], units[1].replace(b"0/0", b"0/9")):
        snapshots.unlink() if damaged is None else snapshots.write_bytes(damaged)
        assert again(folder) == 2
        error = capsys.readouterr().err
        assert "seed0.npz is missing or damaged" in error
        assert error.count("\n") == 1
    unit.write_bytes(units[0])
    snapshots.write_bytes(units[1])


def test_another_configuration_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert again(folder, "--learning-rate", "0.1") == 2
    error = capsys.readouterr().err
    assert "learning_rate 0.05, now 0.1" in error
    assert "--name" in error
    assert again(folder, "--loss", "cross_entropy") == 2
    assert "loss mse, now cross_entropy" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_strange_or_broken_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text('{"task": "digits"}')
    assert again(tmp_path / "a") == 2
    assert "not a study's folder" in capsys.readouterr().err
    (tmp_path / "a/config.json").write_text("{")
    assert again(tmp_path / "a") == 2
    assert f"{tmp_path / 'a/config.json'} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "mnist"], ["'mnist'", "digits", "mnist5k", "cifar10_5k", "sst2_1k"]),
        (["--loss", "hinge"], ["'hinge'", "cross_entropy", "mse"]),
        (["--scale", "huge"], ["'huge'", "small", "full"]),
        (["--panels", "switch,noisy"], ["'noisy'", "alignment", "noise"]),
        (["--panels", ","], ["--panels", "alignment"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--learning-rate", "-1"], ["--learning-rate must be more than 0"]),
        (["--switch-step", "0"], ["--switch-step must be at least 1, got 0"]),
        (["--name", "../x"], ["--name", "--runs-dir"]),
        (["--speed", "1"], ["--speed", "--scale", "--panels"]),
        (["--task", "mnist5k", "--data-dir", "nowhere"], ["nowhere"]),
    ],
)
def test_wrong_input_is_explained_and_nothing_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    for part in expected:
        assert part in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_panel_end_to_end(tmp_path: Path) -> None:
    arguments = ["--scale", "tiny", "--loss", "cross_entropy", "--seeds", "2", "--name", "a"]
    assert run(*arguments, "--runs-dir", str(tmp_path)) == 0
    claims = json.loads((tmp_path / "a/claims.json").read_text())
    assert len(claims) == len(subspace.CLAIMS)
    report = (tmp_path / "a/report.md").read_text()
    for panel, title in subspace.PANELS.items():
        assert f"## {title}" in report
        assert table(tmp_path / "a", panel)
    # Nothing but numbers and None: diverged runs of the stability panel did not stop it.
    values = {row["value"] for row in table(tmp_path / "a", "stability")}
    assert len(values) > 10


# Parts ------------------------------------------------------------------------------------------


@pytest.fixture
def plan(study: subspace_study.Study) -> subspace_study.Plan:
    return study.plan


def test_ablations_change_one_thing_at_a_time(plan: subspace_study.Plan) -> None:
    runs = list(subspace_study.ablations(plan, 0))
    center = {
        method: subspace_study.sgd(plan, 0, subspace_study.ABLATION_RATE, **changes)
        for method, changes in (
            ("sgd", {}),
            ("bulk", subspace_study.projected(plan, (0.0, 1.0))),
        )
    }
    for ablation, value, method, changed in runs:
        field = "directions" if ablation == "k" else ablation
        assert getattr(changed, field) == value
        assert (
            dataclasses.replace(changed, **{field: getattr(center[method], field)})
            == (center[method])
        )
    for method, expected in center.items():
        assert expected in [changed for _, _, name, changed in runs if name == method]


def test_update_products_are_those_of_the_formula() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(7, 3)))[0].T.astype(np.float32)
    gradient, before, after = random.normal(size=(3, 7)).astype(np.float32)
    inside = basis.T @ (basis @ gradient)
    outside, update = gradient - inside, after - before
    expected = [-update @ inside, inside @ inside, -update @ outside, outside @ outside]
    tree = [
        jax.tree.map(jnp.asarray, {"a": x[..., :4], "b": x[..., 4:]})
        for x in (basis, gradient, before, after)
    ]
    np.testing.assert_allclose(subspace_study.update_products(*tree), expected, rtol=1e-5)
    chi = subspace_study.alignment(*tree[:2])
    np.testing.assert_allclose(chi, np.linalg.norm(inside) / np.linalg.norm(gradient), rtol=1e-5)
    assert float(subspace_study.alignment(tree[0], jax.tree.map(jnp.zeros_like, tree[1]))) == 0


def test_sgd_that_diverges_is_an_error(
    study: subspace_study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = dataclasses.replace(study.plan, learning_rate=1e30, switch_step=1)
    monkeypatch.setattr(study, "plan", hot)
    with pytest.raises(subspace_study.UsageError, match=r"SGD diverges at learning rate 1e\+30"):
        subspace_study.follow_sgd(study, subspace_study.Store(tmp_path), 0)


def test_sgd_is_left_where_the_gradient_is_aligned(
    study: subspace_study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace_study, "SWITCH_ALIGNMENT", 0.1)
    store = subspace_study.Store(tmp_path)
    rows = subspace_study.follow_sgd(study, store, 0)
    (check,) = (row for row in rows if "tracked_chi" in row)  # the first one was enough
    assert check["step"] == 10
    assert check["tracked_average"] == check["tracked_chi"] > 0.1
    assert all(row["switch_step"] == 10 and row["aligned"] for row in rows)
    assert rows[-1]["step"] == 10 + study.plan.scale.steps
    kept = store.snapshots(0, study.start(0)[0])
    assert list(kept) == [10, 30]
    for step, params in kept.items():
        state = engine.TrainState(jnp.array(step), params, study.start(0)[1], ())
        (row,) = (row for row in rows if row["step"] == step)
        assert study.evaluate(state)["train_loss"] == row["train_loss"]


def test_diverging_branch_ends_early(study: subspace_study.Study) -> None:
    run = subspace_study.sgd(study.plan, 0, 1e30)
    rows = subspace_study.train_branch(study, run, study.start(0)[0], 0, 20)
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[0]["train_loss"] > 0
    assert rows[1]["train_loss"] is None


def test_effective_rate_of_full_batch_descent_is_the_rate(study: subspace_study.Study) -> None:
    descent = subspace_study.Run(0, 0.05, batch_size=len(study.plan.task.train))
    rows = subspace_study.effective_rates(study, descent)
    assert [row["step"] for row in rows] == [0, 20]
    for row in rows:
        assert row["dominant"] == pytest.approx(0.05, rel=1e-3)
        assert row["bulk"] == pytest.approx(0.05, rel=1e-3)


# Claims on made-up series -----------------------------------------------------------------------

STEPS = range(10)


def series(start: float, end: float, wiggle: float = 0.0) -> list[float]:
    """A geometric decay with every other value moved."""
    decay = (end / start) ** (1 / (len(STEPS) - 1))
    return [start * decay**i * (1 + wiggle * (i % 2)) for i in STEPS]


def branch(losses: list[float | None], **identity: object) -> subspace.Rows:
    return [
        {**identity, "step": step, "train_loss": loss, "test_accuracy": loss and 1 - loss / 10}
        for step, loss in enumerate(losses)
    ]


def switch_rows(*, dom: float, bulk: float, wiggle: float = 0.0, seed: int = 0) -> subspace.Rows:
    """SGD goes from 1 to 0.1; the others to given losses; the lines between are geometric."""
    rows = []
    ends = {"sgd": 0.1, "dom": dom, "bulk": bulk}
    for method, end in ends.items():
        a, b = subspace_study.METHODS[method]
        losses = series(1.0, end, 0.05 if method == "sgd" else wiggle)
        rows += branch(losses, method=method, alpha=None, a=a, b=b, seed=seed)
    for name, weights in subspace_study.LINES.items():
        first, last = (ends[end] for end in name.split("_to_"))
        for alpha in subspace_study.ALPHAS:
            a, b = weights(alpha)
            losses = series(1.0, first ** (1 - alpha) * last**alpha)
            rows += branch(losses, method=name, alpha=alpha, a=a, b=b, seed=seed)
    return rows


def stability_rows(bulk_ends: list[float | None], seed: int = 0) -> subspace.Rows:
    """SGD ends at 0.5 for every rate of 1, 2, 4, ... but the last, where it diverges."""
    rows = []
    for i, end in enumerate(bulk_ends):
        sgd_end = None if i == len(bulk_ends) - 1 else 0.5
        for method, value in (("sgd", sgd_end), ("bulk", end)):
            identity = {"ablation": "learning_rate", "value": 2.0**i, "method": method}
            rows += branch([1.0, None] if value is None else [1.0, value], **identity, seed=seed)
    return rows


def judged(name: str, rows: subspace.Rows) -> dict[str, object]:
    (claim,) = (claim for claim in subspace.CLAIMS if claim.name == name)
    return subspace.judge(claim, rows)


def alignment_rows(average: float, chi: float) -> subspace.Rows:
    rows = [{"seed": 0, "step": 0, "chi": 0.2, "switch_step": 20}]
    rows += [{"seed": 0, "step": 10, "tracked_average": average, "switch_step": 20}]
    return [*rows, {"seed": 0, "step": 20, "chi": chi, "switch_step": 20}]


def effective_rows(dominant: float, bulk: float) -> subspace.Rows:
    row = {"optimizer": "momentum", "seed": 0, "learning_rate": 0.1}
    first = {**row, "step": 0, "dominant": 100.0, "bulk": 0.0}  # does not count
    return [first, {**row, "step": 5, "dominant": dominant, "bulk": bulk}]


def noise_rows(sgd: float, gd: float) -> subspace.Rows:
    ends = {"sgd": sgd, "gd": gd}
    return [
        {"method": method, "seed": 0, "step": step, "train_loss": 0.1, "chi": chi}
        for method, end in ends.items()
        for step, chi in enumerate([0.97, end])
    ]


def energy_rows(**shares: float) -> subspace.Rows:
    return [
        {
            "seed": 0,
            "step": step,
            "operator": operator,
            "frobenius_share": share if step else 0.5,  # the untrained network does not count
            "frobenius_error": 0.01,
            "trace_share": share,
            "trace_error": 0.01,
        }
        for operator, share in shares.items()
        for step in (0, 5)
    ]


@pytest.mark.parametrize(
    ("name", "good", "good_number", "bad", "bad_number"),
    [
        ("gradient aligns early", alignment_rows(0.96, 0.9), 0.96, alignment_rows(0.5, 0.9), 0.5),
        ("alignment stays", alignment_rows(0.9, 0.95), 0.95, alignment_rows(0.9, 0.6), 0.6),
        (
            "Dom-SGD stalls",
            switch_rows(dom=1.0, bulk=0.1),
            0.0,
            switch_rows(dom=0.1, bulk=0.1, wiggle=0.05),
            1.0,
        ),
        (
            "Bulk-SGD tracks SGD",
            switch_rows(dom=1.0, bulk=0.1, wiggle=0.05),
            1.0,
            switch_rows(dom=1.0, bulk=1.0),
            0.0,
        ),
        (
            "Bulk-SGD is less noisy",
            switch_rows(dom=1.0, bulk=0.1, wiggle=0.01),
            math.log(1.01) / math.log(1.05),
            switch_rows(dom=1.0, bulk=0.1, wiggle=0.1),
            math.log(1.1) / math.log(1.05),
        ),
        (
            "Dom-SGD's loss rises",
            switch_rows(dom=1.5, bulk=0.1),
            1.5,
            switch_rows(dom=0.9, bulk=0.1),
            0.9,
        ),
        ("momentum favors the bulk", effective_rows(0.1, 1.0), 10, effective_rows(1.0, 0.1), 0.1),
        ("noise makes the alignment", noise_rows(0.9, 0.09), 0.1, noise_rows(0.9, 0.9), 1.0),
        ("bulk is faster", stability_rows([0.25, 0.25, None]), 0.5, stability_rows([1.0, 0.5]), 2),
        (
            "bulk is less stable",
            stability_rows([0.5, None, None, None]),
            0.25,
            stability_rows([0.5, 0.5, 0.5, 0.5]),
            2.0,
        ),
        (
            "more bulk, lower loss",
            switch_rows(dom=1.0, bulk=0.1),
            -1.0,
            switch_rows(dom=0.1, bulk=1.0),
            1.0,
        ),
        (
            "Hessian's energy is dominant",
            energy_rows(hessian=0.9),
            0.9,
            energy_rows(hessian=0.1),
            0.1,
        ),
        (
            "functional Hessian's is not",
            energy_rows(functional_hessian=0.1),
            0.1,
            energy_rows(functional_hessian=0.9),
            0.9,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_claims_follow_the_data(
    name: str,
    good: subspace.Rows,
    good_number: float,
    bad: subspace.Rows,
    bad_number: float,
) -> None:
    for rows, verdict, value in (
        (good, "holds", good_number),
        (bad, "does not hold", bad_number),
    ):
        result = judged(name, rows)
        assert result["verdict"] == verdict
        assert result["mean"] == pytest.approx(value, abs=1e-6)
        assert result["values"] == pytest.approx([value], abs=1e-6)


def test_seeds_that_disagree_are_counted() -> None:
    rows = [
        row
        for seed, dom in enumerate([1.0, 1.0, 0.1])
        for row in switch_rows(dom=dom, bulk=0.1, seed=seed)
    ]
    result = judged("Dom-SGD stalls", rows)
    assert result["verdict"] == "in 2 of 3 seeds"
    assert result["mean"] == pytest.approx(1 / 3, abs=0.02)
    assert result["deviation"] == pytest.approx(math.sqrt(1 / 3), abs=0.02)


def test_diverged_branch_is_no_success() -> None:
    rows = switch_rows(dom=1.0, bulk=0.1)
    for row in subspace.pick(rows, method="bulk")[5:]:
        row["train_loss"] = row["test_accuracy"] = None
    result = judged("Bulk-SGD tracks SGD", rows)
    assert (result["verdict"], result["values"], result["diverged"]) == ("does not hold", [None], 1)
    assert subspace.number(result) == "1 without bound"
    assert judged("Bulk-SGD is less noisy", rows)["verdict"] == "not measurable"
    assert "diverged" in [cell for line in subspace.methods_table(rows)[1] for cell in line]


def test_stability_ends_at_the_first_unstable_rate() -> None:
    rows = stability_rows([0.5, 3.0, 0.5, 0.5])  # 3: finite, but higher than at the start
    assert subspace.highest_stable(rows, "learning_rate", "bulk") == 1.0
    assert subspace.highest_stable(rows, "learning_rate", "sgd") == 4.0


@pytest.fixture
def results(plan: subspace_study.Plan) -> subspace.Results:
    rows = {
        "alignment": [
            {**row, **{f"eigenvalue_{i}": 10.0 / i for i in range(1, 15)}, "train_loss": 1.0}
            if "chi" in row
            else row
            for row in alignment_rows(0.96, 0.97)
        ],
        "switch": switch_rows(dom=1.0, bulk=0.123456),
        "effective_learning_rates": effective_rows(0.1, 1.0),
        "stability": stability_rows([0.25, 0.25, None]),
        "energy": energy_rows(hessian=0.9, gauss_newton=0.8, functional_hessian=0.2),
        "noise": noise_rows(0.9, 0.2),
    }
    return {"config": plan.config(), "environment": {"device": "cpu"}, "rows": rows}


def test_report_says_what_the_rows_say(results: subspace.Results, tmp_path: Path) -> None:
    verdicts = subspace.write_all(tmp_path, results)
    assert json.loads((tmp_path / "claims.json").read_text()) == verdicts
    # Cross entropy's own claim is left out, and Adam has no rows.
    assert len(verdicts) == len(subspace.CLAIMS) - 1
    by_name = {verdict["claim"]: verdict for verdict in verdicts}
    assert by_name["Adam favors the bulk"]["verdict"] == "not measurable"
    held = sum(verdict["verdict"] == "holds" for verdict in verdicts)
    markdown = (tmp_path / "report.md").read_text()
    html = (tmp_path / "report.html").read_text()
    for text in (markdown, html):
        assert f"{held} of {len(verdicts)} claims hold" in text
        assert "0.1235" in text  # the final loss of Bulk-SGD
        assert "learning rate 0.05" in text
    for verdict in verdicts:
        line = next(line for line in markdown.splitlines() if verdict["statement"] in line)
        assert f"**{verdict['verdict']}**" in line
        assert f" {subspace.number(verdict)} |" in line
    assert html.count("data:image/png;base64,") == len(subspace.PANELS)
    for panel in subspace.PANELS:
        assert len(table(tmp_path, panel)) == len(results["rows"][panel])
        assert (tmp_path / f"{panel}.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_some_panels(results: subspace.Results, tmp_path: Path) -> None:
    results["rows"] = {"noise": results["rows"]["noise"]}
    verdicts = subspace.write_all(tmp_path, results)
    assert [verdict["claim"] for verdict in verdicts] == ["noise makes the alignment"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png", ".json", ".md", ".html"}
    assert "1 of 1 claims hold" in (tmp_path / "report.md").read_text()
