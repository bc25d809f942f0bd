"""The study of dynamic scale training: stitched pictures where small objects have little loss.

A small detector finds digits of 7 to 28 pixels in pictures of 64 x 64. Contestants differ in when
four pictures are stitched into one: never, always, where small boxes had less than a tenth of the
loss of the boxes (or of the classes) of the batch before, or as often as that but at random. A
stitched batch takes four times as many pictures, so that average precisions at an overlap of .5 are
read twice in each run: after equally many steps, and when as many pictures were seen as without
stitching. The rates are constant and what is scored is an average of the weights, so that a run may
be read at any step. The claims are the paper's; the criteria were fixed before the first run.

References:
  Chen et al., `Dynamic Scale Training for Object Detection <https://arxiv.org/abs/2004.12432>`_,
  2020.
"""

from __future__ import annotations

from experiments.reporting.referee.judging import AllOf, InEverySeed, LowerError
from experiments.reporting.referee.protocols import (
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

REGULAR, STITCHED, MIX = "Regular", "Stitched", "Random mix"
BOX, CLASS = "Feedback, box loss", "Feedback, class loss"
# Chen et al., 2020: small objects gain more than a point of average precision in their tables.
_POINT = 0.01


def contestants(rates: tuple[float, ...]) -> tuple[Contestant, ...]:
    """Those of a setting.

    Args:
      rates: those that each is tuned on.

    Returns:
      The contestants.
    """
    options: dict[str, dict[str, str]] = {
        REGULAR: {"batches": "regular"},
        STITCHED: {"batches": "stitched"},
        BOX: {"batches": "feedback", "follow": "box"},
        CLASS: {"batches": "feedback", "follow": "class"},
        MIX: {"batches": "mix", "follow": "box"},
    }
    return tuple(
        Contestant(name=name, options=chosen, learning_rates=rates)
        for name, chosen in options.items()
    )


def setting(name: str, rates: tuple[float, ...], **sizes: int) -> tuple[Setting, ...]:
    """One source of digits.

    Args:
      name: "digits", the embedded ones, or "mnist5k".
      rates: those that each contestant is tuned on.
      **sizes: ``steps``, ``batch_size``, ``width``, ``pictures`` to train on and ``held_out`` of
        the validation and of the test split.

    Returns:
      The setting, alone.
    """
    made = Setting(
        name=name,
        options={"mnist": name == "mnist5k", **sizes},
        budget=f"{sizes['steps']} steps of {sizes['batch_size']} pictures, of which a stitched one "
        f"takes four; or {sizes['steps'] * sizes['batch_size']:,} pictures",
        contestants=contestants(rates),
        files=name == "mnist5k",
    )
    return (made,)


_RATES = (0.003, 0.01)
_LARGER = {"batch_size": 16, "width": 16, "pictures": 2_000, "held_out": 500}
_NAMES = {"ap": "all boxes", "small": "boxes below 12 x 12 pixels", "large": "the other boxes"}


def _better(method: str, rival: str, slack: float = 0.0) -> InEverySeed:
    return InEverySeed(LowerError(method=method, rival=rival, slack=slack))


STUDY = Protocols(
    name="scale",
    summary="stitched pictures that follow the loss of small objects, against fixed mixes",
    free_rival=REGULAR,
    measures={
        name + ending: Measure(text=f"1 - average precision of {what}, {when}", worst=1.0)
        for ending, when in (("", "equal steps"), (" (pictures)", "equal pictures"))
        for name, what in _NAMES.items()
    }
    | {
        "stitched": Measure(text="share of the batches that were stitched", worst=1.0),
        "seen": Measure(
            text="pictures seen over those of regular batches", worst=float("inf"), form=".2f"
        ),
    },
    scales={
        "smoke": Scale(
            settings=setting(
                "digits", (0.01,), steps=6, batch_size=4, width=2, pictures=40, held_out=8
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=setting(
                "digits", (0.01,), steps=300, batch_size=16, width=8, pictures=2_000, held_out=150
            ),
            tuning_seeds=1,
            seeds=3,
        ),
        "medium": Scale(
            settings=setting("digits", _RATES, steps=2_000, **_LARGER)
            + setting("mnist5k", _RATES, steps=2_000, **_LARGER),
            tuning_seeds=1,
            seeds=5,
        ),
        "full": Scale(
            settings=setting("digits", _RATES, steps=8_000, **_LARGER)
            + setting("mnist5k", _RATES, steps=8_000, **_LARGER),
            tuning_seeds=2,
            seeds=5,
        ),
    },
    claims=(
        Claim(
            name="a",
            text="on small objects feedback is better than a random mix of the same share, and "
            "that is better than regular batches",
            source="Chen et al., 2020, section 4",
            criterion=f"average precision of small boxes at equal steps: {BOX} more than one point "
            f"above {MIX}, and {MIX} more than one point above {REGULAR}: in every seed",
            judge=InEverySeed(
                AllOf(
                    (
                        LowerError(method=BOX, rival=MIX, slack=-_POINT),
                        LowerError(method=MIX, rival=REGULAR, slack=-_POINT),
                    )
                )
            ),
            measure="small",
        ),
        Claim(
            name="b",
            text="on small objects feedback is better than regular batches",
            source="Chen et al., 2020, section 4",
            criterion=f"average precision of small boxes at equal steps: {BOX} more than one point "
            f"above {REGULAR}: in every seed",
            judge=_better(BOX, REGULAR, -_POINT),
            measure="small",
        ),
        Claim(
            name="c",
            text="on small objects feedback is better than regular batches at equal pictures",
            source="ours",
            criterion=f"average precision of small boxes when as many pictures were seen: {BOX} "
            f"more than one point above {REGULAR}: in every seed",
            judge=_better(BOX, REGULAR, -_POINT),
            measure="small (pictures)",
        ),
        Claim(
            name="d",
            text="on other objects feedback loses nothing",
            source="Chen et al., 2020, section 4",
            criterion=f"average precision of boxes from 12 x 12 pixels on at equal steps: {BOX} "
            f"less than one point below {REGULAR}: in every seed",
            judge=_better(BOX, REGULAR, _POINT),
            measure="large",
        ),
        Claim(
            name="e",
            text="feedback by the loss of boxes is better than by that of classes",
            source="Chen et al., 2020, section 4",
            criterion=f"average precision of small boxes at equal steps: {BOX} above {CLASS}: in "
            "every seed",
            judge=_better(BOX, CLASS),
            measure="small",
        ),
    ),
    left_out="COCO, pretrained networks, pyramids of maps, batches of more and smaller pictures "
    "instead of stitched ones",
)
