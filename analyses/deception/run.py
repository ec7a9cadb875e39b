"""Honest or deceptive argument? Surface cues, the bare model, a probe and LoReFT on unseen topics.

    python analyses/deception/run.py            # all stages
    python analyses/deception/run.py --small    # a few topics, one seed, in the folder given by --out

Each stage keeps what it found in `--work`, so that an interrupted run goes on where it was, and a second run
only writes the tables and figures again. Written into `--out`: `results.csv` (one line a judge),
`devices.csv`, `differences.csv`, `judged.csv` (one line a judgement), `learned.csv`, `table.md`, and figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import writing
from arguments import Split
from editing import trained
from judges import (
    PLAIN,
    SYSTEMS,
    bag_of_words,
    best_threshold,
    chosen_inside,
    lengths,
    probe_scores,
    question,
    standard_logistic,
    yes_minus_no,
)
from learning import learned
from study import PROBED, SMALL, Settings, Study
from tqdm.auto import tqdm

import reftlab as rl

HERE = Path(__file__).parent


def asked(study: Study) -> dict[str, np.ndarray]:
    """log P(Yes) − log P(No) of the bare model for all arguments, by system prompt."""

    def work(name: str) -> dict[str, np.ndarray]:
        model, tokenizer = study.model
        return {"scores": yes_minus_no(model, tokenizer, study.texts, SYSTEMS[name], what=f"{name} prompt")}

    return {name: study.kept(f"asked-{name}", lambda name=name: work(name))["scores"] for name in SYSTEMS}


def last_vectors(study: Study) -> dict[str, np.ndarray]:
    """The bare model's vectors at the last prompt token, by site `(argument, width)`."""

    def work() -> dict[str, np.ndarray]:
        model, tokenizer = study.model
        prompts = [question(text) for text in study.texts]
        found = rl.collect(model, prompts, PROBED, tokenizer=tokenizer, chat=True, system=PLAIN)
        return {name: vectors.numpy() for name, vectors in found.items()}

    return study.kept("vectors", work)


def edited(study: Study, split: Split, shuffled: bool = False) -> dict[str, np.ndarray]:
    """One training's scores of its test arguments; the first training is kept as an artifact too."""

    def work() -> dict[str, np.ndarray]:
        model, tokenizer = study.model
        one = trained(
            model, tokenizer, study.arguments, split,
            epochs=study.settings.epochs, store=study.store, shuffled=shuffled,
        )  # fmt: skip
        if not shuffled and split is study.splits[0]:
            one.reft.save(study.folder / "artifact")
        return {
            "scores": one.scores, "losses": one.losses,
            "steps": np.array(one.steps), "numbers": np.array(one.numbers),
        }  # fmt: skip

    kind = "shuffled" if shuffled else "loreft"
    return study.kept(f"{kind}-{split.seed}-{split.fold}", work)


def judged_in(
    study: Study, split: Split, bare: dict[str, np.ndarray], vectors: dict[str, np.ndarray]
) -> list[pd.DataFrame]:
    """Every judge's judgements of one fold's test arguments."""
    train, test = np.array(split.train), np.array(split.test)
    labels, groups = study.labels, [study.topics[number] for number in split.train]
    frames: list[pd.DataFrame] = []

    def add(judge: str, scores: Any, threshold: float = 0.0, note: str = "") -> None:
        scores = np.asarray(scores, dtype=float)
        frames.append(
            pd.DataFrame(
                {
                    "judge": judge,
                    "seed": split.seed,
                    "fold": split.fold,
                    "id": [study.arguments[number].id for number in test],
                    "topic": [study.arguments[number].topic for number in test],
                    "device": [study.arguments[number].device for number in test],
                    "deceptive": labels[test],
                    "score": scores,
                    "says": scores > threshold,
                    "right": (scores > threshold) == labels[test],
                    "threshold": threshold,
                    "note": note,
                }
            )
        )

    # The commoner class before classes were evened out is the deceptive one, in every fold.
    add("always deceptive", np.ones(len(test)))
    counts = lengths(study.texts)
    fit = chosen_inside(standard_logistic(), counts[train], labels[train], groups)
    add(
        "length", fit.decision_function(counts[test]), note=f"C {fit.best_params_['logisticregression__C']:g}"
    )
    texts = np.array(study.texts, dtype=object)
    fit = chosen_inside(bag_of_words(), texts[train], labels[train], groups)
    add(
        "bag of words",
        fit.decision_function(texts[test]),
        note=f"C {fit.best_params_['logisticregression__C']:g}",
    )
    for name, scores in bare.items():
        add(f"bare model, {name} prompt", scores[test])
        threshold = best_threshold(scores[train], labels[train])
        add(f"bare model, {name} prompt, threshold from training", scores[test], threshold)
    scores, site, strength = probe_scores(vectors, split.train, split.test, labels, study.topics)
    add("linear probe of the bare model", scores, note=f"{site}, C {strength:g}")
    add("LoReFT", edited(study, split)["scores"])
    if split.seed == study.settings.seeds[0]:
        add("LoReFT, labels shuffled", edited(study, split, shuffled=True)["scores"])
    return frames


def judged(study: Study) -> pd.DataFrame:
    """One line a judgement: judge, seed, fold, argument, score, what it says, whether it is right."""
    bare, vectors = asked(study), last_vectors(study)
    found: list[pd.DataFrame] = []
    for split in tqdm(study.splits, desc="folds"):
        found += judged_in(study, split, bare, vectors)
    return pd.concat(found, ignore_index=True)


def chosen(judged: pd.DataFrame, split: Split) -> dict[str, str]:
    """What was chosen inside a fold's training part, by judge."""
    part = judged[(judged["seed"] == split.seed) & (judged["fold"] == split.fold) & (judged["note"] != "")]
    return part.groupby("judge")["note"].first().to_dict()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few topics and one seed, to see it run")
    parser.add_argument("--out", type=Path, help="where results go; this folder, or out/deception-small")
    parser.add_argument("--work", type=Path, default=Path("out/deception"), help="where stages are kept")
    options = parser.parse_args(arguments)
    out = options.out or (Path("out/deception-small") if options.small else HERE)
    out.mkdir(parents=True, exist_ok=True)
    study = Study(SMALL if options.small else Settings(), options.work)
    found = judged(study)
    what = learned(study)
    facts = {
        "arguments": len(study.arguments),
        "splits": [
            {
                "seed": one.seed, "fold": one.fold, "train": len(one.train), "dropped": one.dropped,
                "repeated": one.repeated, "test": len(one.test), "removed": len(one.removed),
                "losses": edited(study, one)["losses"].round(3).tolist(),
                "chosen": chosen(found, one),
            }
            for one in study.splits
        ],
        "numbers": int(edited(study, study.splits[0])["numbers"]),
        "steps": int(edited(study, study.splits[0])["steps"]),
    }  # fmt: skip
    (out / "splits.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    writing.write(out, found, what, draws=study.settings.draws)


if __name__ == "__main__":
    main()
