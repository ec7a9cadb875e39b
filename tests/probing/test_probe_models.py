"""Probes of models: whose vectors they are, and what becomes of a probe in a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import reftlab as rl
from reftlab.probing import probe
from tests.models import VOCABULARY, build
from tests.oracle import plain_read, raw_blocks
from tests.probing.planted_vectors import QUICK, along, random_activations

LIGHT: dict[str, Any] = {**QUICK, "estimator": "mean_difference"}


def _rows(count: int = 24, seed: int = 3) -> list[list[int]]:
    """Prompts of other lengths, which end in one of two tokens."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(10, VOCABULARY, generator.integers(2, 8)).tolist() for _ in range(count)]
    return [[*row, 5 + number % 2] for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("family", "dtype", "batch_size"),
    [
        ("llama", torch.float32, 1),
        ("llama", torch.bfloat16, 5),
        ("gpt2", torch.float32, 5),
        ("bert", torch.float32, 1),
    ],
)
def test_the_vectors_are_those_of_plain_hooks_on_single_rows(
    family: str, dtype: torch.dtype, batch_size: int
) -> None:
    model, rows = build(family).to(dtype), _rows()
    labels = [row[-1] for row in rows]
    result = probe(model, rows, labels, positions=["last", 0], batch_size=batch_size, **LIGHT)
    assert [site.name for site in result.sites] == [
        "blocks[0].output",
        "blocks[1].output",
        "blocks[2].output",
    ]
    assert [site.block for site in result.sites] == [0, 1, 2]
    assert result.columns == ("last", "[0]")
    for number, block in enumerate(raw_blocks(model)):
        alone = [plain_read(model, block, {"input_ids": torch.tensor([row])})[0].float() for row in rows]
        for column, place in enumerate((-1, 0)):
            vectors = torch.stack([one[place] for one in alone]).double().numpy()
            fitted = result[f"blocks[{number}].output @ {result.columns[column]}"].estimator
            # A nearest mean is what it was fitted on.
            means = np.stack([vectors[np.array(labels) == label].mean(0) for label in (5, 6)])
            assert np.allclose(fitted.means_, means, atol=1e-4 if dtype == torch.float32 else 0.05)
    # The last token is the label, and in a causal model the first one knows nothing of it.
    assert result.score[0, 0] > 0.9
    if family != "bert":
        assert result.score[:, 1].max() < 0.85
    raw = result[f"{result.sites[1].raw} @ last"]
    assert raw is result["blocks[1].output @ last"]


def _collected(model: Any, rows: Any, block: int, place: int) -> np.ndarray:
    found = rl.collect(model, rows, f"blocks[{block}].output @ [{place}]", progress=False, batch_size=3)
    return next(iter(found.values())).double().numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str, llama: Any) -> None:
    rows = _rows(12)
    labels = [row[-1] for row in rows]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    masks = [
        [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, pads, strict=True)
    ]
    padded = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
    options: dict[str, Any] = {"sites": "blocks[1].output", "positions": "last(2)", "folds": 3, **LIGHT}
    found = probe(llama, padded, labels, **options)["blocks[1].output @ last(2)"]
    plain = probe(llama, rows, labels, **options)["blocks[1].output @ last(2)"]
    assert torch.allclose(found.direction, plain.direction, atol=1e-4)


def test_a_bound_model_is_probed_with_its_edits_and_by_task(llama: Any) -> None:
    rows = _rows()
    labels = [row[-1] for row in rows]
    edit = rl.Edit("blank", at="blocks[1].output", positions="all", intervention=rl.Zero())
    reft = rl.InterventionGraph(edit).bind(llama)
    options: dict[str, Any] = {"estimator": LogisticRegression(), **QUICK}
    edited = probe(reft, rows, labels, sites=["blocks[0].output", "blocks[2].output"], **options)
    plain = probe(llama, rows, labels, sites=["blocks[0].output", "blocks[2].output"], **options)
    assert plain.score[:, 0].min() > 0.7
    assert edited.score[0, 0] == plain.score[0, 0]
    # Zeros at all tokens tell nothing of them to the block behind.
    assert edited.score[1, 0] <= 0.5
    free = probe(reft, rows, labels, sites="blocks[2].output", select=[], **options)
    assert free.score[0, 0] == plain.score[1, 0]


