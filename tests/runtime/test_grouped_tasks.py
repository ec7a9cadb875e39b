"""Edits of one site that are carried out together, against plain hooks and the edits one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from reftlab.interventions.base import Intervention
from reftlab.interventions.reft import LoReFT
from tests.models import batch_of, build_model, hook_count
from tests.oracle import (
    Columns,
    assert_close,
    columns_by_hand,
    loreft,
    orthonormal,
    plain_edit,
    randomise,
    raw_blocks,
)

LENGTHS = (7, 4, 9, 5, 6, 3)
TASKS = ["c", None, "a", "b+a", "c", "a+c"]
NAMES = ("a", "b", "c")
SITE = "blocks[1].output"
sides = pytest.mark.parametrize("side", ["left", "right"])
FAMILY = {
    "LoReFT": lambda: rl.LoReFT(rank=3, activation="tanh", scale=0.5),
    "LoReFT-no-bias": lambda: rl.LoReFT(rank=3, bias=False),
    "NoReFT": lambda: rl.NoReFT(rank=3),
    "DiReFT": lambda: rl.DiReFT(rank=3, activation="gelu"),
    "NodiReFT": lambda: rl.NodiReFT(rank=3),
    "ConsReFT": lambda: rl.ConsReFT(rank=3),
    "LobiReFT": lambda: rl.LobiReFT(rank=3, scale=2.0),
}


def bound(
    model: Any, make: Callable[[], Intervention] = lambda: rl.LoReFT(rank=3), **options: Any
) -> rl.BoundModel:
    """Three edits of one site, the tasks a, b and c."""
    options = {"at": SITE, "positions": "last", **options}
    graph = rl.InterventionGraph(*(rl.Edit(name, intervention=make(), **options) for name in NAMES))
    reft = graph.bind(model).eval()
    randomise(reft)
    return reft


class Calls:
    """Counts how often several edits were one product, and how often one was called by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.together = self.alone = self.stacked = 0
        for name, count in (("grouped", "together"), ("forward", "alone"), ("_parts", "stacked")):
            kind = LoReFT if name == "_parts" else LoReFT.__mro__[2]
            monkeypatch.setattr(kind, name, self._counted(getattr(kind, name), count))

    def _counted(self, original: Any, name: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return original(*args, **kwargs)

        return counted


def one_by_one(reft: rl.BoundModel) -> Any:
    """A context in which every edit is carried out by itself, as observers ask."""
    return reft.watching(lambda *seen: None)


def columns_of(task: str, mask: Tensor, choose: Callable[[list[int]], list[int]]) -> Columns:
    """The columns that a task's edit acts on in each row."""
    every = columns_by_hand(mask, choose)
    return [own if t and task in t.split("+") else [] for own, t in zip(every, TASKS, strict=True)]


@torch.no_grad()
@sides
def test_tasks_together_give_what_plain_hooks_give(any_model: Any, side: str) -> None:
    batch = batch_of(LENGTHS, side)
    reft, mask = bound(any_model, positions="first(2)+last"), batch["attention_mask"]
    hooks = [
        plain_edit(
            raw_blocks(any_model)[1],
            mask,
            columns_of(name, mask, lambda real: [*real[:2], real[-1]]),
            lambda h, s, n, built=reft.interventions[name]: loreft(built, h),
        )
        for name in NAMES
    ]
    with hooks[0], hooks[1], hooks[2]:
        expected = any_model(**batch).logits
    assert_close(reft(**batch, tasks=TASKS).logits, expected, 2e-5)
    assert hook_count(any_model) == 0


@pytest.mark.parametrize("name", FAMILY)
def test_values_and_gradients_equal_those_of_the_edits_one_by_one(llama: Any, name: str) -> None:
    batch = batch_of(LENGTHS, "left")
    reft = bound(llama, FAMILY[name], positions="last(2)")
    llama.requires_grad_(False)

    def values() -> tuple[Tensor, dict[str, Tensor]]:
        reft.zero_grad()
        logits = reft(**batch, tasks=TASKS).logits
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), {k: p.grad.clone() for k, p in reft.interventions.named_parameters()}

    logits, gradients = values()
    with one_by_one(reft):
        expected, wanted = values()
    assert_close(logits, expected)
    assert all(bool(gradient.any()) for gradient in wanted.values())
    for key, gradient in gradients.items():
        assert_close(gradient, wanted[key], 1e-4)


