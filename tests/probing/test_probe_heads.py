"""Probes of attention heads, and of reads in the place of paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser
from torch import Tensor, nn

import reftlab as rl
from reftlab.collecting import SiteVectors
from reftlab.probing import probe
from tests.models import HEADS, LAYERS, VOCABULARY, build
from tests.oracle import plain_read, raw_blocks
from tests.probing.planted_models import NO, YES, planted
from tests.probing.planted_vectors import QUICK, along

LIGHT: dict[str, Any] = {**QUICK, "estimator": "mean_difference"}


def _rows(count: int = 24, seed: int = 3) -> list[list[int]]:
    """Prompts of other lengths, which end in one of two tokens."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(10, VOCABULARY, generator.integers(2, 8)).tolist() for _ in range(count)]
    return [[*row, 5 + number % 2] for number, row in enumerate(rows)]


ROWS = _rows()
LABELS = [row[-1] for row in ROWS]


def _projection(model: nn.Module, block: int) -> nn.Module:
    """The module that takes the heads' results in."""
    own = raw_blocks(model)[block]
    kind = model.config.model_type
    if kind == "gpt2":
        return own.attn.c_proj
    return own.attention.output.dense if kind == "bert" else own.self_attn.o_proj


def _last_inputs(model: nn.Module, module: nn.Module, rows: Any = None) -> np.ndarray:
    """What a module is given at the last token of each prompt, one prompt at a time, `(row, width)`."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1].detach()))
    try:
        for row in rows or ROWS:
            with torch.no_grad():
                model(input_ids=torch.tensor([row]))
    finally:
        handle.remove()
    return torch.stack(kept).double().numpy()


def _means(vectors: np.ndarray) -> np.ndarray:
    """A nearest mean is what it was fitted on."""
    return np.stack([vectors[np.array(LABELS) == label].mean(0) for label in (5, 6)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_each_head_is_a_site_with_its_own_part_of_what_the_output_projection_is_given(family: str) -> None:
    model = build(family)
    result = probe(model, ROWS, LABELS, sites="blocks[*].attn.heads", batch_size=5, **LIGHT)
    assert [(site.block, site.head) for site in result.sites] == [
        (block, head) for block in range(LAYERS) for head in range(HEADS)
    ]
    for block in range(LAYERS):
        whole = _last_inputs(model, _projection(model, block))
        size = whole.shape[1] // HEADS
        for head in range(HEADS):
            name = f"blocks[{block}].attn.heads (heads {head}) @ last"
            own = result[name]
            expected = _means(whole[:, head * size : (head + 1) * size])
            assert np.allclose(own.estimator.means_, expected, atol=1e-4)
            read = rl.Read(f"blocks[{block}].attn.heads @ last", heads=head)
            assert own.read == read
            assert result[read] is own


def test_a_map_of_heads_has_a_row_for_each_block_and_a_column_for_each_head(llama: Any) -> None:
    result = probe(llama, ROWS, LABELS, sites="blocks[1:3].attn.heads", **LIGHT)
    table = result.by_head()
    assert (list(table.index), list(table.columns)) == ([1, 2], list(range(HEADS)))
    assert np.array_equal(table.to_numpy(), result.score.reshape(2, HEADS))
    assert np.array_equal(result.by_head("auroc"), result.metrics["auroc"].reshape(2, HEADS))
    frame = result.to_frame()
    assert frame["head"].tolist() == list(range(HEADS)) * 2
    axes = result.plot().axes[0]
    assert np.array_equal(axes.images[0].get_array(), table.to_numpy())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "block")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "2"]


def test_heads_at_several_positions_are_rows_of_their_own(llama: Any) -> None:
    sites, positions = ["blocks[0].attn.heads", "blocks[2].attn.heads"], ["last", "first"]
    result = probe(llama, ROWS, LABELS, sites=sites, positions=positions, **LIGHT)
    assert np.array_equal(result.by_head(position="first"), result.score[:, 1].reshape(2, HEADS))
    rows = result.plot().axes[0].get_yticklabels()
    assert [text.get_text() for text in rows][:5] == ["0.0", "0.1", "0.2", "0.3", "2.0"]
    with pytest.raises(rl.DataError, match=r"position=None: there are \['last', 'first'\]; say which"):
        result.by_head()
    with pytest.raises(rl.DataError, match="position='all': there are"):
        result.by_head(position="all")
    with pytest.raises(rl.DataError, match="not every site is a head of a block"):
        probe(llama, ROWS, LABELS, sites="blocks[0].output", **LIGHT).by_head()


def test_the_head_that_alone_holds_a_concept_stands_out() -> None:
    generator, held = np.random.default_rng(0), {}
    labels = np.arange(80) % 2
    index = torch.tensor(np.stack([np.arange(80), np.zeros(80, int), np.arange(80)], 1))
    for block in range(3):
        for head in range(4):
            vectors = generator.normal(size=(80, 6))
            if (block, head) == (1, 2):
                vectors += along(np.eye(6)[0], 4 * labels)
            name = rl.Read(f"blocks[{block}].attn.heads @ last", heads=head).label
            held[name] = SiteVectors(torch.tensor(vectors), index)
    result = probe(rl.Activations(held, 80), labels=labels, **{**LIGHT, "permutations": 99})
    table = result.by_head()
    assert table.stack().idxmax() == (1, 2)
    assert table.loc[1, 2] > 0.95
    assert np.flatnonzero(result.significant()).tolist() == [6]
    found = result["blocks[1].attn.heads (heads 2) @ last"]
    assert found.read == rl.Read("blocks[1].attn.heads @ last", heads=2)


def test_reads_and_paths_stand_side_by_side_each_at_its_own_positions(llama: Any) -> None:
    sites = [
        "blocks[0].output",
        rl.Read("blocks[1].output @ first"),
        rl.Read("blocks[2].attn.heads", heads=[0, 3], name="pair"),
        rl.Read("blocks[2].attn.heads"),
        rl.Read("blocks[0].output", features=slice(4, 9)),
    ]
    result = probe(llama, ROWS, LABELS, sites=sites, positions=["last", 0], **LIGHT)
    assert result.columns == ("last", "[0]", "first")
    assert [site.name for site in result.sites] == [
        "blocks[0].output",
        "blocks[1].output",
        "pair",
        "blocks[2].attn.heads",
        "blocks[0].output (features 4:9)",
    ]
    empty = np.isnan(result.score).tolist()
    assert empty == [[False, False, True], [True, True, False], *[[False, False, True]] * 3]
    whole = _last_inputs(llama, _projection(llama, 2))
    size = whole.shape[1] // HEADS
    pair = np.concatenate([whole[:, :size], whole[:, 3 * size :]], 1)
    assert np.allclose(result["pair @ last"].estimator.means_, _means(pair), atol=1e-4)
    assert np.allclose(result["blocks[2].attn.heads @ last"].estimator.means_, _means(whole), atol=1e-4)
    alone = [plain_read(llama, raw_blocks(llama)[0], {"input_ids": torch.tensor([row])})[0] for row in ROWS]
    few = torch.stack([one[-1, 4:9] for one in alone]).double().numpy()
    assert np.allclose(
        result["blocks[0].output (features 4:9) @ last"].estimator.means_, _means(few), atol=1e-4
    )


def test_reads_with_positions_of_their_own_make_the_columns(llama: Any) -> None:
    sites = [rl.Read("blocks[*].output @ first"), rl.Read("blocks[1].output @ last")]
    result = probe(llama, ROWS, LABELS, sites=sites, **LIGHT)
    assert result.columns == ("first", "last")
    assert np.isfinite(result.score).tolist() == [[True, False], [True, True], [True, False]]
    plain = probe(llama, ROWS, LABELS, sites="blocks[1].output", positions=["first", "last"], **LIGHT)
    assert np.array_equal(result.score[1], plain.score[0])


def test_collected_heads_give_the_same_map_and_are_chosen_by_path_or_read(llama: Any) -> None:
    reads = [
        rl.Read(f"blocks[{block}].attn.heads @ last", heads=head)
        for block in range(LAYERS)
        for head in range(HEADS)
    ]
    held = rl.collect(llama, ROWS, reads, "blocks[0].output @ last", progress=False)
    assert list(held)[5] == "blocks[1].attn.heads (heads 1) @ last"
    direct = probe(llama, ROWS, LABELS, sites="blocks[*].attn.heads", **LIGHT)
    some = probe(held, labels=LABELS, sites="blocks[*].attn.heads", **LIGHT)
    assert np.allclose(some.by_head(), direct.by_head())
    one = probe(held, labels=LABELS, sites=rl.Read("blocks[1].attn.heads", heads=1), **LIGHT)
    assert one.score.tolist() == [[direct.by_head().loc[1, 1]]]
    same = probe(held, labels=LABELS, sites=[reads[5], "blocks[0].output"], **LIGHT)
    assert [site.name for site in same.sites] == ["blocks[1].attn.heads (heads 1)", "blocks[0].output"]
    message = r"sites='blocks\[1\].attn.heads \(heads 7\)' was not collected"
    with pytest.raises(rl.DataError, match=message):
        probe(held, labels=LABELS, sites=rl.Read("blocks[1].attn.heads", heads=7), **LIGHT)


def test_a_head_s_condition_looks_at_that_head(llama: Any) -> None:
    found = probe(llama, ROWS, LABELS, sites="blocks[0].attn.heads", **QUICK)
    fitted = found["blocks[0].attn.heads (heads 2) @ last"]
    edit = rl.Edit(
        "blank", at="blocks[2].output", positions="last", intervention=rl.Zero(), when=fitted.condition(0.5)
    )
    reft = rl.InterventionGraph(edit).bind(llama)
    whole = _last_inputs(llama, _projection(llama, 0))
    size = whole.shape[1] // HEADS
    expected = fitted.estimator.predict_proba(whole[:, 2 * size : 3 * size])[:, 1] > 0.5
    assert 0 < expected.sum() < len(ROWS)
    for row, fires in zip(ROWS, expected.tolist(), strict=True):
        last = reft.read("blocks[2].output @ last", input_ids=torch.tensor([row]))["blocks[2].output @ last"]
        assert bool((last == 0).all()) == fires


def test_probes_before_and_after_an_edit_take_heads_and_reads_too() -> None:
    model = build("llama")
    edit = rl.Edit("off", at="blocks[0].attn.heads", positions="all", heads=[1], intervention=rl.Zero())
    reft = rl.InterventionGraph(edit).bind(model)
    options: dict[str, Any] = {"permutations": 0, "bootstrap": 0, "progress": False}
    found = rl.probe_change(
        reft, ROWS, LABELS, ["blocks[0].attn.heads", rl.Read("blocks[1].output @ first")],
        estimator="mean_difference", **options,
    )  # fmt: skip
    assert found.columns == ("last", "first")
    # Zeros tell nothing, and the other heads of the block are what they were.
    assert found.edited[0, 1, 0] <= 0.5
    assert np.allclose(found.difference[0, [0, 2, 3], 0], 0)
    whole = rl.probe_change(reft, ROWS, LABELS, estimator="mean_difference", **options)
    assert whole.sites[0].name == "blocks[0].attn.heads", "an edit's own site stays one site"


def test_a_concept_is_erased_from_one_head_and_no_other() -> None:
    plan = planted("llama")
    held = ["the cat", "John and Mary gave a book to the dog", "who"]
    found = rl.amnesic(
        plan.model, plan.texts, plan.used, rl.Read("blocks[0].attn.heads", heads=2), examples=held,
        metric=rl.logit_diff(YES, NO), methods="leace", estimator="mean_difference", draws=1, bootstrap=0,
        tokenizer=plan.tokenizer, progress=False,
    )  # fmt: skip
    module = _projection(plan.model, 0)
    whole = _last_inputs(plan.model, module, [plan.tokenizer(text)["input_ids"] for text in plan.texts])
    part = slice(2 * whole.shape[1] // HEADS, 3 * whole.shape[1] // HEADS)
    eraser = LeaceEraser.fit(torch.tensor(whole[:, part]), torch.tensor(plan.used).double())

    def erase(module: nn.Module, args: Any) -> Any:
        changed = args[0].clone()
        changed[:, -1, part] = eraser(changed[:, -1, part].double()).float()
        return (changed,)

    def measured() -> list[float]:
        with torch.no_grad():
            rows = [plan.tokenizer(text, return_tensors="pt") for text in held]
            logits = [plan.model(**row).logits[0, -1] for row in rows]
        return [float(one[YES] - one[NO]) for one in logits]

    assert found.before.tolist() == pytest.approx(measured(), abs=1e-3)
    handle = module.register_forward_pre_hook(erase)
    try:
        expected = measured()
    finally:
        handle.remove()
    assert found.of().site == "blocks[0].attn.heads (heads 2)"
    assert found.of().values.tolist() == pytest.approx(expected, abs=1e-3)
    assert np.abs(np.array(expected) - found.before).max() > 1e-2


def test_heads_are_counted_from_the_first_and_features_that_differ_late_are_told_apart(llama: Any) -> None:
    last = rl.Read("blocks[1].attn.heads", heads=-1)
    found = probe(llama, ROWS, LABELS, sites=[last, "blocks[0].attn.heads"], **LIGHT).by_head()
    assert found.columns.tolist() == list(range(HEADS))
    assert found.loc[1].notna().tolist() == [False] * (HEADS - 1) + [True]
    some, other = [*range(8), 10], [*range(8), 11]
    reads = [rl.Read("blocks[1].output @ last", features=features) for features in (some, other)]
    both = probe(llama, ROWS, LABELS, sites=reads, **LIGHT)
    for read, features in zip(reads, (some, other), strict=True):
        assert both[read].read is not None
        assert both[read].read.features == tuple(features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sites": ["blocks[0].attn.heads", rl.Read("blocks[0].attn.heads", heads=-1)]},
            f"sites name 'model.layers.0.self_attn.o_proj.input (heads {HEADS - 1})' twice",
        ),
        (
            {
                "sites": ["blocks[0].output", rl.Read("blocks[1].output @ last")],
                "positions": {"last": "first"},
            },
            "'last' is the name of another position there",
        ),
        (
            {"sites": "blocks[0].output", "positions": {"a": "last", "b": "last"}},
            "positions name 'last' twice",
        ),
        ({"sites": rl.Read(positions="last")}, "a read here needs a site, as in rl.Read('blocks[5].output')"),
        ({"sites": 3}, "expected a path such as 'blocks[*].output', an rl.Read, or several of them"),
        (
            {"sites": ["blocks[0].attn.heads", rl.Read("blocks[0].attn.heads", heads=1)]},
            "sites name 'model.layers.0.self_attn.o_proj.input (heads 1)' twice",
        ),
        (
            {"sites": [rl.Read("blocks[0].output @ last"), "blocks[0].output"]},
            "sites name 'blocks[0].output' at 'last' twice",
        ),
        (
            {"sites": [rl.Read("blocks[0].output", name="a"), rl.Read("blocks[1].output", name="a")]},
            "sites: two of them are called 'a'; give reads other names",
        ),
        (
            {"sites": rl.Read("blocks[0].output @ first"), "positions": "last"},
            "positions='last': every site has positions of its own; leave it out",
        ),
    ],
)
@pytest.mark.usefixtures("users_call")
def test_sites_that_cannot_be_used_are_named(change: dict[str, Any], message: str, llama: Any) -> None:
    with pytest.raises(rl.DataError) as caught:
        probe(llama, ROWS, LABELS, **{**LIGHT, **change})
    assert message in str(caught.value)
