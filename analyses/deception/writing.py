"""Tables and figures of the study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from scoring import Topics, accuracies, aurocs, interval

from reftlab.plotting.style import BLACK, BLUE, GREY, VERMILLION, empty_figure, frame
from reftlab.plotting.wording import true_minus

EDITED, WORDS, PROBE = "LoReFT", "bag of words", "linear probe of the bare model"
CONTROL = "LoReFT, labels shuffled"
HONEST = "none: honest"


def write(out: Path, judged: pd.DataFrame, learned: Path, *, draws: int) -> None:
    """Write everything that a reader looks at.

    Args:
        out: the folder for it.
        judged: one line a judgement, see `run.judged`.
        learned: folder with what was found of the edits.
        draws: resamples of topics.
    """
    drawn = Topics(judged["topic"].tolist(), draws)
    results, differences = compared(judged, drawn)
    devices = by_device(judged, drawn)
    shared = agreement(judged, drawn)
    for name, table in {"results": results, "differences": differences, "devices": devices}.items():
        table.round(4).to_csv(out / f"{name}.csv", index=False)
    shared.round(4).to_csv(out / "agreement.csv", index=False)
    kept = judged[["judge", "seed", "fold", "id", "score", "threshold", "right"]]
    kept.round({"score": 3, "threshold": 3}).to_csv(out / "judged.csv", index=False)
    for file in sorted(learned.iterdir()):
        if file.suffix in (".csv", ".json", ".png"):
            shutil.copy(file, out / file.name)
    overview(results).savefig(out / "judges.png")
    device_figure(devices).savefig(out / "devices.png")
    text = "\n\n".join(
        [
            markdown(results_table(results)), markdown(differences_table(differences)),
            markdown(devices.round(2)), markdown(shared.round(3)),
            said_in(json.loads((learned / "said.json").read_text(encoding="utf-8"))),
        ]
    )  # fmt: skip
    text = true_minus(text)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def compared(judged: pd.DataFrame, drawn: Topics) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy and AUROC of each judge, and how much more LoReFT judges right than each other one."""
    rows, draws = [], {}
    for judge, part in judged.groupby("judge", sort=False):
        accuracy, auroc = accuracies(part, drawn), aurocs(part, drawn)
        draws[judge] = (accuracy, auroc)
        seeds = part.groupby("seed")["right"].mean()
        rows.append(
            {
                "judge": judge,
                **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), interval(accuracy), strict=True)),
                **dict(zip(("auroc", "auroc_low", "auroc_high"), interval(auroc), strict=True)),
                "says_deceptive": part["says"].mean(),
                "seeds": " ".join(f"{value:.3f}" for value in seeds),
                "judgements": len(part),
            }
        )
    differences = []
    for judge, (accuracy, auroc) in draws.items():
        if judge in (EDITED, CONTROL):
            continue
        of_accuracy, of_auroc = interval(draws[EDITED][0] - accuracy), interval(draws[EDITED][1] - auroc)
        differences.append(
            {
                "LoReFT minus": judge,
                **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), of_accuracy, strict=True)),
                **dict(zip(("auroc", "auroc_low", "auroc_high"), of_auroc, strict=True)),
            }
        )
    return pd.DataFrame(rows), pd.DataFrame(differences)


def by_device(judged: pd.DataFrame, drawn: Topics) -> pd.DataFrame:
    """Share judged right of the honest arguments and of each device's, with LoReFT's interval."""
    named = judged.assign(device=judged["device"].fillna(HONEST))
    edited = named[named["judge"] == EDITED]
    rows = []
    for device, part in edited.groupby("device"):
        value, low, high = interval(accuracies(part, drawn))
        row = {"device": device, "arguments": part["id"].nunique(), EDITED: value, "low": low, "high": high}
        for judge in (PROBE, WORDS, "bare model, careful prompt"):
            row[judge] = named[(named["judge"] == judge) & (named["device"] == device)]["right"].mean()
        rows.append(row)
    return pd.DataFrame(rows).sort_values([EDITED, "device"], ignore_index=True)