def test_a_row_gives_its_own_tasks_parameters_a_gradient_and_no_others(llama: Any) -> None:
    llama.requires_grad_(False)
    reft, batch = bound(llama), batch_of(LENGTHS)
    reft(**batch, tasks=["a", "b", "a", "b", None, "a"]).logits.sum().backward()
    gradients = {key: p.grad for key, p in reft.interventions.named_parameters()}
    assert all(g is None or not g.any() for key, g in gradients.items() if key.startswith("c."))
    assert all(bool(g.any()) for key, g in gradients.items() if not key.startswith("c."))


def test_vectors_that_are_not_finite_stay_with_their_own_task(llama: Any) -> None:
    llama.requires_grad_(False)
    reft, batch, tasks = bound(llama), batch_of((5, 5, 5, 5)), ["a", "b", "b", "c"]
    clean = reft(**batch, tasks=tasks).logits.detach()
    with torch.no_grad():
        reft.interventions["a"].linear.weight.fill_(float("nan"))
    got = reft(**batch, tasks=tasks).logits
    assert got[0].isnan().any()
    assert torch.equal(got[1:], clean[1:])
    got[1:].sum().backward()
    assert all(
        bool(p.grad.isfinite().all())
        for key, p in reft.interventions.named_parameters()
        if not key.startswith("a.")
    )


