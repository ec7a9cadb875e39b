"""What the first training's edits learned, asked on arguments that they were not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from arguments import Argument, normalised
from judges import examples

import reftlab as rl

if TYPE_CHECKING:
    from study import Study

METHODS = ("mean_difference", "logistic")
BLOCKS = "blocks[9,14,19,24,29].output"


def learned(study: Study) -> Path:
    """Explain the first training, if that was not done yet.

    Returns:
        A folder with `learned.csv` (quantity, part, value, low, high), `said.json`, figures, and a report.
    """
    folder = study.folder / "learned"
    if not (folder / "said.json").exists():
        folder.mkdir(exist_ok=True)
        model, tokenizer = study.model
        reft = rl.load(study.folder / "artifact", model, tokenizer)
        test = [study.arguments[number] for number in study.splits[0].test]
        pairs = examples(test)
        train = [study.arguments[number] for number in sorted(set(study.splits[0].train))]
        lines: list[dict[str, Any]] = []
        said: dict[str, Any] = {"arguments": len(test)}
        causes(reft, pairs, lines, said, folder, study.settings.budget)
        before_and_after(reft, {"held_out": test, "training": train}, said, folder)
        angles(reft, train, lines, said, folder)
        promoted(reft, pairs, said, folder, study.settings.budget)
        pd.DataFrame(lines).to_csv(folder / "learned.csv", index=False)
        (folder / "said.json").write_text(json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def causes(
    reft: Any, pairs: list[rl.Example], lines: list, said: dict, folder: Path, budget: float | None
) -> None:
    """How large the effect is, on giving an answer of the right form and on giving the right one."""
    measures = {"answer loss": None, "right − wrong": right_minus_wrong(pairs)}
    for name, metric in measures.items():
        found = rl.leave_one_out(reft, pairs, by="site", metric=metric)
        lines.append(line(f"effect of all edits on the {name}", "all", found.effect))
        for label, lost, alone in zip(found.labels, found.lost, found.gained, strict=True):
            lines.append(line(f"{name}, left out", label, lost))
            lines.append(line(f"{name}, alone", label, alone))
        kept = rl.faithfulness(reft, pairs, metric, max_edits=0, draws=5, budget=budget)
        said[f"faithfulness, {name}"] = kept.sentence
        if name == "answer loss":
            kept.plot().savefig(folder / "faithfulness.png")


def before_and_after(reft: Any, arguments: dict[str, list[Argument]], said: dict, folder: Path) -> None:
    """The same probes on the bare model's vectors and on those under the edits.

    Two concepts: the one that the edits were trained for, and one that they were not, whether the argument
    says "I". On training arguments the edited vectors hold what was learned by heart, so that probes there
    show the training and not the concept; both are measured, to be seen side by side.
    """
    for name, rows in arguments.items():
        concepts = {
            "deceptive": [one.label for one in rows],
            'says "I"': ["yes" if "i" in normalised(one.text) else "no" for one in rows],
        }
        found = rl.probe_change(
            reft, [one.prompt for one in examples(rows)], concepts, BLOCKS, "last",
            groups=[one.topic for one in rows], permutations=99,
        )  # fmt: skip
        found.to_frame().to_csv(folder / f"probes_{name}.csv", index=False)
        found.plot().savefig(folder / f"probes_{name}.png")
        said[f"probes on {name} arguments"] = {
            "arguments": len(rows),
            "gained": [f"{one.concept} at {one.site}, {one.difference:+.2f}" for one in found.gained()],
            "lost": [f"{one.concept} at {one.site}, {one.difference:+.2f}" for one in found.lost()],
        }


def angles(reft: Any, arguments: list[Argument], lines: list, said: dict, folder: Path) -> None:
    """What the edits read and write against directions that the training arguments' labels give."""
    labels = [one.label for one in arguments]
    found = rl.edit_angles(reft, examples(arguments), labels, methods=METHODS)
    fitted = [one for one in found.lines if one.kind in METHODS]
    for one in found.lines:
        lines.append(
            {
                "quantity": f"smallest angle of the {one.side} subspace to {one.against}, degrees",
                "part": one.edit,
                "value": one.angles.smallest,
                "at_random": one.angles.band[0][1],
                "p": one.angles.p_angle,
                "q": one.q,
            }
        )
    said["angles"] = {
        "comparisons with the labels": len(fitted),
        "with q ≤ 0.05": [f"{one.edit} {one.side} and {one.against}" for one in fitted if one.q <= 0.05],
    }
    found.plot().savefig(folder / "angles.png")


def promoted(reft: Any, pairs: list[rl.Example], said: dict, folder: Path, budget: float | None) -> None:
    """The tokens that each edit's directions promote, and a report on a few arguments."""
    few = pairs[:24]
    found = rl.explain(
        reft, few, metric=right_minus_wrong(few), only=["dose", "direct"], max_edits=0, max_new_tokens=4,
        budget=budget,
    )  # fmt: skip
    found.save(folder / "report.html")
    said["tokens"] = {
        one.edit: [
            {
                "direction": label,
                "rms": round(float(rms), 3),
                "promotes": [token.text for token in up[:6]],
                "suppresses": [token.text for token in down[:6]],
            }
            for label, rms, up, down in zip(
                one.tokens.labels, one.directions.rms, one.tokens.promoted, one.tokens.suppressed, strict=True
            )
        ]
        for one in found.edits
    }


def right_minus_wrong(pairs: list[rl.Example]) -> Any:
    """The logit of the right answer minus that of the wrong one, which no habit of saying Yes can raise."""
    answers = [str(one.answer) for one in pairs]
    return rl.logit_diff(answers, ["No" if answer == "Yes" else "Yes" for answer in answers])


def line(quantity: str, part: str, estimate: Any) -> dict[str, Any]:
    value, low, high = estimate.value, estimate.low, estimate.high
    return {"quantity": quantity, "part": part, "value": value, "low": low, "high": high}
