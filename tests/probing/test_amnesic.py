"""Amnesic probing: erasing what decides an answer changes it, and erasing anything else does no more than chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from torch import Tensor

import reftlab as rl
from reftlab.measuring import Estimate
from reftlab.probing.amnesic import _adjusted, amnesic
from reftlab.probing.amnesic_result import Erasure
from reftlab.probing.erasing import Vectors, erasers
from reftlab.probing.folds import fold_numbers, grouped_splits
from reftlab.probing.labels import parse_labels
from tests.models import hook_count
from tests.oracle import hooked, plain_read, raw_blocks
from tests.probing.planted_models import FRAME, NO, YES, PlantedTexts, WordReader, planted

ANSWER = rl.logit_diff(YES, NO)
QUICK: dict[str, Any] = {"estimator": "mean_difference", "draws": 19, "bootstrap": 50, "progress": False}
SITES = {"reader": "table.output", "llama": "blocks[1].output", "gpt2": "blocks[1].output"}


@pytest.fixture(scope="module")
def models() -> dict[str, PlantedTexts]:
    return {family: planted(family) for family in SITES}


def run(plan: PlantedTexts, labels: Any, site: str, **options: Any) -> Any:
    given = {**QUICK, "metric": ANSWER, "tokenizer": plan.tokenizer, **options}
    return amnesic(plan.model, plan.texts, labels, site, **given)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_erasing_the_concept_that_decides_destroys_the_answer_and_erasing_another_does_not(
    models: dict[str, PlantedTexts], family: str
) -> None:
    plan, site = models[family], SITES[family]
    used = run(plan, plan.used, site)
    for erasure in used.erasures:
        assert erasure.p_value == 0.05, "no draw of 19 shifts the answer as far"
    assert used.significant() == used.erasures
    truth = np.array(plan.used)
    kept = np.corrcoef(used.of(method="leace").values, truth)[0, 1]
    assert kept < 0.4 < 0.8 < np.corrcoef(used.before, truth)[0, 1]

    unused = run(plan, plan.unused, site, methods="leace")
    assert unused.significant() == ()
    assert used.of(method="leace").shift.value > 2 * unused.of().shift.value
    # It is as plain to see as the other, and seen less after its erasure.
    assert unused.of().probe_before.low > 0.6
    assert unused.of().probe_after.value < unused.of().probe_before.value - 0.1


@pytest.mark.usefixtures("users_call")
def test_random_labels_seldom_shift_the_answer_beyond_both_controls() -> None:
    plan, alarms = planted("reader"), 0
    options: dict[str, Any] = {**QUICK, "bootstrap": 0, "methods": "leace", "tokenizer": plan.tokenizer}
    texts, others = plan.texts[::2], plan.texts[1::4]
    # Without a metric, how far the whole distribution of the next token moves.
    for seed in range(20):
        labels = np.random.default_rng(seed).permutation(len(texts)) % 2
        found = amnesic(plan.model, texts, labels, "read.output", examples=others, seed=seed, **options)
        alarms += len(found.significant(0.05))
    assert alarms <= 3, "more than 3 of 20 has a probability of 1.6% at 0.05"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_runs_are_those_of_a_plain_hook_that_erases(
    models: dict[str, PlantedTexts], family: str, dtype: torch.dtype
) -> None:
    plan = models[family]
    model = planted(family).model.to(dtype) if dtype != torch.float32 else plan.model
    held = ["the cat", "John and Mary gave a book to the dog", "who"]
    found = amnesic(
        model, plan.texts, plan.used, "blocks[1].output", examples=held, metric=ANSWER,
        tokenizer=plan.tokenizer, methods="leace", **{**QUICK, "draws": 1},
    )  # fmt: skip
    block = raw_blocks(model)[1]
    encoded = [plan.tokenizer(text, return_tensors="pt") for text in plan.texts]
    vectors = torch.cat([plain_read(model, block, row)[:, -1] for row in encoded]).double()
    eraser = LeaceEraser.fit(vectors, torch.tensor(plan.used).double())

    def erase(hidden: Tensor) -> Tensor:
        hidden[:, -1] = eraser(hidden[:, -1].double()).to(dtype)
        return hidden

    expected = []
    with torch.no_grad(), hooked(block, erase):
        for text in held:
            last = model(**plan.tokenizer(text, return_tensors="pt")).logits[0, -1].float()
            expected.append(float(last[YES] - last[NO]))
    assert found.held_out is False
    np.testing.assert_allclose(
        found.of().values, expected, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=1e-3
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_example_is_measured_with_an_eraser_that_has_not_seen_it(
    models: dict[str, PlantedTexts], side: str
) -> None:
    plan = models["llama"]
    plan.tokenizer.padding_side = side
    groups = [word.lower() for word in plan.words]
    found = run(plan, plan.used, "blocks[0].output", methods="leace", groups=groups, seed=4, draws=1)
    block, labels = raw_blocks(plan.model)[0], np.array(plan.used)
    rows = [plan.tokenizer(text, return_tensors="pt") for text in plan.texts]
    vectors = torch.cat([plain_read(plan.model, block, row)[:, -1] for row in rows]).double()
    by_first = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    parts = fold_numbers(
        labels.astype(int), np.array([by_first[name] for name in groups]), "classification", 2, 4
    )
    assert all(len({parts[n] for n, name in enumerate(groups) if name == one}) == 1 for one in set(groups))
    fits = [LeaceEraser.fit(vectors[parts != f], torch.tensor(labels[parts != f]).double()) for f in (0, 1)]
    for number in (0, 17, 60, 99):
        erase = fits[parts[number]]

        def change(hidden: Tensor, erase: Any = erase) -> Tensor:
            hidden[:, -1] = erase(hidden[:, -1].double()).float()
            return hidden

        with torch.no_grad(), hooked(block, change):
            last = plan.model(**rows[number]).logits[0, -1]
        assert found.of().values[number] == pytest.approx(float(last[YES] - last[NO]), abs=1e-3)


def test_probe_scores_are_those_of_plain_scikit_learn_inside_each_held_out_part() -> None:
    from reftlab.probing.directions import MeanDifference

    plan = planted("reader")
    found = run(plan, plan.used, "table.output", methods="leace", draws=1).of()
    ids = [plan.tokenizer(text)["input_ids"][-1] for text in plan.texts]
    vectors, y = plan.model.table.weight[ids].detach(), np.array(plan.used).astype(int)
    own, labels = np.arange(len(y)), parse_labels(plan.used, "auto", len(y))
    parts = fold_numbers(y, own, "classification", 2, 0)
    before, after = np.zeros_like(y), np.zeros_like(y)
    for part in (0, 1):
        rows = np.flatnonzero(parts == part)
        others = torch.from_numpy(parts != part)
        eraser = LeaceEraser.fit(vectors[others].double(), torch.from_numpy(y)[others].double())
        folds = [(s.train, s.test) for s in grouped_splits(y[rows], own[rows], labels, 5, 0).folds]
        seen = vectors[rows]
        for into, values in ((before, seen), (after, eraser(seen.double()).float())):
            into[rows] = cross_val_predict(MeanDifference(), values.numpy(), y[rows], cv=folds)
    assert found.probe_before.value == pytest.approx(balanced_accuracy_score(y, before))
    assert found.probe_after.value == pytest.approx(balanced_accuracy_score(y, after))


def test_controls_have_the_eraser_s_rank_and_leave_the_same_mean_where_it_is() -> None:
    generator = np.random.default_rng(0)
    y = np.arange(150) % 4
    vectors = generator.standard_normal((150, 12)).astype(np.float32)
    vectors[:, :4] += 3 * np.eye(4)[y]
    data = Vectors(vectors, y, np.arange(150), "classification")
    for method in ("leace", "inlp"):
        found = erasers(method, data, 3, 0)  # type: ignore[arg-type]
        drawn = [found.real, *found.random, *found.shuffled]
        assert len(drawn) == (7 if method == "leace" else 4)
        for one in drawn:
            removed = vectors - one(vectors)
            assert np.linalg.matrix_rank(removed - removed.mean(0), tol=1e-3) == one.rank == found.real.rank
        for one in found.random:
            mean = found.real.mean.astype(np.float32)[None]
            np.testing.assert_allclose(one(mean), mean, atol=1e-5)
    assert erasers("leace", data, 1, 0).real.rank == 3


def test_the_concept_is_gone_from_held_out_vectors_where_the_data_are_many() -> None:
    generator = np.random.default_rng(1)
    y = np.arange(1200) % 2
    vectors = generator.standard_normal((1200, 8)).astype(np.float32)
    vectors[:, 2] += 4 * y
    data = Vectors(vectors[:600], y[:600], np.arange(600), "classification")
    for method in ("leace", "inlp"):
        left = erasers(method, data, 1, 0).real(vectors[600:])  # type: ignore[arg-type]
        gap = left[y[600:] == 1].mean(0) - left[y[600:] == 0].mean(0)
        assert np.abs(gap).max() < 0.35, "4 before, and 0.08 by chance"


def test_an_edit_s_effect_goes_where_its_concept_is_erased_and_stays_where_another_is() -> None:
    plan = planted("reader")
    model = WordReader()
    with torch.no_grad():
        model.table.weight.copy_(plan.model.table.weight)
        model.head.weight[YES], model.head.weight[NO] = 2 * FRAME[2], -2 * FRAME[2]
    copy = rl.Edit(
        "copy", at="table.output", positions="last",
        intervention=rl.Function(lambda h: h + 2 * (h @ FRAME[0])[:, None] * FRAME[2]),
    )  # fmt: skip
    example = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    reft = rl.InterventionGraph(copy).bind(model, plan.tokenizer, example=example)
    right = [YES if one else NO for one in plan.used]
    metric = rl.logit_diff(right, [YES + NO - one for one in right])
    for labels, keeps in ((plan.used, False), (plan.unused, True)):
        options = {**QUICK, "metric": metric, "methods": "leace", "draws": 3 if keeps else 19}
        found = amnesic(reft, plan.texts, labels, "table.output", **options)
        ids = [plan.tokenizer(text)["input_ids"][-1] for text in plan.texts]
        amount = 2 * model.table.weight[ids].detach() @ FRAME[0]
        sign = torch.tensor([1.0 if one else -1.0 for one in plan.used])
        assert found.effect is not None
        assert found.effect.value == pytest.approx(float((4 * amount * sign).mean()), rel=1e-3)
        erasure = found.of()
        assert erasure.effect is not None
        share = erasure.effect.value / found.effect.value
        assert (share > 0.9) if keeps else (abs(share) < 0.3), share
        assert (erasure.p_effect > 0.05) is keeps
    assert [edit.key for edit in reft.edits] == ["copy"]
    assert list(reft.interventions) == ["copy"]
    assert hook_count(model) == 0


def test_answers_are_measured_where_there_are_some_and_the_next_token_s_divergence_elsewhere(
    models: dict[str, PlantedTexts],
) -> None:
    plan = models["gpt2"]
    pairs = [(text, "Paris") if n % 3 else text for n, text in enumerate(plan.texts)]
    found = amnesic(
        plan.model, pairs, plan.used, "blocks[1].output", methods="leace", tokenizer=plan.tokenizer,
        **{**QUICK, "draws": 1},
    )  # fmt: skip
    assert found.name == "answer loss"
    assert found.examples.tolist() == [n for n in range(len(pairs)) if n % 3]
    assert f"{len(found.examples)} with an answer" in found.note
    number = int(found.examples[5])
    prompt = plan.tokenizer(plan.texts[number])["input_ids"]
    answer = [*plan.tokenizer("Paris")["input_ids"], plan.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = plan.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    assert found.before[5] == pytest.approx(float(loss), abs=1e-4)

    moved = run(plan, plan.used, "blocks[1].output", metric=None, methods="leace", draws=1)
    assert moved.name == "divergence of the next token from that without erasure"
    np.testing.assert_allclose(moved.before, 0, atol=1e-5)
    assert (moved.of().values > -1e-5).all()
    assert moved.of().shift.value > 0.1


def test_sites_are_erased_one_at_a_time_and_shown_together(models: dict[str, PlantedTexts]) -> None:
    plan = models["llama"]
    found = run(plan, plan.used, "blocks[*].output", methods="leace", draws=1)
    assert [erasure.block for erasure in found.erasures] == [0, 1, 2]
    alone = run(plan, plan.used, "blocks[2].output", methods="leace", draws=1)
    np.testing.assert_allclose(found.erasures[2].values, alone.of().values, atol=1e-4)
    np.testing.assert_allclose(found.erasures[2].random_shifts, alone.of().random_shifts, atol=1e-4)
    frame = found.to_frame()
    assert frame["site"].tolist() == [f"blocks[{n}].output" for n in range(3)]
    assert "effect_after" not in frame
    figure = found.plot()
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["0", "1", "2"]
    assert "balanced accuracy" in figure.axes[1].get_ylabel()
    assert "<img" in found._repr_html_()
    assert "leace at blocks[0].output" in repr(found)
    with pytest.raises(rl.DataError, match=r"draws=1 no p-value is below 0.5; give draws=19 or more"):
        found.significant()
    with pytest.raises(rl.DataError, match=r"names 3 erasures"):
        found.of(method="leace")


def test_the_tokens_of_one_position_are_erased_together_by_one_eraser(
    models: dict[str, PlantedTexts],
) -> None:
    plan, held = models["llama"], ["the cat", "John and Mary gave a book to the dog", "who is"]
    found = run(
        plan, plan.used, "blocks[1].output", examples=held, methods="leace", draws=1, positions="last(2)"
    )
    block = raw_blocks(plan.model)[1]
    encoded = [plan.tokenizer(text, return_tensors="pt") for text in plan.texts]
    vectors = torch.cat([plain_read(plan.model, block, row)[0, -2:] for row in encoded]).double()
    labels = torch.tensor(plan.used).repeat_interleave(2).double()
    eraser = LeaceEraser.fit(vectors, labels)

    def erase(hidden: Tensor) -> Tensor:
        hidden[:, -2:] = eraser(hidden[0, -2:].double()).float()
        return hidden

    with torch.no_grad(), hooked(block, erase):
        logits = [plan.model(**plan.tokenizer(text, return_tensors="pt")).logits[0, -1] for text in held]
    expected = [float(one[YES] - one[NO]) for one in logits]
    assert found.of().position == "last(2)"
    np.testing.assert_allclose(found.of().values, expected, atol=1e-3)
    last = run(plan, plan.used, "blocks[1].output", examples=held, methods="leace", draws=1)
    assert np.abs(found.of().values - last.of().values).max() > 1e-2


def test_several_positions_are_erased_one_at_a_time(models: dict[str, PlantedTexts]) -> None:
    plan, site = models["llama"], "blocks[1].output"
    options: dict[str, Any] = {"methods": "leace", "draws": 1, "bootstrap": 0}
    found = run(plan, plan.used, site, positions=["first", "first+last"], **options)
    assert found.to_frame()["position"].tolist() == ["first", "first+last"]
    alone = run(plan, plan.used, site, positions="first+last", **options).of()
    same = found.of(position="first+last")
    np.testing.assert_allclose(same.values, alone.values, atol=1e-4)
    np.testing.assert_allclose(same.shuffled_shifts, alone.shuffled_shifts, atol=1e-4)
    assert same.p_value == alone.p_value
    assert np.abs(same.values - found.of(position="first").values).max() > 1e-2
    assert "leace at blocks[1].output @ first+last" in repr(found.erasures[1])
    axis = found.plot().axes[1]
    assert axis.get_xlabel() == "block and position"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1 @ first", "1 @ first+last"]
    with pytest.raises(rl.DataError, match=r"names 2 erasures; .*leace at blocks\[1\].output @ first"):
        found.of(site)


def _erasure(shift: float, random: np.ndarray, shuffled: np.ndarray) -> Any:
    """An erasure of which only the shifts matter."""
    one = Estimate(shift, shift, shift, 0.95)
    return Erasure(
        "site", None, "last", "leace", (1,), np.zeros(2), one, one, random, shuffled, one, one, None,
        np.zeros(0), 1.0, 1.0, float("nan"), float("nan"),
    )  # fmt: skip


def _stepped_down(shifts: np.ndarray) -> np.ndarray:
    """Westfall and Young's step-down maxima, `(erasure, 1 + draw)`, written out."""
    heights = (shifts - shifts.mean(1, keepdims=True)) / shifts.std(1, keepdims=True)
    order = np.argsort(-heights[:, 0])
    p, last = np.zeros(len(shifts)), 0.0
    for place, number in enumerate(order):
        most = heights[order[place:]].max(0)
        last = max(last, float((most >= heights[number, 0]).mean()))
        p[number] = last
    return p


