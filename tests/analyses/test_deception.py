"""The arguments of analyses/deception, its splits, and what it counts."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

FOLDER = Path(__file__).parents[2] / "analyses" / "deception"


def part_of(name):
    """A module of the study, which is a script's folder and no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


arguments, judges, scoring = map(part_of, ("arguments", "judges", "scoring"))


@pytest.fixture(scope="module")
def rows():
    return arguments.read_arguments()


@pytest.fixture(scope="module")
def originals(rows):
    return [row for row in rows if row.duplicate_of is None]


def test_every_topic_has_two_honest_and_two_deceptive_arguments(originals):
    assert len(originals) == 240
    counts = Counter((row.topic, row.label) for row in originals)
    assert len({topic for topic, _ in counts}) == 60
    assert set(counts.values()) == {2}
    assert {label for _, label in counts} == {"honest", "deceptive"}
    assert set(Counter(row.domain for row in originals).values()) == {16}


def test_ids_are_unique_and_only_deceptive_arguments_have_a_device(rows):
    assert len({row.id for row in rows}) == len(rows) == 250
    assert all((row.device is not None) == row.deceptive for row in rows)
    devices = Counter(row.device for row in rows if row.device)
    assert len(devices) == 16
    assert min(devices.values()) >= 4


def test_arguments_have_two_to_five_sentences_and_the_classes_like_lengths(originals):
    counts = judges.lengths([row.text for row in originals])
    assert (counts[:, 2] >= 2).all()
    assert (counts[:, 2] <= 6).all()
    assert (counts[:, 0] >= 40).all()
    assert (counts[:, 0] <= 65).all()
    deceptive = np.array([row.deceptive for row in originals])
    words, characters = counts[deceptive, :2].mean(0) / counts[~deceptive, :2].mean(0)
    assert abs(words - 1) < 0.05
    assert abs(characters - 1) < 0.05


def test_the_marked_repeats_and_no_others_are_found(rows):
    marked = {frozenset((row.id, row.duplicate_of)) for row in rows if row.duplicate_of}
    same = arguments.repeats(rows)
    found = {frozenset((rows[i].id, rows[j].id)) for i in range(len(rows)) for j in range(i) if same[i, j]}
    assert found == marked
    assert len(found) == 10
    by_id = {row.id: row for row in rows}
    for row in rows:
        if row.duplicate_of:
            original = by_id[row.duplicate_of]
            assert (row.label, row.device) == (original.label, original.device)
            assert row.topic != original.topic  # so that a split by topic alone would let it through


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_topic_and_no_repeat_is_on_both_sides_of_a_split(rows, seed):
    same = arguments.repeats(rows)
    for split in arguments.splits(rows, 3, seed):
        held_out = {rows[number].topic for number in (*split.test, *split.removed)}
        learned = [number for number, row in enumerate(rows) if row.topic not in held_out]
        assert set(split.train) <= set(learned)
        assert not same[np.ix_(split.test, learned)].any()
        assert same[np.ix_(split.test, split.test)].sum() == len(split.test)
        assert not set(split.test) & set(split.removed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_argument_is_judged_or_removed_once_and_trainings_are_balanced(rows, seed):
    found = arguments.splits(rows, 3, seed)
    assert sorted(number for split in found for number in (*split.test, *split.removed)) == list(range(250))
    for split in found:
        times = Counter(split.train)
        labels = Counter(rows[number].label for number in split.train)
        assert labels["honest"] == labels["deceptive"]
        assert all(times[number] == 1 for number in times if rows[number].deceptive)
        honest = [number for number in times if not rows[number].deceptive]
        assert sum(times[number] - 1 for number in honest) == split.repeated > 0
        assert split.dropped > 0
        assert len(split.test) >= 60


def test_the_threshold_is_the_one_that_judges_most_right():
    random = np.random.default_rng(0)
    for _ in range(20):
        scores, deceptive = random.normal(size=30).round(1), random.random(30) < 0.5
        best = judges.best_threshold(scores, deceptive)
        by_hand = max(((scores > t) == deceptive).mean() for t in np.arange(-4, 4, 0.05) + 0.001)
        assert ((scores > best) == deceptive).mean() == by_hand


def test_auroc_is_scikit_learns_inside_each_fold_and_its_interval_resamples_topics():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "seed": 0,
            "fold": np.repeat([0, 1], 40),
            "topic": [f"t{n // 4}" for n in range(80)],
            "deceptive": np.tile([True, False], 40),
        }
    )
    frame["score"] = (random.normal(size=80) + frame["deceptive"]).round(1) + 100 * frame["fold"]
    frame["right"] = (frame["score"] > 0.5 + 100 * frame["fold"]) == frame["deceptive"]
    drawn = scoring.Topics(frame["topic"].tolist(), draws=300)
    value, low, high = scoring.interval(scoring.aurocs(frame, drawn))
    parts = [roc_auc_score(part["deceptive"], part["score"]) for _, part in frame.groupby("fold")]
    assert value == pytest.approx(np.mean(parts))
    assert low < value < high
    draw = scoring.accuracies(frame, drawn)[7]
    again = np.concatenate(
        [
            np.repeat(frame.loc[frame["topic"] == topic, "right"].to_numpy(), int(times))
            for topic, times in zip(drawn.names, drawn.weights[7], strict=True)
        ]
    )
    assert draw == pytest.approx(again.mean())
