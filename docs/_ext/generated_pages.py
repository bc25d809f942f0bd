"""Pages that are made: one for each method and public name, tables, verdicts, notebooks.

They are written where git ignores them, before Sphinx reads the sources.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import evidence_tables

import models
import optax_accel as oa
from experiments import data, fidelity, referee
from experiments.methods import METHODS, Method
from experiments.reporting import survey
from experiments.reporting.referee.study import Study
from experiments.runs import ledger
from experiments.training.losses import LOSS_OF_MODEL
from experiments.training.options import trained_by

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "evidence" / "records"
PICTURES = ROOT / "docs" / "images" / "methods"
FOLDERS = ("methods", "api", "notebooks", "tables")

# The function behind a method whose entry in the catalogue builds it by a function of its own.
FUNCTIONS = {
    "cosine_momentum_sgd": "with_schedules",
    "linear_momentum_sgd": "with_schedules",
    "exponential_momentum_sgd": "with_schedules",
    "onecycle_momentum_sgd": "momentum_onecycle_schedule",
    "cyclical_sgd": "cyclical_schedule",
    "cyclical2_sgd": "cyclical_schedule",
    "exp_range_sgd": "cyclical_schedule",
    "onecycle_sgd": "onecycle",
    "anderson_sgd": "anderson_acceleration",
    "gradsamp": "gradsamp",
    "sharpness_directed": "sharpness_directed",
    "onecycle_cosine_sgd": "onecycle",
    "vtpc_sgd": "vtpc_schedule",
    "snapshot_sgd": "snapshot_schedule",
    "weight_norm_sgd": "weight_norm",
    "weight_norm_adam": "weight_norm",
    "powerprop_sgd": "powerprop",
    "forward_gradient_sgd": "forward_gradient",
    "sampled_products_sgd": "sampled_product_gradients",
    "gnp_sgd": "gnp",
    "sam_sgd": "gnp",
    "post_local_sgd": "post_local_sgd",
}

FIDELITY = {
    "faithful": "faithful to the paper",
    "as public code": "as the authors' public code has it, where paper and code differ",
    "our reading": "our reading: the paper leaves open what the docstring names",
}


def write(docs: Path) -> None:
    """Writes all pages anew.

    Args:
      docs: the folder of Sphinx's sources.
    """
    for name in FOLDERS:
        shutil.rmtree(docs / name, ignore_errors=True)
        (docs / name).mkdir()
    _write_methods(docs)
    _write_api(docs / "api")
    _write_notebooks(docs / "notebooks")
    verdicts = docs / "evidence" / "verdicts.md"
    verdicts.parent.mkdir(exist_ok=True)
    verdicts.write_text(ledger.page(ROOT / ledger.FOLDER), encoding="utf-8")
    same = verdicts.with_name("fidelity.md")
    same.write_text(fidelity.page(ROOT / ledger.FOLDER / fidelity.FILE), encoding="utf-8")
    evidence_tables.write(RECORDS, docs / "tables")
    _write_zoo(docs / "tables")


def is_a_field(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Whether autodoc should leave a member out; None leaves that to Sphinx."""
    del app, options
    if type(obj).__name__ == "_tuplegetter" or (name in ("count", "index") and what == "class"):
        return True
    return None


# -- methods ---------------------------------------------------------------------------------------


def methods() -> list[Method]:
    """The methods that have a page: all but Optax's own."""
    return [method for method in METHODS.values() if method.fidelity != "Optax"]


def function_behind(method: Method) -> Callable[..., Any]:
    """The public function whose docstring states the rule of a method.

    Args:
      method: an entry of the catalogue.
    """
    factory: Any = method.factory
    while isinstance(factory, functools.partial):
        factory = factory.func
    name = FUNCTIONS.get(method.name, factory.__name__)
    if name not in oa.__all__:
        raise LookupError(f"name the public function of the method {method.name} in `FUNCTIONS`")
    function: Callable[..., Any] = getattr(oa, name)
    return function


def slug(family: str) -> str:
    """The name of a family in files."""
    return re.sub(r"\W+", "_", family).lower()