@torch.no_grad()
def test_one_site_costs_one_product_however_many_tasks(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = rl.InterventionGraph(
        *(rl.Edit(f"t{k}", at=SITE, positions="all", intervention=rl.LoReFT(rank=2)) for k in range(6))
    )
    reft, batch, calls = graph.bind(llama), batch_of(LENGTHS), Calls(monkeypatch)
    reft(**batch, tasks=[f"t{k}" for k in range(6)])
    assert (calls.together, calls.alone) == (1, 0)
    reft(**batch, tasks=["t0", "t1", "t0+t1", None, None, None])
    assert (calls.together, calls.alone) == (2, 1)
    reft(**batch, tasks="t4")
    assert (calls.together, calls.alone) == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("phase", ["prompt", "decode", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_mixed_tasks_equals_the_edits_one_by_one(
    request: pytest.FixtureRequest, family: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(family)
    batch, calls = batch_of(LENGTHS, "left"), Calls(monkeypatch)
    reft = bound(model, positions="all", phase=phase, at="blocks[*].output")
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    got = reft.generate(**batch, tasks=TASKS, **options)
    assert calls.together > 0
    with one_by_one(reft):
        expected = reft.generate(**batch, tasks=TASKS, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, other in zip(got.logits, expected.logits, strict=True):
        assert_close(mine, other, 1e-4)
    options.update(num_beams=2, num_return_sequences=2, output_logits=False)
    beams = reft.generate(**batch, tasks=TASKS, **options)
    with one_by_one(reft):
        assert torch.equal(beams.sequences, reft.generate(**batch, tasks=TASKS, **options).sequences)


@torch.no_grad()
def test_a_generation_stacks_parameters_twice_and_sees_those_that_change(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    reft, batch = bound(llama, positions="all", phase="both"), batch_of(LENGTHS, "left")
    tasks = ["a", "b", "c", "a", "b", "c"]
    weight, steps = reft.interventions["b"].linear.weight, []

    def change(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(scores.clone())
        if len(steps) == 3:
            weight.mul_(-3.0)
        return scores

    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    reft.generate(**batch, tasks=tasks, **options)
    assert calls.stacked == 2 * len(NAMES)
    start = weight.clone()
    reft.generate(**batch, tasks=tasks, logits_processor=[change], **options)
    assert calls.stacked == 5 * len(NAMES)
    got, steps = steps, []
    weight.copy_(start)
    with one_by_one(reft):
        reft.generate(**batch, tasks=tasks, logits_processor=[change], **options)
    for mine, other in zip(got, steps, strict=True):
        assert_close(mine, other, 1e-4)


@torch.no_grad()
def test_strengths_factors_and_subspaces_hold_row_by_row(llama: Any) -> None:
    batch = batch_of(LENGTHS)
    graph = rl.InterventionGraph(
        rl.Edit("a", at=SITE, positions="last", intervention=rl.LoReFT(rank=3), strength=0.5),
        rl.Edit("b", at=SITE, positions="all", intervention=rl.LoReFT(rank=3), subspace=[0, 2]),
        rl.Edit("c", at=SITE, positions="last", intervention=rl.LoReFT(rank=3)),
    )
    reft = graph.bind(llama).eval()
    randomise(reft)
    choices: dict[str, Any] = {
        "tasks": TASKS,
        "scale": {"c": [0.5, 1.0, 2.0, 0.0, -1.0, 0.25]},
        "subspace": {"a": [[0], None, [], [1, 2], None, [2]]},
    }
    got = reft(**batch, **choices).logits
    with one_by_one(reft):
        assert_close(got, reft(**batch, **choices).logits)
    mask = batch["attention_mask"]
    ends = columns_by_hand(mask, lambda real: real[-1:])
    row = [own if number == 4 else [] for number, own in enumerate(ends)]
    built = reft.interventions["c"]
    with plain_edit(raw_blocks(llama)[1], mask, row, lambda h, s, n: h - (loreft(built, h) - h)):
        assert_close(got[4], llama(**batch).logits[4])


@torch.no_grad()
def test_edits_of_a_view_leave_its_other_features_alone(llama: Any) -> None:
    batch = batch_of(LENGTHS)
    reft = bound(llama, at="blocks[1].attn.heads", heads=[1, 3], positions="all")
    got = reft(**batch, tasks=TASKS).logits
    with one_by_one(reft):
        assert_close(got, reft(**batch, tasks=TASKS).logits)
    assert not torch.allclose(got[0], llama(**batch).logits[0])
    features = bound(llama, features=[0, 5, 6, 7])
    got = features(**batch, tasks=TASKS).logits
    built, mask = features.interventions["c"], batch["attention_mask"]

    def change(h: Tensor, s: Any, n: Any) -> Tensor:
        new = h.clone()
        new[:, [0, 5, 6, 7]] = loreft(built, h[:, [0, 5, 6, 7]])
        return new

    with plain_edit(raw_blocks(llama)[1], mask, columns_of("c", mask, lambda real: real[-1:]), change):
        assert_close(got[0], llama(**batch).logits[0])


class Doubled(LoReFT):
    """LoReFT that goes twice as far; nothing of it but `forward` is its own."""

    def forward(self, base: Any, source: Any = None, *, subspace: Any = None) -> Any:
        return base + 2.0 * (super().forward(base, source, subspace=subspace) - base)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["joined", "condition", "subclass", "hooked", "mixed", "shared"])
def test_what_cannot_be_one_product_is_carried_out_right(llama: Any, kind: str) -> None:
    batch, calls = batch_of((5, 5, 5, 5, 5, 5)), []
    options: dict[str, Any] = {}
    make: Callable[[], Intervention] = lambda: rl.LoReFT(rank=3)  # noqa: E731
    if kind == "joined":
        options["positions"] = "joined(last(2))"
    elif kind == "condition":
        options["when"] = rl.norm("blocks[0].output @ last") > 0.0
    elif kind == "subclass":
        make = lambda: Doubled(rank=3)  # noqa: E731
    elif kind == "shared":
        options["share"] = "one"
    reft = bound(llama, make, **options)
    if kind == "hooked":
        reft.interventions["a"].register_forward_hook(lambda module, args, new: calls.append(1) or new + 1.0)
    if kind == "mixed":
        extra = rl.Edit("d", at=SITE, positions="last", intervention=rl.Add(0.5), tasks=["b", "c"])
        wide = rl.Edit("e", at=SITE, positions="all", intervention=rl.LoReFT(rank=2), tasks=["c"])
        reft = reft + rl.InterventionGraph(extra, wide).bind(llama).eval()
        randomise(reft)
    got = reft(**batch, tasks=TASKS).logits
    with one_by_one(reft):
        assert_close(got, reft(**batch, tasks=TASKS).logits)
    if kind == "hooked":
        assert len(calls) == 2
    for row in (0, 3, 5):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        assert_close(got[row], reft(**alone, tasks=TASKS[row]).logits[0], 1e-4)


def test_sources_are_matched_while_others_of_the_site_go_together(llama: Any) -> None:
    swap = rl.Edit(
        "swap", at=SITE, positions="last", intervention=rl.Swap(), source=rl.Read(run="other"), tasks=["a", "b"],
    )  # fmt: skip
    edits = [rl.Edit(n, at=SITE, positions="last", intervention=rl.LoReFT(rank=3)) for n in NAMES]
    reft = rl.InterventionGraph(rl.Source("other"), edits[0], swap, *edits[1:]).bind(llama).eval()
    randomise(reft)
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=8)
    with torch.no_grad():
        got = reft(**batch, tasks=TASKS, sources={"other": other}).logits
        with one_by_one(reft):
            assert_close(got, reft(**batch, tasks=TASKS, sources={"other": other}).logits)
        # Row 3 is of a and b: LoReFT a, then the swap takes its place, then LoReFT b.
        built, mask = reft.interventions["b"], batch["attention_mask"]
        columns = columns_by_hand(mask, lambda real: real[-1:])
        kept = reft.read(f"{SITE} @ last", select=[], **other)[f"{SITE} @ last"][:, 0]
        with plain_edit(raw_blocks(llama)[1], mask, columns, lambda h, s, n: loreft(built, s), kept):
            assert_close(got[3], llama(**batch).logits[3], 1e-4)


def test_dropout_in_training_draws_for_each_edit_by_itself(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    reft, batch = bound(llama, lambda: rl.LoReFT(rank=3, dropout=0.5)), batch_of(LENGTHS)
    reft(**batch, tasks=TASKS)
    assert calls.together == 2
    reft.interventions.train()
    torch.manual_seed(4)
    got = reft(**batch, tasks=TASKS).logits
    assert calls.together == 2
    torch.manual_seed(4)
    with one_by_one(reft):
        assert torch.equal(got, reft(**batch, tasks=TASKS).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing_equal_those_without(reentrant: bool) -> None:
    model, batch = build_model("llama"), batch_of(LENGTHS)
    reft = bound(model, at="blocks[*].output").train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            reft.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        reft.zero_grad()
        reft(**batch, tasks=TASKS, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in reft.interventions.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        assert_close(checkpointed, plain, 1e-4)


@torch.no_grad()
def test_half_precision_and_double_keep_their_dtype_and_digits() -> None:
    for dtype, tolerance in ((torch.bfloat16, 0.0), (torch.float64, 1e-6)):
        model = build_model("llama").to(dtype)
        reft, batch = bound(model, positions="all"), batch_of(LENGTHS)
        got = reft(**batch, tasks=TASKS).logits
        with one_by_one(reft):
            expected = reft(**batch, tasks=TASKS).logits
        assert got.dtype == dtype
        if dtype == torch.bfloat16:
            # A sum in another order may round a number of 8 bits the other way here and there.
            assert (got != expected).float().mean() < 0.05
            assert_close(got, expected, 0.05)
        else:
            assert_close(got, expected, tolerance)
            assert torch.equal(got[1], model(**batch).logits[1])


def test_training_steps_in_a_mixed_batch_are_those_of_each_task_alone(llama: Any) -> None:
    llama.requires_grad_(False)
    batch, tasks = batch_of((6, 6, 6, 6), seed=3), ["a", "b", "c", "b"]
    mixed, apart = bound(llama), bound(llama)
    for reft in (mixed, apart):
        optimiser = torch.optim.SGD(reft.interventions.parameters(), lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            if reft is mixed:
                reft(**batch, tasks=tasks).logits.logsumexp(-1).sum().backward()
            else:
                for row, task in enumerate(tasks):
                    own = {key: value[row : row + 1] for key, value in batch.items()}
                    reft(**own, tasks=task).logits.logsumexp(-1).sum().backward()
            optimiser.step()
    for (name, mine), other in zip(
        mixed.interventions.named_parameters(), apart.interventions.parameters(), strict=True
    ):
        if name.endswith("basis.weight"):
            assert_close(orthonormal(mine), orthonormal(other), 1e-4)
        assert_close(mine, other, 1e-4)


def test_wrong_numbers_of_rows_are_still_refused(llama: Any) -> None:
    reft, batch = bound(llama), batch_of(LENGTHS)
    with pytest.raises(rl.RunError, match="tasks has 2 entries and the batch 6 rows"):
        reft(**batch, tasks=["a", "b"])
    with pytest.raises(rl.RunError, match=r"subspace\['b'\] has 2 entries"):
        reft(**batch, tasks=TASKS, subspace={"b": [[0], None]})
    assert hook_count(llama) == 0
