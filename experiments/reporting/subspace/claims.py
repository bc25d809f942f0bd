"""The qualitative claims of the papers, each as a number and the threshold that it has to reach.

The number is computed for every seed. The thresholds were fixed before any result was seen (the one
exception says so).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from experiments.reporting import tables
from experiments.reporting.subspace.rows import (
    ablation,
    column,
    final_loss,
    highest_stable,
    is_stable,
    line,
    pick,
    seeds,
)
from experiments.runs.units import Rows


@dataclasses.dataclass(frozen=True)
class Claim:
    """A qualitative claim of a paper, as a number and the threshold that it has to reach.

    Attributes:
      name: short name.
      paper: the authors who make the claim.
      statement: the claim in one sentence.
      quantity: the number in words.
      panel: the panel from whose rows the number is computed.
      measure: computes the number from one seed's rows of that panel; infinite for a run that
        diverged, ``None`` where it is not defined.
      sign: ``"<="`` or ``">="``.
      threshold: the value that the number is compared with.
      loss: the training loss that the claim is about; ``None`` for every loss.
    """

    name: str
    paper: str
    statement: str
    quantity: str
    panel: str
    measure: Callable[[Rows], float | None]
    sign: str
    threshold: float
    loss: str | None = None

    def holds(self, value: float) -> bool:
        """Whether the number reaches the threshold."""
        return value <= self.threshold if self.sign == "<=" else value >= self.threshold


def _best_average(rows: Rows) -> float:
    return float(np.nanmax(column(rows, "tracked_average")))


def _later_alignment(rows: Rows) -> float:
    later = [row for row in rows if row["step"] >= row["switch_step"]]
    return float(np.nanmean(column(later, "chi")))


def _progress(method: str) -> Callable[[Rows], float | None]:
    """A method's decrease of the training loss from the switch on, relative to SGD's."""

    def measure(rows: Rows) -> float | None:
        sgd = pick(rows, method="sgd")
        start = sgd[0]["train_loss"]
        decrease = start - final_loss(sgd)
        if decrease <= 0:
            return None
        return (start - final_loss(pick(rows, method=method))) / decrease

    return measure


def _roughness(rows: Rows) -> float:
    """Median absolute second difference of the log training loss between evaluations."""
    return float(np.median(np.abs(np.diff(np.log(column(rows, "train_loss")), 2))))


def _relative_roughness(rows: Rows) -> float | None:
    sgd, bulk = (pick(rows, method=method) for method in ("sgd", "bulk"))
    if math.isinf(final_loss(bulk)) or len(sgd) < 3:
        return None
    return _roughness(bulk) / _roughness(sgd)


def _rise(rows: Rows) -> float:
    dom = pick(rows, method="dom")
    return final_loss(dom) / dom[0]["train_loss"]


def _rank_correlation(rows: Rows) -> float:
    losses = [final_loss(run) for _, run in line(rows, "dom_to_bulk")]
    ranks = np.argsort(np.argsort(losses))
    return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def _effective_ratio(optimizer: str) -> Callable[[Rows], float | None]:
    """Effective learning rate in the bulk over that in the dominant subspace."""

    def measure(rows: Rows) -> float | None:
        # At step 0 momentum and moments are still empty.
        later = [row for row in pick(rows, optimizer=optimizer) if row["step"] > 0]
        if not later:
            return None
        bulk, dominant = (float(np.median(column(later, key))) for key in ("bulk", "dominant"))
        return bulk / dominant if dominant > 0 else math.inf if bulk > 0 else None

    return measure


def _speed(rows: Rows) -> float | None:
    ratios = [
        final_loss(runs["bulk"]) / final_loss(runs["sgd"])
        for runs in ablation(rows, "learning_rate").values()
        if all(map(is_stable, runs.values()))
    ]
    return statistics.geometric_mean(ratios) if ratios else None


def _stability(name: str) -> Callable[[Rows], float | None]:
    """How far Bulk-SGD stays stable, relative to SGD."""

    def measure(rows: Rows) -> float | None:
        sgd, bulk = (highest_stable(rows, name, method) for method in ("sgd", "bulk"))
        return (bulk or 0.0) / sgd if sgd else None

    return measure


def _energy(operator: str) -> Callable[[Rows], float | None]:
    def measure(rows: Rows) -> float | None:
        later = [row for row in pick(rows, operator=operator) if row["step"] > 0]
        return float(np.mean(column(later, "frobenius_share")))

    return measure


def _remaining_alignment(rows: Rows) -> float | None:
    ends = {method: pick(rows, method=method) for method in ("sgd", "gd")}
    if not all(ends.values()):
        return None
    return ends["gd"][-1]["chi"] / ends["sgd"][-1]["chi"]


SONG = "Song, Ahn, Yun"
ZAKARIN = "Zakarin, Singh"
CLAIMS = (
    Claim(
        "gradient aligns early",
        SONG,
        "Early in training the gradient comes to lie in the dominant subspace.",
        "highest moving average of chi_k of the full gradient before the switch",
        "alignment",
        _best_average,
        ">=",
        0.95,
    ),
    Claim(
        "alignment stays",
        SONG,
        "From then on the gradient stays in the dominant subspace.",
        "mean chi_k of the full gradient from the switch on",
        "alignment",
        _later_alignment,
        ">=",
        0.9,
    ),
    Claim(
        "Dom-SGD stalls",
        SONG,
        "Projected onto the dominant subspace, SGD stops reducing the training loss.",
        "Dom-SGD's decrease of the training loss / SGD's, from the switch on",
        "switch",
        _progress("dom"),
        "<=",
        0.2,
    ),
    Claim(
        "Bulk-SGD tracks SGD",
        SONG,
        "Without its dominant part the update is as effective as the whole.",
        "Bulk-SGD's decrease of the training loss / SGD's, from the switch on",
        "switch",
        _progress("bulk"),
        ">=",
        0.9,
    ),
    Claim(
        "Bulk-SGD is less noisy",
        SONG,
        "The loss curve of Bulk-SGD is smoother than that of SGD.",
        "roughness of Bulk-SGD's loss curve / SGD's (median second difference of the log)",
        "switch",
        _relative_roughness,
        "<=",
        0.8,
    ),
    Claim(
        "Dom-SGD's loss rises",
        SONG,
        "With cross entropy the training loss of Dom-SGD can even rise.",
        "Dom-SGD's final training loss / its loss at the switch",
        "switch",
        _rise,
        ">=",
        1.01,
        "cross_entropy",
    ),
    Claim(
        "momentum favors the bulk",
        SONG,
        "Momentum raises the effective learning rate in the bulk above that in the dominant "
        "subspace.",
        "effective learning rate in the bulk / dominant, medians along SGD with momentum 0.9",
        "effective_learning_rates",
        _effective_ratio("momentum"),
        ">=",
        2.0,
    ),
    Claim(
        "Adam favors the bulk",
        SONG,
        "Adam does so too.",
        "effective learning rate in the bulk / dominant, medians along Adam",
        "effective_learning_rates",
        _effective_ratio("adam"),
        ">=",
        2.0,
    ),
    Claim(
        "noise makes the alignment",
        SONG,
        "The alignment comes from mini-batch noise: full-batch gradient descent removes it.",
        "chi_k of the full gradient at the end of gradient descent / of SGD, from the switch on",
        "noise",
        _remaining_alignment,
        "<=",
        0.5,
    ),
    Claim(
        "bulk is faster",
        ZAKARIN,
        "At the same learning rate updates in the bulk converge faster.",
        "Bulk-SGD's final training loss / SGD's, geometric mean over rates stable for both",
        "stability",
        _speed,
        "<=",
        0.95,
    ),
    Claim(
        "bulk is less stable",
        ZAKARIN,
        "Bulk-SGD becomes unstable at lower learning rates.",
        "highest stable learning rate of Bulk-SGD / SGD",
        "stability",
        _stability("learning_rate"),
        "<=",
        0.9,
    ),
    Claim(
        "bulk tolerates less momentum",
        ZAKARIN,
        "Bulk-SGD becomes unstable at lower momentum (criterion added after a look at digits).",
        "highest stable momentum of Bulk-SGD / SGD",
        "stability",
        _stability("momentum"),
        "<=",
        0.9,
    ),
    Claim(
        "more bulk, lower loss",
        ZAKARIN,
        "Interpolated methods pass from Dom-SGD to Bulk-SGD (our reading: monotonically).",
        "rank correlation of alpha and final training loss, Dom-SGD to Bulk-SGD",
        "switch",
        _rank_correlation,
        "<=",
        -0.9,
    ),
    Claim(
        "Hessian's energy is dominant",
        ZAKARIN,
        "The curvature energy of the Hessian is concentrated in the dominant subspace.",
        "Frobenius share of the Hessian, mean from the switch on",
        "energy",
        _energy("hessian"),
        ">=",
        0.5,
    ),
    Claim(
        "Gauss-Newton's energy is dominant",
        ZAKARIN,
        "So is that of the Gauss-Newton matrix.",
        "Frobenius share of the Gauss-Newton matrix, mean from the switch on",
        "energy",
        _energy("gauss_newton"),
        ">=",
        0.5,
    ),
    Claim(
        "functional Hessian's is not",
        ZAKARIN,
        "That of the functional Hessian is not (our reading).",
        "Frobenius share of the functional Hessian, mean from the switch on",
        "energy",
        _energy("functional_hessian"),
        "<=",
        0.5,
    ),
)


def judge(claim: Claim, rows: Rows) -> dict[str, Any]:
    """Compares a claim with the rows of its panel.

    Args:
      claim: the claim.
      rows: the rows of all seeds.

    Returns:
      The claim with its numbers, as plain JSON: ``values`` by seed (``None`` where the number is
      not finite or not defined), their ``mean`` and ``deviation``, and the ``verdict``: ``"holds"``
      (in every seed), ``"does not hold"`` (in none), ``"in 1 of 3 seeds"`` or ``"not measurable"``.
    """
    measured = {seed: claim.measure(pick(rows, seed=seed)) for seed in seeds(rows)}
    # A number that is not defined decides nothing.
    values = [v for v in measured.values() if v is not None and not math.isnan(v)]
    held = sum(map(claim.holds, values))
    if not values:
        verdict = "not measurable"
    elif held in (0, len(values)):
        verdict = "holds" if held else "does not hold"
    else:
        verdict = f"in {held} of {len(values)} seeds"
    finite = [value for value in values if math.isfinite(value)]
    return {
        "claim": claim.name,
        "paper": claim.paper,
        "statement": claim.statement,
        "criterion": f"{claim.quantity} {claim.sign} {claim.threshold:g}",
        "panel": claim.panel,
        "values": [v if v is not None and math.isfinite(v) else None for v in measured.values()],
        "diverged": len(values) - len(finite),
        "mean": statistics.fmean(finite) if finite else None,
        "deviation": statistics.stdev(finite) if len(finite) > 1 else None,
        "verdict": verdict,
    }


def judge_all(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judges all claims about the study's loss whose panels are finished.

    Args:
      results: the ``config`` and the ``rows`` by panel.
    """
    return [
        judge(claim, results["rows"][claim.panel])
        for claim in CLAIMS
        if results["rows"].get(claim.panel) and claim.loss in (None, results["config"]["loss"])
    ]


def number(verdict: dict[str, Any]) -> str:
    """The number of a claim as text: mean ± standard deviation over the seeds.

    Args:
      verdict: what `judge` returned.
    """
    parts = []
    if verdict["mean"] is not None:
        spread = "" if verdict["deviation"] is None else f" ± {verdict['deviation']:.2g}"
        parts.append(f"{verdict['mean']:.3g}{spread}")
    if verdict["diverged"]:
        parts.append(f"{verdict['diverged']} without bound")
    return ", ".join(parts) or "–"


def table(verdicts: Sequence[dict[str, Any]]) -> Table:
    """The claims for a terminal, without their criteria, which are in the report.

    Args:
      verdicts: what `judge_all` returned.
    """
    view = tables.table(
        ["claim", "here", "number", "paper"], "Claims of the papers (bold: holds)", left=4
    )
    for verdict in verdicts:
        view.add_row(
            verdict["claim"],
            verdict["verdict"],
            number(verdict),
            verdict["paper"],
            style="bold" if verdict["verdict"] == "holds" else None,
        )
    return view