def agreement(judged: pd.DataFrame, drawn: Topics) -> pd.DataFrame:
    """How far other judges' scores go with LoReFT's, and what LoReFT does where they are wrong.

    Rank correlations are of one fold's scores inside one class, averaged, so that the label itself, which
    all judges see something of, makes none.
    """
    keys = ["seed", "fold", "id"]
    edited = judged[judged["judge"] == EDITED].set_index(keys)
    rows = []
    for name in (WORDS, "length", PROBE, "bare model, plain prompt"):
        other = judged[judged["judge"] == name].set_index(keys).loc[edited.index]
        both = edited.assign(other=other["score"], other_right=other["right"])
        parts = both.groupby(["seed", "fold", "deceptive"])
        ranks = [spearmanr(part["score"], part["other"]).statistic for _, part in parts if len(part) > 2]
        row: dict[str, Any] = {"judge": name, "rank correlation with LoReFT": float(np.nanmean(ranks))}
        for right in (True, False):
            part = both[both["other_right"] == right].reset_index()
            value, low, high = interval(accuracies(part, drawn))
            word = "right" if right else "wrong"
            row[f"LoReFT where it is {word}"] = value
            row[f"{word} low"], row[f"{word} high"], row[f"{word} judgements"] = low, high, len(part)
        rows.append(row)
    return pd.DataFrame(rows)


def overview(results: pd.DataFrame) -> Figure:
    """Accuracy and AUROC of each judge with their intervals over topics."""
    figure = empty_figure(8.6, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(results))[::-1]
    for axes, name in ((left, "accuracy"), (right, "auroc")):
        for place, (_, row) in zip(places, results.iterrows(), strict=True):
            learns = str(row["judge"]) in (EDITED,)
            colour = VERMILLION if learns else BLACK if row["judge"] == CONTROL else BLUE
            axes.plot([row[f"{name}_low"], row[f"{name}_high"]], [place, place], color=colour, linewidth=2)
            axes.plot(row[name], place, "D" if learns else "o", color=colour, markersize=6)
        axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
        axes.text(0.502, places[0] + 0.55, "chance", fontsize=7, color="#555555", va="center")
        axes.set_ylim(-0.7, len(results) - 0.1)
        axes.set_xlim(min(0.38, *results[f"{name}_low"]) - 0.02, max(0.8, *results[f"{name}_high"]) + 0.02)
    left.set_yticks(places, results["judge"].tolist())
    frame(left, x="accuracy on unseen topics", grid="x")
    frame(right, x="AUROC on unseen topics", grid="x")
    return figure


def device_figure(devices: pd.DataFrame) -> Figure:
    """Share judged right of each device's arguments, LoReFT over a bag of words."""
    figure = empty_figure(7.2, 4.8)
    axes = figure.subplots()
    places = np.arange(len(devices))
    labels = [f"{d} ({n})" for d, n in zip(devices["device"], devices["arguments"], strict=True)]
    ends = devices[["low", "high"]].to_numpy()
    axes.hlines(places, ends[:, 0], ends[:, 1], color=VERMILLION, alpha=0.45, linewidth=3)
    axes.plot(
        devices[EDITED], places, "D", color=VERMILLION, markersize=6, label=f"{EDITED}, with 95% interval"
    )
    axes.plot(
        devices[WORDS], places, "o", color=BLUE, markersize=8, markeredgewidth=1.6, markerfacecolor="none",
        label=WORDS,
    )  # fmt: skip
    axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(places, labels)
    axes.set_xlim(-0.03, 1.03)
    frame(axes, x="share judged right, all seeds together", y="device (number of arguments)", grid="x")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def shown(row: pd.Series, name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "judge": results["judge"],
            "accuracy [95% interval]": [shown(row, "accuracy") for _, row in results.iterrows()],
            "AUROC [95% interval]": [shown(row, "auroc") for _, row in results.iterrows()],
            "says deceptive": results["says_deceptive"].map("{:.2f}".format),
            "accuracy by seed": results["seeds"],
        }
    )


def differences_table(differences: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "LoReFT minus": differences["LoReFT minus"],
            "accuracy [95% interval]": [shown(row, "accuracy") for _, row in differences.iterrows()],
            "AUROC [95% interval]": [shown(row, "auroc") for _, row in differences.iterrows()],
        }
    )


def markdown(table: pd.DataFrame) -> str:
    lines: list[Sequence[Any]] = [list(table.columns), ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def said_in(said: dict[str, Any]) -> str:
    """What was found of the edits, as a list."""
    lines = []
    for name, value in said.items():
        if name == "tokens":
            for edit, directions in value.items():
                main = max(directions, key=lambda one: one["rms"])
                lines.append(f"main direction of {edit} promotes: {', '.join(map(repr, main['promotes']))}")
        elif isinstance(value, dict):
            parts = [f"{key}: {shown_item(item)}" for key, item in value.items()]
            lines.append(f"{name}: {'; '.join(parts)}")
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(f"- {line}" for line in lines)


def shown_item(item: Any) -> str:
    return str(item) if not isinstance(item, list) else ", ".join(item) or "none"