def test_p_values_are_adjusted_for_all_erasures_by_step_down_maxima() -> None:
    generator = np.random.default_rng(0)
    random, shuffled = generator.random((5, 40)), generator.random((5, 40))
    shifts = np.array([3.0, 0.97, 0.5, 0.1, 0.99])
    made = [_erasure(shift, *drawn) for shift, *drawn in zip(shifts.tolist(), random, shuffled, strict=True)]
    found = [one.p_adjusted for one in _adjusted(made)]
    both = [_stepped_down(np.concatenate([shifts[:, None], drawn], 1)) for drawn in (random, shuffled)]
    assert found == pytest.approx(np.maximum(*both).tolist())
    assert found[0] == pytest.approx(1 / 41)
    without = [
        _erasure(shift, drawn, np.zeros(0)) for shift, drawn in zip(shifts.tolist(), random, strict=True)
    ]
    assert [one.p_adjusted for one in _adjusted(without)] == pytest.approx(both[0].tolist())
    nothing = [_erasure(0.0, np.zeros(19), np.zeros(19)) for _ in range(3)]
    assert [one.p_adjusted for one in _adjusted(nothing)] == [1.0] * 3


def test_of_many_erasures_without_effect_any_is_seldom_significant_together() -> None:
    together = alone = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        # Shifts of neighbouring blocks go together.
        drawn = np.abs(generator.normal(size=(8, 40)) + generator.normal(size=40))
        found = _adjusted([_erasure(float(one[0]), one[1:], one[1:]) for one in drawn])
        together += any(one.p_adjusted <= 0.05 for one in found)
        alone += any(1 + (one[1:] >= one[0]).sum() <= 0.05 * 40 for one in drawn)
    assert together <= 18, "more than 18 of 200 has a probability of 1% at 0.05"
    assert alone > 30