def test_vectors_that_were_collected_give_the_same_map(llama: Any) -> None:
    rows = _rows()
    labels = [row[-1] for row in rows]
    held = rl.collect(llama, rows, "blocks[*].output @ last", "blocks[*].output @ first", progress=False)
    every = probe(held, labels=labels, **LIGHT)
    assert every.score.shape == (3, 2)
    direct = probe(llama, rows, labels, positions=["last", "first"], **LIGHT)
    assert np.allclose(every.score, direct.score)
    some = probe(held, labels=labels, sites=["model.layers[2].output"], positions={"end": "last"}, **LIGHT)
    assert some.columns == ("end",)
    assert some.score[0, 0] == every.score[2, 0]


def test_cells_without_vectors_stay_empty(llama: Any) -> None:
    rows = _rows(12)
    held = rl.collect(llama, rows, "blocks[0].output @ last", "blocks[1].output @ first", progress=False)
    result = probe(held, labels=[row[-1] for row in rows], folds=3, **LIGHT)
    assert np.isnan(result.score).tolist() == [[False, True], [True, False]]
    with pytest.raises(KeyError, match="has no vectors"):
        result["blocks[0].output @ first"]
    assert np.isnan(result.to_frame()["balanced_accuracy"]).sum() == 2


def test_a_condition_opens_an_edit_where_the_probe_says_so(llama: Any) -> None:
    rows = _rows()
    labels = ["even" if row[-1] == 5 else "odd" for row in rows]
    found = probe(llama, rows, labels, sites="blocks[0].output", **QUICK)
    condition = found["blocks[0].output @ last"].condition(0.5, label="odd")
    edit = rl.Edit("blank", at="blocks[2].output", positions="last", intervention=rl.Zero(), when=condition)
    reft = rl.InterventionGraph(edit).bind(llama)
    for row in rows[:6]:
        vector = reft.read("blocks[2].output @ last", input_ids=torch.tensor([row]))[
            "blocks[2].output @ last"
        ]
        assert bool((vector == 0).all()) == (row[-1] == 6)


def test_steering_towards_a_class_raises_what_the_probe_says_of_it(llama: Any) -> None:
    rows = _rows()
    found = probe(llama, rows, [row[-1] for row in rows], sites="blocks[1].output", **QUICK)
    fitted = found["blocks[1].output @ last"]
    assert fitted.direction.norm().item() == pytest.approx(1.0, abs=1e-5)
    vectors = _collected(llama, rows, 1, -1)
    for label, sign in ((None, 1), (6, 1), (5, -1)):
        steer = fitted.steer(2.0, label=label).build(width=vectors.shape[1])
        moved = steer(torch.tensor(vectors).float()).double().numpy()
        change = fitted.estimator.decision_function(moved) - fitted.estimator.decision_function(vectors)
        assert (sign * change > 0).all()
        assert np.linalg.norm(moved - vectors, axis=1) == pytest.approx(2.0, rel=1e-4)


def test_the_direction_is_the_gradient_in_the_sites_own_units() -> None:
    generator = np.random.default_rng(0)
    y = np.arange(90) % 2
    scale = np.array([100.0, 1.0, 0.01, 1.0])
    # Planted along one feature of large and one of small variance.
    found = random_activations(generator, 90, 4, 1, planted={0: along([0, 0, 0.05, 3], y)})
    values = found.values_by_name["blocks[0].output @ last"]
    values.vectors.mul_(torch.tensor(scale))
    fitted = probe(found, labels=y, **QUICK)["blocks[0].output @ last"]
    at = values.vectors[:1].double().numpy()
    steps = np.eye(4) * 1e-4
    gradient = [
        (fitted.estimator.decision_function(at + step) - fitted.estimator.decision_function(at - step))[0]
        for step in steps
    ]
    expected = np.array(gradient) / np.linalg.norm(gradient)
    assert np.allclose(fitted.direction.numpy(), expected, atol=1e-4)


