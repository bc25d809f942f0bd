"""Studies as data, the test of their claims, and claims on the tables of their papers."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from experiments.cli import UsageError
from experiments.methods import METHODS
from experiments.reporting.referee import demon, judging, report, sequential
from experiments.reporting.referee.judging import AtMost, ByBootstrap, mean_view
from experiments.reporting.referee.sequential import SequentialTest
from experiments.reporting.referee.study import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Claim,
    Contestant,
    Results,
    Scale,
    Setting,
    Study,
)

TEST = SequentialTest(sigma=0.5)

# -- the sequential test ---------------------------------------------------------------------------


def test_evidence_is_a_mean_of_likelihood_ratios() -> None:
    """Integrated numerically over a half-normal effect of precision rho."""
    total, count = 1.3, 7
    scale = 1 / math.sqrt(TEST.precision)

    def ratio(effect: float) -> float:
        likelihood = math.exp(effect * total - effect**2 * count * TEST.sigma**2 / 2)
        return float(likelihood * stats.halfnorm.pdf(effect, scale=scale))

    expected = math.log(integrate.quad(ratio, 0, np.inf)[0])
    assert float(TEST.log_evidence(total, count)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 0.1])
def test_the_level_is_kept(mean: float) -> None:
    """On 10,000 simulated methods looked at after each of 100 runs; the bound is Ville's."""
    shares = sequential.simulate(TEST, mean, most=100)
    slack = 3 * math.sqrt(TEST.level / 10_000)
    assert shares["below"] <= TEST.level + slack
    if mean == 0:
        assert shares["above"] <= TEST.level + slack
        assert shares["below"] > 0.01  # and not by never deciding


@pytest.mark.slow
@pytest.mark.parametrize("missed", [0.0, 0.1, 0.3, 0.6])
def test_the_level_is_kept_where_runs_miss_the_target(missed: float) -> None:
    """Equal methods, 10,000 times; and what a lower cost needs."""
    slack = 3 * math.sqrt(TEST.level / 10_000)
    same = sequential.simulate(TEST, 0.0, most=100, missed=missed)
    assert max(same["below"], same["above"]) <= TEST.level + slack
    half = sequential.simulate(TEST, math.log(0.5), most=100, missed=missed)
    assert half["below"] > 0.95
    assert half["above"] < 0.01


def test_the_evidence_of_signs() -> None:
    """Integrated numerically over a uniform share between a half and 1."""
    expected = 2 * integrate.quad(lambda p: (2 * p) ** 9 * (2 - 2 * p) ** 2, 0.5, 1)[0]
    found = sequential.SignTest().log_evidence(np.array(9), np.array(11))
    assert math.exp(found) == pytest.approx(expected, rel=1e-9)


def test_clear_effects_end_early() -> None:
    shares = sequential.simulate(TEST, -1.0, most=100)
    assert shares["below"] == 1
    assert 2 < shares["runs"] < 5
    needed = TEST.needed(-0.1)
    assert needed is not None
    assert TEST.radius(needed) <= 0.1 < TEST.radius(needed - 1)
    half = sequential.simulate(TEST, 0.5, most=100)
    assert half["above"] > 0.99
    assert shares["runs"] < half["runs"] < 25


def test_a_wrong_sigma_is_noticed() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(0, 1, (2_000, 10))
    true, doubled = (np.mean([TEST.doubts_sigma(s * d) for d in draws]) for s in (0.5, 1.5))
    assert true == pytest.approx(0.01, abs=0.007)
    assert doubled > 0.95
    with pytest.raises(UsageError, match=r"positive sigma.*got 0, 0.05 and 10"):
        SequentialTest(sigma=0)


# -- verdicts --------------------------------------------------------------------------------------


def results(errors: Any = None, costs: Any = None, **more: Any) -> Results:
    """Results of contestants "a", "b" (and more) in one setting or several."""
    errors = np.asarray(np.zeros((1, 2, 3)) if errors is None else errors, float)
    costs = np.ones((*errors.shape[:2], 3)) if costs is None else np.asarray(costs, float)
    names = more.pop("contestants", tuple("abcdefg"[: errors.shape[1]]))
    shape = errors.shape[:2]
    values: dict[str, Any] = {
        "settings": tuple(map(str, range(len(errors)))),
        "contestants": names,
        "ranked": np.ones(len(names), bool),
        "errors": errors,
        "tuned": np.zeros((*shape, 1, 1)),
        "rates": np.ones((*shape, 1)),
        "costs": costs,
        "budgets": np.full(shape, 100.0),
        "unit": "steps",
        "diverged": np.zeros(shape, int),
        "runs": 0,
    }
    return Results(**(values | more))