def _write_methods(docs: Path) -> None:
    chapters = []
    for family in dict.fromkeys(method.family for method in methods()):
        members = [method for method in methods() if method.family == family]
        for method in members:
            page = _method_page(method, docs / "_families" / f"{slug(family)}.md")
            (docs / "methods" / f"{method.name}.md").write_text(page, encoding="utf-8")
        title = family[0].upper() + family[1:]
        chapters.append(_chapter(title, (method.name for method in members)))
    text = "# Methods\n\nOne page for each method of the catalogue, by family.\n\n"
    (docs / "methods" / "index.md").write_text(text + "\n".join(chapters), encoding="utf-8")


def _chapter(title: str, pages: Iterable[str]) -> str:
    lines = "\n".join(pages)
    return f"## {title}\n\n```{{toctree}}\n:maxdepth: 1\n\n{lines}\n```\n"


def _method_page(method: Method, family: Path) -> str:
    function = function_behind(method)
    grid = ", ".join(f"{rate:g}" for rate in method.learning_rates)
    base = f", compared with `{method.base}`" if method.base else ""
    return f"""# {method.name}

{method.summary[0].upper()}{method.summary[1:]}.

| property | of `{method.name}` |
|---|---|
| Paper | [{method.paper.authors}]({method.paper.link}) |
| Fidelity | {FIDELITY[method.fidelity]} |
| Cost of a step | {method.extra_cost()}{base} |
| Learning rates it is tuned on | {grid} |
| Function | [`{function.__name__}`](../api/generated/optax_accel.{function.__name__}.rst) |
| Try it | `python -m experiments.compare --task digits --methods {_rivals(method)}` |

## The rule

```{{eval-rst}}
.. automodule:: {function.__module__}
   :no-members:
   :no-index:
```

## How it moves

{_picture(method)}
## Claims and verdicts

{_claims(method)}
{family.read_text(encoding="utf-8")}"""


def _picture(method: Method) -> str:
    path = PICTURES / f"{method.name}.svg"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; python docs/_ext/method_pictures.py draws it")
    workers = "; one line for each of eight workers" if method.per_worker else ""
    return f"""```{{raw}} html
<div class="method-picture">
{path.read_text(encoding="utf-8")}</div>
```

`{method.name}` and `{method.base}` on linear regression with two parameters, a Hessian with the
eigenvalues 20 and 1, and no noise: 60 steps of each at the best of its learning rates{workers}.
The picture shows how the method moves, not how well it trains a network.
`python docs/_ext/method_pictures.py {method.name}` draws it.
"""


def _claims(method: Method) -> str:
    """The claims that studies judge with this method among those who take part."""
    rows = [row for study in referee.STUDIES.values() for row in _claims_of_study(method, study)]
    rows += _claims_of_survey(method)
    if not rows:
        return "No study of this project judges a claim about this method yet.\n"
    lines = ["| claim | criterion | verdict |", "|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _claims_of_study(method: Method, study: Study) -> list[tuple[str, str, str]]:
    settings = [setting for scale in study.scales.values() for setting in scale.settings]
    contestants = [each for setting in settings for each in setting.contestants]
    # Trials of one method are numbered, and the study of Demon shortens "exponential".
    trials = {re.sub(r"_\d+$", "", trial.name) for each in contestants for trial in each.trials}
    if method.name.replace("exponential", "exp") not in trials:
        return []
    entries = ledger.read(ROOT / ledger.FOLDER / f"{study.name}.jsonl")
    latest = {entry["claim"]: entry for entry in entries}
    rows = []
    for claim in study.claims:
        command = f"python -m experiments.referee {study.name} --scale {next(iter(study.scales))}"
        verdict = f"not judged yet: `{command}`"
        if entry := latest.get(claim.name):
            scale, date = entry["scale"], entry["date"]
            note = f"; {entry['note']}" if entry["note"] else ""
            verdict = f"{entry['verdict']}{note} ({scale}, {date}; [all](../evidence/verdicts.md))"
        rows.append((f"{claim.text} ({claim.source})", claim.criterion, verdict))
    return rows


def _claims_of_survey(method: Method) -> list[tuple[str, str, str]]:
    record = RECORDS / "survey.json"
    results = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"claims": []}
    verdicts = {(claim["name"], claim["better"]): claim for claim in results["claims"]}
    rows = []
    for claim in survey.CLAIMS:
        if claim.better != method.name:
            continue
        verdict = "not judged yet: `python -m experiments.survey`"
        if found := verdicts.get((claim.name, claim.better)):
            low, mean, high = (100 * found[key] for key in ("low", "difference", "high"))
            config = results["config"]
            verdict = f"{found['verdict']}: {mean:.2f} points [{low:.2f}, {high:.2f}]"
            verdict += f" ([{config['task']}, {config['seeds']} seeds](../evidence/survey.md))"
        quality = "mean accuracy over the steps" if claim.quality == "speed" else claim.quality
        criterion = f"its {quality} less that of `{claim.worse}` is > 0: all of the 95 % interval"
        rows.append((f"{claim.name} ({claim.paper})", criterion, verdict))
    return rows