def test_each_of_several_classes_and_labels_has_a_direction() -> None:
    generator = np.random.default_rng(1)
    y = np.arange(90) % 3
    found = random_activations(generator, 90, 5, 1, planted={0: np.eye(5)[y] * 4})
    labels = [("kind", int(number)) for number in y]
    options: dict[str, Any] = {"estimator": LogisticRegression(), **QUICK}
    fitted = probe(found, labels=labels, **options)["blocks[0].output @ last"]
    assert fitted.direction.shape == (3, 5)
    assert fitted.direction[:, :3].argmax(1).tolist() == [0, 1, 2]
    assert torch.equal(fitted.steer(1.0, label=("kind", 2)).vector, fitted.direction[2])
    several = probe(found, labels=np.eye(3, dtype=int)[y], **options)["blocks[0].output @ last"]
    assert several.direction.shape == (3, 5)
    assert several.direction[:, :3].argmax(1).tolist() == [0, 1, 2]
    chance = several.estimator.estimators_[1].predict_proba(
        found["blocks[0].output @ last"].double().numpy()
    )[:, 1]
    measured = several.condition(label=1).left.value({several.read: found["blocks[0].output @ last"]})
    assert np.allclose(measured.numpy(), chance, atol=1e-5)


def test_numbers_have_a_direction_and_no_condition() -> None:
    generator = np.random.default_rng(2)
    y = generator.normal(size=80)
    found = random_activations(generator, 80, 5, 1, planted={0: along([0, 0, 9, 0, 0], y)})
    fitted = probe(found, labels=y, **QUICK)["blocks[0].output @ last"]
    assert fitted.direction[2] > 0.9
    assert fitted.steer(3.0).amount == 3.0
    with pytest.raises(rl.DataError, match=r"rl\.projection"):
        fitted.condition()


def test_figures_and_tables_of_a_map(llama: Any) -> None:
    rows = _rows(12)
    options: dict[str, Any] = {"folds": 3, "permutations": 19, "bootstrap": 20, "progress": False}
    options["estimator"] = "mean_difference"
    line = probe(llama, rows, [row[-1] for row in rows], **options)
    grid = probe(llama, rows, [row[-1] for row in rows], positions=["last", "first"], **options)
    for result in (line, grid):
        for metric in (None, "accuracy", "auroc", "selectivity"):
            (axes, *_) = result.plot(metric).axes
            assert axes.get_ylabel()
            assert axes.get_xlabel()
        assert "<img" in result._repr_html_()
        frame = result.to_frame()
        assert len(frame) == result.score.size
        assert {"site", "block", "position", "balanced_accuracy_low", "p_value", "selectivity"} <= set(frame)
        assert repr(result).startswith("ProbeMap(3 sites × ")
    assert "balanced accuracy" in line.plot().axes[0].get_ylabel()
    assert len(line.plot().axes[0].lines) >= 2
    assert line["blocks[0].output @ last"]._repr_html_().startswith("<div>")
    with pytest.raises(rl.DataError, match="metric='auc': expected one of 'balanced_accuracy', 'accuracy'"):
        line.plot("auc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "svm"}, "estimator='svm': expected one of 'auto', 'logistic', 'ridge'"),
        ({"estimator": "ridge"}, "estimator='ridge': the labels are classes; take 'logistic'"),
        ({"estimator": 3}, "estimator=3: expected one of"),
        ({"kind": "regression", "estimator": "lda"}, "estimator='lda': the labels are numbers; take 'ridge'"),
        ({"folds": 1}, "folds=1: expected a whole number of 2 or more"),
        ({"folds": 13}, "folds=13: there are 12 groups, and a group is never split; give folds=12 or fewer"),
        ({"folds": 7}, "class 5 is in 6 groups and folds=7"),
        ({"groups": [1, 2]}, "groups has 2 entries and data 12 examples"),
        (
            {"groups": [0, 1] * 6},
            "folds=3: there are 2 groups, and a group is never split; give folds=2 or fewer",
        ),
        ({"groups": [0, 1] * 6, "folds": 2}, "class 5 is in 1 group and folds=2"),
        ({"control": "words"}, "control='words': expected 'auto', None, or a type for each example"),
        ({"control": [1]}, "control has 1 entries and data 12 examples"),
        ({"control": [1] * 12}, "control: 1 types are too few"),
        ({"level": 1}, "level=1: expected a number between 0 and 1"),
        ({"null": "none"}, "null='none': expected 'auto', 'linear' or 'refit'"),
        ({"bootstrap": -1}, "bootstrap=-1: expected a whole number of 0 or more"),
        ({"memory": "much"}, "memory='much': expected a number of bytes"),
        ({"seed": 0.5}, "seed=0.5: expected a whole number"),
        (
            {"sites": "blocks[0].output @ last"},
            "sites='blocks[0].output @ last': give the positions as positions=",
        ),
        ({"sites": []}, "sites=[]: expected a path such as 'blocks[*].output'"),
        ({"sites": ["blocks[0].output", "blocks[0:1].output"]}, "sites name 'model.layers.0.output' twice"),
        ({"positions": ["last", "last"]}, "positions name 'last' twice"),
        ({"positions": []}, "positions=[]: expected a position such as 'last'"),
        ({"data": None}, "data=None: give texts"),
        ({"labels": None}, "labels=None: expected one label for each example"),
        ({"labels": [1, 2]}, "labels has 2 entries and data 12 examples"),
        ({"labels": [0.5, 1.5, 2.5] * 4, "description": True}, "description=True: numbers have no code"),
        ({"memory": 1000, "estimator": "lda"}, "chunk by chunk only 'logistic' and 'ridge' can be fitted"),
        ({"memory": 1000, "description": True}, "description=True needs all of a cell's vectors at once"),
    ],
)
@pytest.mark.usefixtures("users_call")
def test_arguments_that_cannot_be_used_are_named(change: dict[str, Any], message: str, llama: Any) -> None:
    rows = _rows(12)
    given = {"data": rows, "labels": [row[-1] for row in rows], "sites": "blocks[0].output", "folds": 3}
    options = {"progress": False, "permutations": 0, "bootstrap": 0, **given, **change}
    data, labels = options.pop("data"), options.pop("labels")
    with pytest.raises(rl.DataError) as caught:
        probe(llama, data, labels, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ["text"]}, "data is given, and the vectors are there already"),
        ({"folder": "here"}, "folder= is for collecting vectors"),
        (
            {"sites": "blocks[7].output"},
            "sites='blocks[7].output' was not collected; there is 'blocks[0].output'",
        ),
        ({"positions": "first"}, "positions='first' was not collected; there is 'last'"),
    ],
)
@pytest.mark.usefixtures("users_call")
def test_what_does_not_go_with_vectors_is_named(change: dict[str, Any], message: str) -> None:
    found = random_activations(np.random.default_rng(0), 12, 3, 1)
    with pytest.raises(rl.DataError) as caught:
        probe(found, labels=[0, 1] * 6, **{**QUICK, **change})
    assert message in str(caught.value)


