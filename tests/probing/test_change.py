"""Probes before and after: what an edit erases is lost from there on, what it writes is gained, and no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from torch import Tensor

import reftlab as rl
from reftlab.probing.change import probe_change
from reftlab.probing.directions import MeanDifference
from reftlab.probing.folds import grouped_splits
from reftlab.probing.labels import parse_labels
from reftlab.probing.significance import adjusted_p_values
from reftlab.probing.swaps import Swaps, swap_statistics
from tests.models import WIDTH, hook_count
from tests.oracle import hooked, plain_read, raw_blocks
from tests.probing.planted_models import PlantedTexts, planted

QUICK: dict[str, Any] = {
    "estimator": "mean_difference", "permutations": 39, "bootstrap": 50, "progress": False,
}  # fmt: skip
FAMILIES = ["llama", "gpt2"]


@pytest.fixture(scope="module")
def models() -> dict[str, PlantedTexts]:
    return {family: planted(family) for family in FAMILIES}


def bound(plan: PlantedTexts, intervention: rl.Intervention, **options: Any) -> Any:
    edit = rl.Edit("edit", at="blocks[1].output", positions="last", intervention=intervention, **options)
    return rl.InterventionGraph(edit).bind(plan.model, plan.tokenizer)


def vectors_of(plan: PlantedTexts, block: int) -> Tensor:
    rows = [plan.tokenizer(text, return_tensors="pt") for text in plan.texts]
    return torch.cat([plain_read(plan.model, raw_blocks(plan.model)[block], row)[:, -1] for row in rows])


@pytest.mark.parametrize(("family", "side"), [("llama", "left"), ("gpt2", "right")])
def test_an_erased_concept_is_lost_from_its_block_on_and_another_is_kept(
    models: dict[str, PlantedTexts], family: str, side: str
) -> None:
    plan = models[family]
    plan.tokenizer.padding_side = side
    reft = bound(plan, rl.Erase.fit(vectors_of(plan, 1), torch.tensor(plan.used).long()))
    labels = {"erased": plan.used, "kept": plan.unused}
    found = probe_change(reft, plan.texts, labels, "blocks[*].output", **{**QUICK, "estimator": "lda"})
    assert {(one.concept, one.site) for one in found.lost()} == {
        ("erased", "blocks[1].output"),
        ("erased", "blocks[2].output"),
    }
    assert found.gained() == ()
    assert (found.difference[:, 0] == 0).all(), "before the edit both runs are the same"
    assert (found.p_values[:, 0] == 1).all()
    assert found.base[0, :, 0].min() > 0.75
    # Fitted on these very texts, the eraser leaves the opposite of each fold in the others.
    assert found.edited[0, 1:, 0].max() < 0.55
    assert found.transfer[0, 1:, 0].max() < 0.65
    assert np.abs(found.difference[1]).max() < 0.1
    assert hook_count(plan.model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_edit_writes_by_label_is_gained_and_old_probes_cannot_read_it(
    models: dict[str, PlantedTexts], family: str
) -> None:
    plan = models[family]
    labels = np.random.default_rng(0).permutation(len(plan.texts)) % 2
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    scale = vectors_of(plan, 1).norm(dim=1).mean() / direction.norm()
    reft = bound(plan, rl.Add(scale * direction), tasks=("on",))
    tasks = ["on" if label else None for label in labels]
    found = probe_change(reft, plan.texts, {"written": labels, "own": plan.used}, tasks=tasks, **QUICK)
    assert [site.name for site in found.sites] == ["blocks[1].output", "blocks[2].output"]
    gained = [one for one in found.gained() if one.concept == "written"]
    assert [one.site for one in sorted(gained)] == ["blocks[1].output", "blocks[2].output"]
    assert all(one.base < 0.65 < 0.95 < one.edited and one.low > 0 for one in gained)
    assert found.transfer[0].max() < 0.9


def test_scores_are_those_of_plain_scikit_learn_on_plain_hooks(models: dict[str, PlantedTexts]) -> None:
    plan, shift = models["llama"], torch.linspace(-1, 1, WIDTH)
    reft = bound(plan, rl.Function(lambda h: h + 3 * torch.tanh(h * shift)))
    groups = [word.lower() for word in plan.words]
    found = probe_change(
        reft, plan.texts, plan.used, "blocks[2].output", groups=groups, seed=3, folds=4, **QUICK
    )

    def change(hidden: Tensor) -> Tensor:
        hidden[:, -1] += 3 * torch.tanh(hidden[:, -1] * shift)
        return hidden

    base = vectors_of(plan, 2).numpy()
    with hooked(raw_blocks(plan.model)[1], change):
        edited = vectors_of(plan, 2).numpy()
    y, names = np.array(plan.used).astype(int), {name: n for n, name in enumerate(dict.fromkeys(groups))}
    own, labels = np.array([names[name] for name in groups]), parse_labels(plan.used, "auto", len(groups))
    folds = [(split.train, split.test) for split in grouped_splits(y, own, labels, 4, 3).folds]
    for values, run in ((found.base, base), (found.edited, edited)):
        expected = balanced_accuracy_score(y, cross_val_predict(MeanDifference(), run, y, cv=folds))
        assert values[0, 0, 0] == pytest.approx(expected)
    transfer = np.zeros_like(y)
    for train, test in folds:
        transfer[test] = MeanDifference().fit(base[train], y[train]).predict(edited[test])
    assert found.transfer[0, 0, 0] == pytest.approx(balanced_accuracy_score(y, transfer))
    assert found.groups == len(names)


@pytest.mark.usefixtures("users_call")
def test_an_edit_that_shifts_all_rows_alike_seldom_changes_anything() -> None:
    plan, alarms = planted("llama"), 0
    texts = plan.texts[::2]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        reft = bound(plan, rl.Add(torch.randn(WIDTH, generator=generator)))
        labels = np.random.default_rng(seed).permutation(len(texts)) % 2
        found = probe_change(
            reft, texts, {"random": labels, "planted": plan.unused[::2]}, ["blocks[1].output", "final_norm.output"], seed=seed,
            **{**QUICK, "bootstrap": 0, "permutations": 19},
        )  # fmt: skip
        assert found.p_values[:, 0].min() > 0.5, "at its own site a shift is no difference"
        alarms += bool(found.gained() or found.lost())
    assert alarms <= 3, "more than 3 of 20 has a probability of 1.6% at 0.05"


def test_an_edit_that_does_nothing_changes_nothing(models: dict[str, PlantedTexts]) -> None:
    plan = models["gpt2"]
    found = probe_change(bound(plan, rl.Scale(1.0)), plan.texts, plan.used, **QUICK)
    assert (found.difference == 0).all()
    assert (found.transfer == found.base).all()
    assert (found.p_values == 1).all()
    assert found.gained(0.5) == found.lost(0.5) == ()


@pytest.mark.usefixtures("users_call")
def test_p_values_hold_their_level_where_both_runs_are_alike_and_see_what_is_planted() -> None:
    alarms = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        y = generator.permutation(40) % 2
        common = generator.standard_normal((40, 6)) + 1.5 * y[:, None] * np.eye(6)[0]
        base, edited = (common + generator.standard_normal((40, 6)) for _ in range(2))
        columns = (y - y.mean())[:, None]
        found = swap_statistics(base, edited, columns, Swaps(np.arange(40), 19, seed))
        alarms += adjusted_p_values([found])[0] <= 0.05
    assert alarms <= 8, "more than 8 of 60 has a probability of 0.4% at 0.05"
    y = np.arange(120) % 2
    base, edited = np.random.default_rng(0).standard_normal((2, 120, 6))
    edited[:, 1] += 2 * y
    gained = swap_statistics(base, edited, (y - y.mean())[:, None], Swaps(np.arange(120), 199, 0))
    assert gained[0, 0] > 0.1
    assert adjusted_p_values([gained])[0] == pytest.approx(1 / 200)


def test_swapped_statistics_are_ridge_regressions_of_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    generator = np.random.default_rng(2)
    y = generator.standard_normal(30)
    base, edited = generator.standard_normal((2, 30, 12)) + y[:, None] * np.eye(12)[3]
    groups = np.arange(30) // 2
    swaps = Swaps(groups, 2, 5)
    found = swap_statistics(base, edited, (y - y.mean())[:, None], swaps)
    both = np.concatenate([base, edited])
    for number in (0, 1, 2):
        swapped = swaps.rows(number)
        assert (swapped[::2] == swapped[1::2]).all(), "groups swap whole"
        scores = []
        for one, other in ((base, edited), (edited, base)):
            run = (np.where(swapped[:, None], other, one) - both.mean(0)) / both.std(0)
            predicted = np.zeros(30)
            for fold in range(5):
                test, train = swaps.folds == fold, swaps.folds != fold
                spread = run[train] - run[train].mean(0)
                alpha = 0.1 * (spread**2).sum() / train.sum()
                predicted[test] = Ridge(alpha=alpha).fit(run[train], y[train]).predict(run[test])
            scores.append(np.corrcoef(y, predicted)[0, 1])
        assert found[0, number] == pytest.approx(scores[1] - scores[0], abs=2e-5)
    assert (found[1] == -found[0]).all()


def test_results_are_shown_as_lines_and_maps_and_tables(models: dict[str, PlantedTexts]) -> None:
    plan = models["llama"]
    reft = bound(plan, rl.Zero())
    texts, used = plan.texts[::3], plan.used[::3]
    amounts = torch.linspace(0, 1, len(texts)).tolist()
    options = {**QUICK, "estimator": "auto", "permutations": 19, "bootstrap": 20}
    found = probe_change(reft, texts, {"amount": amounts, "used": used}, "blocks[1:].output", **options)
    assert found.metrics == ("r2", "balanced_accuracy")
    assert found.chance.tolist() == [0.0, 0.5]
    frame = found.to_frame()
    assert len(frame) == 4
    assert frame["edited"].tolist()[2] == pytest.approx(0.5), "zeros tell nothing"
    assert {"transfer_low", "difference_high", "p_value"} <= set(frame)
    first, second = found.plot().axes
    assert (first.get_ylabel(), second.get_ylabel()) == ("R²", "balanced accuracy")
    assert [text.get_text() for text in first.get_xticklabels()] == ["1", "2"]
    assert "<img" in found._repr_html_()
    assert "lost at 0.05" in repr(found)
    inside = rl.Edit("inside", at="blocks[1].mlp.output", positions="last", intervention=rl.Zero())
    both = reft + rl.InterventionGraph(inside).bind(plan.model, plan.tokenizer)
    names = [site.name for site in probe_change(both, plan.texts, plan.used, **QUICK).sites]
    assert names == ["blocks[1].mlp.output", "blocks[1].output", "blocks[2].output"]
    wide = probe_change(reft, plan.texts, plan.used, positions=["first", "last"], **QUICK)
    assert wide.base.shape == (1, 2, 2)
    assert (wide.difference[:, :, 0] == 0).all(), "the edit acts on the last token"
    assert [text.get_text() for text in wide.plot().axes[0].get_xticklabels()] == ["first", "last"]


@pytest.mark.usefixtures("users_call")
def test_wrong_arguments_are_refused_by_name(models: dict[str, PlantedTexts]) -> None:
    plan = models["llama"]
    reft = bound(plan, rl.Zero())

    def refused(match: str, model: Any = reft, labels: Any = plan.used, **options: Any) -> None:
        with pytest.raises(rl.DataError, match=match):
            probe_change(model, plan.texts, labels, **{**QUICK, **options})

    refused("reft has no edits", model=plan.model)
    refused(r"labels=\{\}", labels={})
    refused(r"concept 'a': labels", labels={"a": plan.used[:-1]})
    refused(r"level=95", level=95)
    refused(r"folds=1: expected a whole number of 2 or more", folds=1)
    refused(r"permutations=-1", permutations=-1)
    found = probe_change(reft, plan.texts, plan.used, "blocks[1].output", **{**QUICK, "permutations": 9})
    with pytest.raises(rl.DataError, match=r"level=0.05: with 9 swaps p-values go down to 0.1"):
        found.lost()