def test_numbers_and_several_labels_are_erased_by_leace() -> None:
    plan = planted("reader")
    amounts = torch.tensor([2.0 if one else 0.5 for one in plan.used]) + torch.linspace(
        0, 0.1, len(plan.used)
    )
    found = run(plan, amounts.tolist(), "table.output", methods="leace", estimator="ridge")
    assert found.score == "r2"
    assert found.of().rank == 1
    assert found.of().p_value == 0.05
    both = run(
        plan, np.array([plan.used, plan.unused]).T.astype(int), "table.output", methods="leace", draws=1
    )
    assert both.of().rank == 2
    assert both.of().shift.value > both.of().random_shifts[0]
    with pytest.raises(rl.DataError, match=r"INLP removes classes, and labels are regression"):
        run(plan, amounts.tolist(), "table.output")


@pytest.mark.usefixtures("users_call")
@pytest.mark.usefixtures("users_call")
def test_wrong_arguments_are_refused_by_name() -> None:
    plan = planted("reader")

    def refused(match: str, labels: Any = plan.used, **options: Any) -> None:
        with pytest.raises(rl.DataError, match=match):
            run(plan, labels, "table.output", **options)

    refused(r"methods='lace': expected 'leace', 'inlp' or both", methods="lace")
    refused(r"methods=\(\)", methods=())
    refused(r"methods=None", methods=None)
    refused(r"methods=\[\['leace'\]\]", methods=[["leace"]])
    refused(r"draws=0: expected a whole number of 1 or more", draws=0)
    refused(r"folds=1: expected a whole number of 2 or more", folds=1)
    refused(r"level=95: expected a number between 0 and 1", level=95)
    refused(r"groups has 2 entries", groups=["a", "b"])
    refused(r"labels", labels=plan.used[:-1])
    rare = [0] * (len(plan.texts) - 3) + [1] * 3
    refused(r"class 1 is in 1 group of one of 2 parts", labels=rare)
    with pytest.raises(rl.AddressError):
        run(plan, plan.used, "tabel.output")
    found = run(plan, plan.used, "table.output")
    for level in ("0.05", True, float("nan"), 0, 1):
        with pytest.raises(rl.DataError, match=r"level=.*: expected a number between 0 and 1"):
            found.significant(level)
    with pytest.raises(rl.DataError, match=r"no p-value is below 0\.05; give draws=99 or more"):
        found.significant(0.01)


@pytest.mark.usefixtures("users_call")
def test_where_nothing_can_be_erased_the_result_says_so_and_the_other_positions_are_there() -> None:
    plan = planted("llama")
    word = plan.texts[0].split()[0]
    texts = [f"{word} {text}" for text in plan.texts]
    given = {**QUICK, "metric": ANSWER, "tokenizer": plan.tokenizer, "methods": "leace", "draws": 5}
    found = amnesic(plan.model, texts, plan.used, SITES["llama"], ["first", "last"], **given)
    first, last = found.erasures
    assert (first.position, first.rank, first.change.value) == ("first", 0, 0)
    assert last.rank > 0
    assert "Nothing was found to remove" in repr(found) + found._repr_html_()