def test_questions_that_a_map_cannot_answer_are_named() -> None:
    found = random_activations(np.random.default_rng(0), 12, 3, 1)
    result = probe(found, labels=[0, 1] * 6, folds=2, **QUICK)
    with pytest.raises(rl.DataError, match="there are no p-values"):
        result.significant()
    with pytest.raises(KeyError, match=r"'blocks\[1\].output @ last' was not probed.* Did you mean"):
        result["blocks[1].output @ last"]
    fitted = result["blocks[0].output @ last"]
    with pytest.raises(rl.DataError, match=r"label=2: .* knows \[0, 1\]"):
        fitted.condition(label=2)
    with pytest.raises(rl.DataError, match=r"threshold=1\.5: expected a probability from 0 to 1"):
        fitted.condition(1.5)
    with pytest.raises(rl.DataError, match="there is no control here"):
        result.plot("selectivity")
    values = found.values_by_name["blocks[0].output @ last"]
    values.vectors[3, 1] = float("nan")
    with pytest.raises(rl.DataError, match="vectors hold NaN or infinity"):
        probe(found, labels=[0, 1] * 6, folds=2, **QUICK)


def test_the_same_seed_gives_the_same_map() -> None:
    found = random_activations(np.random.default_rng(0), 40, 4, 2)
    labels = np.random.default_rng(1).integers(0, 2, 40)
    one, two = (
        probe(
            found,
            labels=labels,
            estimator="mean_difference",
            permutations=30,
            bootstrap=30,
            progress=False,
            seed=4,
        )
        for _ in range(2)
    )
    assert one.to_frame().equals(two.to_frame())