def cost_verdict(ours: list[float], theirs: list[float], share: float = 1.0) -> Any:
    judge = AtMost(method="a", rival="b", share=share, test=SequentialTest(sigma=0.2))
    return judge(results(costs=[[ours, theirs]]))


def test_costs() -> None:
    half = [20.0, 22.0, 18.0, 20.0]
    whole = [40.0] * 4
    found = cost_verdict(half, whole)
    assert found.verdict == HOLDS
    assert found.estimate == pytest.approx(0.5, rel=0.01)
    assert found.low < found.estimate < found.high < 1
    assert cost_verdict(whole, half).verdict == FAILS
    assert cost_verdict(half, whole, share=0.25).verdict == FAILS
    close = cost_verdict(half, [20.0, 20.0, 20.0, 20.0])
    assert close.verdict == UNDECIDED
    assert close.needed_seeds > 100
    # Seeds that were not run are not counted.
    assert cost_verdict([*half, np.nan], [*whole, np.nan]).seeds == 4


def test_claims_about_some_of_the_settings() -> None:
    """A contestant's cost in one setting over its own in another; errors in one setting alone."""
    costs = np.array([[[20.0] * 4, [9.0] * 4], [[80.0] * 4, [9.0] * 4]])
    judge = functools.partial(AtMost, share=0.5, test=SequentialTest(sigma=0.2))
    scaled = judge(method="a", rival="a", among=("0",), rival_among=("1",))
    found = scaled(results(np.zeros((2, 2, 3)), costs))
    assert (found.verdict, found.seeds) == (HOLDS, 4)
    assert found.estimate == pytest.approx(0.25)
    assert judge(method="a", rival="b", among=("1",))(results(costs, costs)).verdict == FAILS

    errors = np.array([[[0.1] * 3, [0.2] * 3], [[0.5] * 3, [0.2] * 3]])
    margin = functools.partial(judging.LowerError, method="a", rival="b")
    assert margin(among=("0",))(mean_view(results(errors))) == pytest.approx(0.1)
    assert margin(slack=0.05)(mean_view(results(errors))) == pytest.approx(-0.05)
    here = functools.partial(ByBootstrap, settings=False)
    assert here(margin(among=("0",)))(results(errors)).verdict == HOLDS
    assert here(margin(among=("1",)))(results(errors)).verdict == FAILS


def test_runs_that_miss_the_target_count_at_their_worst() -> None:
    half, whole = [20.0] * 4, [40.0] * 4
    assert cost_verdict([np.inf, *half[1:]], whole).verdict == UNDECIDED
    failed = cost_verdict([np.inf] * 4, half)
    assert failed.verdict == FAILS  # the whole budget is too much already
    assert failed.high is None
    assert failed.note == "4 of 4 seeds miss the target"
    assert cost_verdict(half, [np.inf] * 4).verdict == HOLDS
    both = cost_verdict([np.inf] * 4, [np.inf] * 4)
    assert (both.verdict, both.low, both.high, both.needed_seeds) == (UNDECIDED, None, None, None)
    noisy = cost_verdict([1.0, 90.0, 1.0, 90.0], whole)
    assert noisy.verdict == UNDECIDED
    assert "more than the declared sigma" in noisy.note
    # Signs need neither a sigma nor a cost.
    assert cost_verdict([1.0, 30.0] * 4, [40.0] * 8).verdict == HOLDS
    missed = [20.0, 30.0, 25.0, np.inf] * 3
    assert cost_verdict([10.0] * 12, missed).verdict == HOLDS
    assert cost_verdict(missed, [10.0] * 12).verdict == FAILS


