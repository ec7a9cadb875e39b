"""Vectors, labels and arguments at the edge of what can be probed."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.probing import class_directions, probe
from tests.models import VOCABULARY, build
from tests.probing.planted_vectors import QUICK, along, random_activations

FIRST = "blocks[0].output @ last"


def _constant(width: int, noise: float = 0.0) -> rl.Activations:
    generator = np.random.default_rng(0)
    held = random_activations(generator, examples=40, width=width, sites=2)
    same = torch.from_numpy(1 + generator.random(width)).float()
    labels = torch.arange(40) % 2
    held.flat(FIRST).vectors[:] = same * (1 + noise * labels[:, None])
    return held


@pytest.mark.parametrize("width", [8, 60])
@pytest.mark.parametrize(
    ("estimator", "memory"),
    [("logistic", "2GB"), ("logistic", 2000), ("lda", "2GB"), ("mean_difference", "2GB"), ("ridge", "2GB"),
     ("ridge", 2000)],
)  # fmt: skip
def test_vectors_that_are_all_the_same_tell_nothing(width: int, memory: Any, estimator: str) -> None:
    labels = np.arange(40) % 2
    kind = "regression" if estimator == "ridge" else "classification"
    result = probe(
        _constant(width), labels=labels, estimator=estimator, kind=kind, permutations=30, control=None,
        bootstrap=0, memory=memory, progress=False,
    )  # fmt: skip
    assert result.p_values[0, 0] == 1
    assert result.score[0, 0] <= result.chance[result.metric][0] + 1e-9
    assert np.isfinite(result.score).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_token_of_all_prompts_is_said_to_be_the_same(family: str) -> None:
    generator = np.random.default_rng(0)
    rows = [[7, *generator.integers(10, VOCABULARY, 3 + 6 * (n % 2)).tolist()] for n in range(30)]
    options: dict[str, Any] = {**QUICK, "permutations": 30, "batch_size": 4}
    result = probe(build(family), rows, [len(row) for row in rows], positions=["first", "last"], **options)
    assert result.p_values[:, 0].min() == 1
    (note,) = (note for note in result.notes if "rounding" in note)
    assert "blocks[2].output @ first" in note
    assert "last" not in note


def test_rounding_that_gives_the_label_away_is_noted() -> None:
    labels = np.arange(40) % 2
    result = probe(_constant(8, noise=1e-6), labels=labels, **QUICK)
    # The probe cannot know where the difference comes from, so the reader has to.
    assert result.score[0, 0] == 1
    assert any("same but for rounding at blocks[0].output @ last;" in note for note in result.notes)
    assert not any(
        "rounding" in note for note in probe(_constant(8, noise=1e-3), labels=labels, **QUICK).notes
    )


@pytest.mark.parametrize("estimator", ["lda", "logistic", "mean_difference"])
def test_directions_of_several_classes_know_nothing_of_a_common_offset(estimator: Any) -> None:
    generator = np.random.default_rng(1)
    labels = np.arange(240) % 3
    planted = 4 * np.eye(8)[:3][labels] + 50 * generator.normal(size=8)
    held = random_activations(generator, examples=240, sites=1, planted={0: planted})
    found = probe(held, labels=labels, estimator=estimator, **QUICK)[FIRST]
    towards = np.eye(8)[:3] - np.eye(8)[:3].mean(0)
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    assert (found.direction.numpy() * towards).sum(1).min() > 0.95
    if estimator != "logistic":
        expected = class_directions(held[FIRST], labels, estimator)
        assert np.allclose(found.direction.numpy(), expected, atol=2e-3)
    step = found.steer(1.0, label=2)
    moved = step.build(8)(torch.zeros(1, 8))[0].numpy()
    assert moved @ towards[2] > 0.95


def test_rare_classes_leave_no_fit_to_fail_on_control_labels() -> None:
    labels = np.zeros(100, dtype=int)
    labels[:5] = 1
    held = random_activations(np.random.default_rng(0), examples=100, width=4, sites=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (3, 4):
            found = probe(held, labels=labels, seed=seed, **{**QUICK, "control": "auto"})
            assert found.control is not None
            assert np.isfinite(found.control["balanced_accuracy"]).all()


def test_a_map_can_be_pickled_and_still_fits_its_probes() -> None:
    held, labels = random_activations(np.random.default_rng(0)), np.arange(60) % 2
    result = probe(held, labels=labels, **QUICK)
    again = pickle.loads(pickle.dumps(result))
    pd.testing.assert_frame_equal(again.to_frame(), result.to_frame())
    assert torch.equal(again[FIRST].direction, result[FIRST].direction)
    assert again[FIRST].score == result.score[0, 0]


def test_copies_of_a_prompt_are_noted_where_nothing_holds_them_together() -> None:
    rows = [[7, 10 + n % 12, 40 + n % 12] for n in range(24)]
    labels = [n % 2 for n in range(24)]
    options: dict[str, Any] = {"sites": "blocks[0].output", **QUICK}
    assert any(
        "12 examples are copies" in note for note in probe(build("llama"), rows, labels, **options).notes
    )
    held = probe(build("llama"), rows, labels, groups=[n % 12 for n in range(24)], **options)
    assert not any("copies" in note for note in held.notes)


def test_several_labels_are_told_by_lda_before_and_after_an_edit() -> None:
    generator = np.random.default_rng(2)
    rows = generator.integers(10, VOCABULARY, (40, 4)).tolist()
    labels = (generator.random((40, 3)) < 0.5).astype(int)
    edit = rl.Edit("blank", at="blocks[1].output", positions="all", intervention=rl.Zero())
    reft = rl.InterventionGraph(edit).bind(build("llama"))
    found = rl.probe_change(
        reft, rows, labels, estimator="lda", folds=3, permutations=0, bootstrap=0, progress=False
    )
    assert np.isfinite(found.base).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 2**40}, "seed=1099511627776: expected a whole number from 0 to 2147483647"),
        ({"groups": [None, *range(59)]}, "groups: entry 0 is None; give every example one"),
        ({"groups": dict.fromkeys(range(60))}, "groups: a dict has no order of examples"),
        ({"control": [[1]] * 60}, "control: unhashable type: 'list'; expected names or numbers"),
        ({"labels": np.arange(60)}, "if labels are amounts, say kind='regression'"),
    ],
)
@pytest.mark.usefixtures("users_call")
def test_what_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    held = random_activations(np.random.default_rng(0))
    with pytest.raises(DataError) as caught:
        probe(held, **{**QUICK, "labels": np.arange(60) % 2, **arguments})
    assert message in str(caught.value)


def test_an_estimator_without_probabilities_has_no_code_before_anything_is_fitted() -> None:
    from sklearn.svm import LinearSVC

    class Untouched(LinearSVC):
        def fit(self, *_: Any) -> Any:
            raise AssertionError("fitted")

    held, labels = random_activations(np.random.default_rng(0)), np.arange(60) % 2
    with pytest.raises(DataError, match="has no predict_proba"):
        probe(held, labels=labels, estimator=Untouched(), description=True, **QUICK)


def test_figures_mark_as_significant_only_what_has_p_values() -> None:
    labels = np.arange(60) % 2
    held = random_activations(np.random.default_rng(0), planted={1: along(np.eye(8)[0], 6 * labels)})
    result = probe(
        held, labels=labels, **{**QUICK, "control": "auto", "permutations": 40, "description": True}
    )
    assert result.description is not None
    legends = {}
    for metric in ("auroc", "selectivity", "bits"):
        (legend,) = result.plot(metric).legends
        legends[metric] = [text.get_text() for text in legend.get_texts()]
    assert any("p ≤ 0.05" in text for text in legends["auroc"])
    assert not any("p ≤ 0.05" in text for text in legends["selectivity"] + legends["bits"])
    # 60 labels of two equally likely classes are 60 bits.
    assert "uniform code, 60" in legends["bits"]