def _rivals(method: Method) -> str:
    names = dict.fromkeys([method.base or "sgd", "adam", method.name])
    return ",".join(names)


# -- public names ----------------------------------------------------------------------------------


def families() -> dict[str, list[str]]:
    """The public names by the headings of the library's `__init__`, each once."""
    groups: dict[str, list[str]] = {}
    heading = ""
    source = (ROOT / "optax_accel" / "__init__.py").read_text(encoding="utf-8")
    for line in source.partition("__all__")[0].splitlines():
        if line.startswith("# ") and "ruff" not in line:
            heading = line[2:]
        elif heading and (names := re.fullmatch(r"from \S+ import (.+)", line)):
            groups.setdefault(heading, []).extend(names[1].split(", "))
    modules = [name for name in oa.__all__ if inspect.ismodule(getattr(oa, name))]
    for name in modules:
        taken = {member for members in groups.values() for member in members}
        module = getattr(oa, name)
        path = module.__name__.removeprefix("optax_accel.")
        members = [f"{path}.{member}" for member in module.__all__ if member not in taken]
        groups[module.__doc__.splitlines()[0].rstrip(".")] = members
    missing = set(oa.__all__) - set(modules) - {n for names in groups.values() for n in names}
    if missing:
        raise LookupError(f"no heading in optax_accel/__init__.py for {sorted(missing)}")
    return {
        heading: [name for name in names if name not in modules]
        for heading, names in groups.items()
    }


def _write_api(folder: Path) -> None:
    parts = ["API", "===", "", "All public names, by family. ``import optax_accel as oa``.", ""]
    for heading, names in families().items():
        parts += [heading, "-" * len(heading), "", ".. autosummary::", "   :toctree: generated", ""]
        parts += [f"   optax_accel.{name}" for name in names]
        parts.append("")
    (folder / "index.rst").write_text("\n".join(parts), encoding="utf-8")


# -- tasks and models ------------------------------------------------------------------------------

# What the command reports of a split besides the loss, by kind of task.
SCORES = {
    "classification": "accuracy",
    "regression": "root of the mean squared error",
    "segmentation": "accuracy of pixels",
    "detection": "average precision of all and of small boxes, `detections.png`",
    "language": "perplexity",
    "translation": "perplexity",
    "autoencoder": "negative bound (nats per image), `samples.png`",
    "score_matching": "denoising loss, `samples.png`",
    "flow": "end-point error in pixels",
}


def _write_zoo(folder: Path) -> None:
    """The tables of tasks and of models, as `train --list` knows them."""
    lines = [
        "| task | model | loss | method, rate | batch | reports |",
        "|---|---|---|---|---|---|",
    ]
    for name in data.TASKS:
        task = data.DEFAULTS[name]
        rate = "middle of its grid" if task.learning_rate is None else f"{task.learning_rate:g}"
        loss = LOSS_OF_MODEL.get(task.model, task.loss)
        cells = (
            f"`{name}`",
            f"`{task.model}`",
            loss,
            f"`{task.method}`, {rate}",
            str(task.batch_size),
            SCORES[task.kind],
        )
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "tasks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [
        "| model | what it is | trained by `python -m experiments.train ...` |",
        "|---|---|---|",
    ]
    texts = models.describe().splitlines()[::2]
    for name, text in zip(models.list(), texts, strict=True):
        what = text.strip().removeprefix(f"{name}: ")
        lines.append(f"| `{name}` | {what} | `{trained_by(name)}` |")
    (folder / "models.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- notebooks -------------------------------------------------------------------------------------


def _write_notebooks(folder: Path) -> None:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        shutil.copy(path, folder)
    pages = "\n".join(path.stem for path in paths)
    text = f"# Notebooks\n\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"
    (folder / "index.md").write_text(text, encoding="utf-8")