@pytest.mark.parametrize(
    ("settings", "seeds", "spread", "over", "low", "high"),
    [
        (6, 3, 0.0, False, 0.92, 0.985),
        (18, 3, 0.0, False, 0.93, 0.985),
        (1, 10, 0.0, False, 0.93, 0.985),
        # Drawing the settings covers the mean of all settings; drawing the seeds alone does not.
        (6, 5, 1.0, True, 0.93, 0.99),
        (16, 10, 1.0, True, 0.93, 0.985),
        (16, 10, 1.0, False, 0.2, 0.7),
        # The seeds' noise is in the settings' already: without a spread the interval is too wide.
        (16, 10, 0.0, True, 0.98, 1.0),
    ],
)
def test_bootstrap_intervals_cover_what_they_say(
    settings: int, seeds: int, spread: float, over: bool, low: float, high: float
) -> None:
    """The mean over the settings, for a thousand contestants whose true mean is 0."""
    rng = np.random.default_rng(1)
    errors = rng.normal(0, spread, (settings, 1000, 1)) + rng.normal(0, 1, (settings, 1000, seeds))
    outcome = results(errors, contestants=tuple(map(str, range(1000))))
    drawn = judging.drawn_view(outcome, settings=over, draws=1000).errors.mean(axis=1)
    lowest, highest = judging.interval(outcome, drawn, settings=over)
    assert low < np.mean((lowest <= 0) & (highest >= 0)) <= high


def test_a_tuning_for_each_seed_keeps_the_level() -> None:
    """Equal methods whose trials differ less on the validation split than on the test split.

    Neither one tuning, with few seeds or many, nor the rule of one standard error does.
    """
    validation = np.array([0.20, 0.06, 0.05, 0.05, 0.10])
    test = np.array([0.20, 0.06, 0.05, 0.04, 0.10])
    wrong = functools.partial(judging.simulate_tuning, validation=validation, test=test)
    for spread in (0.003, 0.01):
        assert wrong("each seed", spread=spread) == pytest.approx(0.05, abs=0.01)
        assert wrong("once", spread=spread) > 0.3
        assert wrong("once", spread=spread, tuning_seeds=12) > 0.3
        assert wrong("smallest", spread=spread) > 0.2


def test_margins() -> None:
    rng = np.random.default_rng(0)
    errors = rng.normal([[[0.3], [0.2], [0.1]]], 0.01, (1, 3, 5))

    def lead(view: judging.View) -> np.ndarray:
        return view.errors[..., 0, 0] - view.errors[..., 0, 1]

    here = functools.partial(ByBootstrap, settings=False)
    clear = here(lead)(results(errors))
    assert clear.verdict == HOLDS
    values = errors[0, 0] - errors[0, 1]
    level = 1 - 2 * judging.tail(results(errors), settings=False)
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=level, method="percentile", n_resamples=9_999, rng=rng
    ).confidence_interval
    np.testing.assert_allclose([clear.low, clear.high], expected, atol=2e-3)
    assert here(lambda view: -lead(view))(results(errors)).verdict == FAILS
    near = here(lambda view: lead(view) - values.mean() + 0.001)(results(errors))
    assert near.verdict == UNDECIDED
    assert near.needed_seeds is not None
    assert near.needed_seeds > 5
    single = here(lead, tuned=True)(results(errors))
    assert (single.verdict, single.note) == (UNDECIDED, "one seed makes no interval")
    # Zero is enough for some.
    nothing = here(lambda view: 0 * lead(view), strict=False)(results(errors))
    assert nothing.verdict == HOLDS
    assert here(lambda view: 0 * lead(view))(results(errors)).verdict == FAILS
    border = here(lambda view: lead(view) - values.mean())(results(errors))
    assert "no number of runs would decide" in border.note


def test_claims_about_more_than_the_settings_that_were_run() -> None:
    """A lead in five of six settings that is clear in each of them: more settings would decide."""
    rng = np.random.default_rng(0)
    means = np.array([[[0.3], [0.2]]] * 5 + [[[0.2], [0.3]]])
    errors = rng.normal(means, 0.001, (6, 2, 4))

    def lead(view: judging.View) -> np.ndarray:
        return (view.errors[..., 0] - view.errors[..., 1]).mean(axis=-1)

    assert ByBootstrap(lead, settings=False)(results(errors)).verdict == HOLDS
    found = ByBootstrap(lead)(results(errors))
    assert (found.verdict, found.needed_seeds) == (UNDECIDED, None)
    assert found.needed_settings is not None
    assert 6 < found.needed_settings < 30
    assert ByBootstrap(lead)(results(np.tile(errors, (4, 1, 1)))).verdict == HOLDS
    few = ByBootstrap(lead)(results(errors[:5]))
    assert (few.verdict, few.needed_settings) == (UNDECIDED, 6)
    assert few.note == "5 of at least 6 settings that make an interval"


# -- studies ---------------------------------------------------------------------------------------


def contestant(name: str, method: str, rates: int = 2) -> Contestant:
    entry = METHODS[method]
    return Contestant(
        name=name, trials=(dataclasses.replace(entry, learning_rates=entry.learning_rates[:rates]),)
    )


def small_study(*contestants: Contestant, **more: Any) -> Study:
    """Two contestants on digits."""
    who = contestants or (contestant("free", "sgd"), contestant("ours", "demon_sgd"))
    judge = AtMost(method="ours", rival="free", share=1.0, test=SequentialTest(sigma=0.05))
    setting = Setting(
        name="one",
        task="digits",
        model="mlp",
        epochs=1,
        contestants=who,
        batch_size=512,
        target=0.2,
    )
    values: dict[str, Any] = {
        "name": "tiny",
        "summary": "",
        "free_rival": "free",
        "unit": "steps",
        "scales": {"small": Scale(settings=(setting,), tuning_seeds=1, seeds=2, most_seeds=3)},
        "claims": (Claim(name="x", text="t", source="s", criterion="c", judge=judge),),
    }
    return Study(**(values | more))


def test_unfair_studies_are_refused() -> None:
    small_study().check()
    free, ours = contestant("free", "sgd"), contestant("ours", "demon_sgd", rates=3)
    claim = small_study().claims[0]
    nowhere = dataclasses.replace(claim.judge, among=("two",))
    nobody = ByBootstrap(judging.LowerError(method="them", rival="free"))
    for study, message in (
        (small_study(free, ours), "one: ours has 3 trials, free has 2; give every contestant"),
        (
            small_study(claims=(dataclasses.replace(claim, criterion=" "),)),
            "study tiny: claim 'x' has no criterion; write down when",
        ),
        (small_study(claims=()), "study tiny has no claim"),
        (small_study(claims=(claim, claim)), "claim 'x' is there more than once"),
        (small_study(free_rival="none"), "one lacks none, the rival that costs nothing"),
        (small_study(free), "one lacks ours, which claim 'x' is about"),
        (small_study(unit="joules"), "unknown unit of cost 'joules'; valid: steps, gradients"),
        (
            small_study(claims=(dataclasses.replace(claim, judge=nowhere),)),
            "unknown setting of claim 'x' 'two'; valid: one",
        ),
        (
            small_study(contestant("free", "sgd"), contestant("ours", "post_local_sgd")),
            "one: some methods have workers that share the batch; give 2 or more",
        ),
        (
            small_study(claims=(dataclasses.replace(claim, judge=nobody),)),
            "one lacks them, which claim 'x' is about",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            study.check()


def test_demon_is_a_fair_study() -> None:
    demon.STUDY.check()
    for name, trials in (("small", 10), ("medium", 10), ("full", 20)):
        scale = demon.STUDY.scales[name]
        assert {c.size for s in scale.settings for c in s.contestants} == {trials}
    assert len(demon.STUDY.scales["full"].settings) == 18
    for c in demon.contestants("adam"):  # all of them can be built
        for method in c.trials:
            method.build(0.1, total_steps=10, num_classes=2)


# -- the claims on the paper's tables --------------------------------------------------------------

# Tables 3 and 4: ResNet-20 (3 budgets), WRN (3), VGG (2), LSTM (2), VAE (2), CapsNet (2, Adam);
# ~ stands for the word momentum.
SGD = """
LR step|8.82 8.43 7.32 22.42 17.20 14.51 30.09 27.83 81.67 82.02 140.28 137.70
LR cosine|8.80 8.10 7.78 20.03 17.02 14.66 28.63 27.84 81.64 83.23 139.15 136.69
OneCycle|10.83 9.23 8.42 21.67 19.69 19.00 30.10 29.09 90.03 91.19 139.79 137.20
LR linear|9.03 8.15 7.62 19.54 17.39 14.58 29.10 28.26 96.27 98.79 148.00 141.72
plateau|9.05 8.26 7.97 21.05 17.83 15.16 30.65 29.74 81.55 81.82 140.51 139.54
LR exp|9.55 9.20 7.82 22.65 20.60 15.85 29.51 28.47 84.20 83.49 154.31 145.83
OneCycle~|15.61 14.02 13.35 29.34 23.20 25.42 35.86 35.34 87.14 91.93 144.90 142.63
cosine~|13.57 11.23 10.87 24.12 21.66 16.29 32.73 30.99 88.33 90.02 145.13 140.14
linear~|12.31 10.26 10.63 25.13 22.74 17.92 31.61 31.23 90.02 93.06 145.33 139.83
exp~|14.96 12.98 12.35 24.01 19.35 17.56 34.50 32.83 86.39 89.45 150.54 156.95
Demon|8.56 8.21 7.59 20.23 16.19 14.44 28.67 27.69 82.66 84.84 138.29 136.55
"""
ADAM = """
constant|13.63 11.90 11.94 23.35 19.63 18.65 33.62 31.09 109.48 116.26 136.28 134.64 9.27 9.25
LR step|10.47 8.75 8.55 23.85 19.63 18.29 29.40 27.75 98.79 99.69 136.62 134.14 8.90 8.98
LR cosine|9.56 9.15 8.93 22.85 21.47 19.08 29.68 28.08 97.70 100.56 134.73 133.25 9.16 9.75
OneCycle|10.33 9.87 9.03 20.02 19.21 19.03 29.83 29.58 112.32 117.31 134.67 133.27 9.21 8.88
LR linear|9.25 9.20 8.89 21.70 21.53 17.85 29.30 28.65 111.10 115.24 134.71 134.00 8.90 8.90
plateau|9.71 8.92 8.80 22.77 19.91 19.61 29.03 28.67 99.65 101.46 135.68 134.10 9.10 9.12
LR exp|10.48 9.24 8.53 23.30 20.70 19.63 29.53 28.83 103.50 103.09 135.19 134.05 8.80 8.72
OneCycle~|20.05 15.60 14.85 24.61 23.39 23.54 36.98 32.96 106.86 108.77 138.16 136.68 9.79 9.95
cosine~|11.08 10.63 10.64 25.76 23.58 20.10 31.65 30.54 105.78 106.01 135.62 134.02 9.13 8.82
linear~|11.91 11.48 11.09 24.36 21.93 21.81 32.28 29.65 106.38 114.24 136.24 135.00 9.12 9.03
exp~|15.18 12.08 10.63 28.90 25.28 22.90 32.05 30.63 104.32 115.87 136.67 136.05 9.00 9.22
YellowFin|13.66 12.13 11.39 22.55 20.68 18.56 68.87 50.18 117.21 109.04 414.74 351.80 10.96 10.55
Demon|9.68 8.90 8.50 20.95 19.50 18.62 28.84 27.11 104.60 107.07 134.35 133.98 8.88 8.87
"""


def published() -> Results:
    """Both tables, (26 settings, contestants, 1 seed)."""
    tables = [
        {line.split("|")[0]: line.split("|")[1].split() for line in text.split("\n")[1:-1]}
        for text in (SGD.replace("~", " momentum"), ADAM.replace("~", " momentum"))
    ]
    names = tuple(tables[1])
    columns = [
        [float(table[name][i]) if name in table else np.nan for name in names]
        for table in tables
        for i in range(len(table["Demon"]))
    ]
    ranked = np.array([name not in (demon.CONSTANT, demon.YELLOWFIN) for name in names])
    errors = np.array(columns)[..., None]
    return results(errors, contestants=names, ranked=ranked)


def test_claims_on_the_published_tables() -> None:
    """Counts by hand over 26 settings: Demon 10 first and 22 top-three places, cosine 4 and 15."""
    view = mean_view(published())
    at = {name: view.number(name) for name in ("Demon", "LR cosine", "LR step")}
    first, top = view.top(1), view.top(3)
    assert (first[at["Demon"]], top[at["Demon"]]) == (10, 22)
    assert (first[at["LR cosine"]], top[at["LR cosine"]]) == (4, 15)
    assert demon.most_first_places(view) == 6
    assert demon.top_three_share(view) == pytest.approx((22 - 1.3 * 15) / 26)
    assert demon.cosine_is_second(view) == 0.5
    assert demon.no_momentum_is_first(view) == 0
    assert demon.yellowfin_is_late(view) >= 0


def test_sensitivity() -> None:
    rates = np.array([0.01, 0.1, 1.0])
    flat, steep = np.array([0.1, 0.1, 0.1]), np.array([0.5, 0.1, 0.5])
    assert demon.valley(flat, rates) == pytest.approx(math.log(100))
    # A triangle on each side whose base is a fortieth of a decade.
    assert demon.valley(steep, rates, points=2000) == pytest.approx(math.log(10) / 40, rel=0.01)
    tuned = np.stack([flat, steep])[None, :, :, None]
    grid = np.broadcast_to(rates, (1, 2, 3))
    for names, share in (((demon.DEMON, demon.STEP), 1.0), ((demon.STEP, demon.DEMON), 0.0)):
        view = mean_view(results(contestants=names, tuned=tuned, rates=grid))
        assert demon.less_sensitive(view) == pytest.approx(share - 2 / 3)


# -- from records to results -----------------------------------------------------------------------


def run(
    name: str, rate: float, seed: int, accuracies: list[float | None], price: float = 1.0
) -> list[dict[str, Any]]:
    """Records of a run; None stands for a step after which it has diverged."""
    return [
        {
            "method": name,
            "learning_rate": rate,
            "seed": seed,
            "step": 10 * i,
            "gradient_evaluations": 10 * i * price,
            **dict.fromkeys(("validation_accuracy", "test_accuracy"), accuracy),
            **dict.fromkeys(("validation_loss", "train_loss", "test_loss"), accuracy),
        }
        for i, accuracy in enumerate(accuracies)
    ]


def test_all_runs_count() -> None:
    margin = judging.LowerError(method="ours", rival="free", equal_gradients=True)
    claim = Claim(name="y", text="", source="", criterion="c", judge=ByBootstrap(margin))
    study = small_study(claims=(small_study().claims[0], claim))
    assert study.equal_gradients
    assert not small_study().equal_gradients
    (setting,) = study.scales["small"].settings
    free, ours = setting.contestants
    low, high = free.trials[0].learning_rates
    name, other = "sgd", "demon_sgd"
    tuning = {
        # The second rate is better until it diverges.
        name: run(name, low, 0, [0.1, 0.4, 0.5]) + run(name, high, 0, [0.1, 0.9, None]),
        other: run(other, low, 0, [0.1, 0.2, 0.3]) + run(other, high, 0, [0.1, 0.7, 0.8]),
    }
    scale = study.scales["small"]
    chosen = [report.choose(each, tuning, scale, 2) for each in (free, ours)]
    rates = [[method.learning_rates for method in each] for each in chosen]
    assert rates == [[(low,), (low,)], [(high,), (high,)]]
    final = {
        name: run(name, low, 1, [0.6, 0.2, 0.6]) + run(name, low, 2, [0.1, 0.2, 0.3]),
        other: run(other, high, 1, [0.1, 0.7, 0.9], 1.5)
        + run(other, high, 2, [0.1, 0.7, None], 1.5),
    }
    bout = report.Bout(
        name="one",
        target=0.5,
        contestants=(free, ours),
        tuning=tuning,
        chosen=chosen,
        final=final,
        costs={name: {10: 10.0, 20: 20.0}, other: {10: 15.0, 20: 30.0}},
    )
    found = report.results(study, "small", [bout])
    np.testing.assert_allclose(found.errors[0], [[0.4, 0.7], [0.1, 1.0]])
    np.testing.assert_allclose(found.tuned[0, :, :, 0], [[0.5, 1.0], [0.7, 0.2]])
    # The costlier one has taken twenty gradients at its second evaluation.
    assert found.equal_errors is not None
    np.testing.assert_allclose(found.equal_errors[0], [[0.4, 0.7], [0.3, 0.3]])
    assert margin(mean_view(found)) == pytest.approx(0.25)
    # What is reached before the first step is not counted, what is not reached is infinite.
    np.testing.assert_array_equal(found.costs[0], [[20, np.inf, np.nan], [15, 15, np.nan]])
    np.testing.assert_array_equal(found.budgets[0], [20, 30])
    np.testing.assert_array_equal(found.diverged[0], [1, 1])
    assert found.runs == 8
    # With a tuning for each final seed, on one seed each: the second one chooses otherwise.
    own = dataclasses.replace(scale, own_tuning=True)
    tuning[name] += run(name, low, 1, [0.1, 0.4, 0.5]) + run(name, high, 1, [0.1, 0.9, 0.9])
    assert [m.learning_rates for m in report.choose(free, tuning, own, 2)] == [(low,), (high,)]
    # Equal mean errors share the first place.
    assert [(row["rank"][0], row["first"][0]) for row in report.ranks(found)] == [(1, 1), (1, 1)]
