"""Binding: what does not fit fails there, and the plan says what will happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from tests.models import HEAD_SIZE, batch_of, copy_of
from tests.oracle import assert_close


def bind(model: Any, *nodes: Any, **options: Any) -> rl.BoundModel:
    return rl.InterventionGraph(*nodes).bind(model, **options)


def edit(name: str = "edit", at: str = "blocks[1].output", **more: Any) -> rl.Edit:
    more.setdefault("intervention", rl.Scale(2.0))
    return rl.Edit(name, at=at, **more)


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (
            edit(at="model.layers[0].self_atn.output"),
            rl.AddressError,
            r"edit 'edit'.*Did you mean 'self_attn'",
        ),
        (edit(at="blocks[9].output"), rl.AddressError, "has 3 entries"),
        (
            edit(heads=[9], at="blocks[0].attn.heads"),
            rl.AddressError,
            r"edit 'edit': heads=\[9\].*there are 4",
        ),
        (edit(heads=[0]), rl.AddressError, "not one head after the other"),
        (edit(features=[99]), rl.AddressError, "99 is outside"),
        (edit(at="model.layers.output"), rl.BindError, "never called in a forward pass"),
        (edit(at="model.embed_tokens.input"), rl.BindError, r"holds torch\.int64 numbers"),
        (
            edit(intervention=rl.LoReFT(40)),
            rl.InterventionError,
            "edit 'edit' at .*rank=40 is more than the 32",
        ),
        (
            edit(intervention=rl.Add([1.0, 2.0])),
            rl.InterventionError,
            "value has 2 numbers, the vectors here have 32",
        ),
        (edit(at="model.layers[0].output.logits"), rl.ReftlabError, "no 'logits' in it"),
    ],
)
def test_an_edit_that_does_not_fit_fails_when_bound(
    llama: Any, node: rl.Edit, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        bind(llama, node)


def test_a_read_that_does_not_fit_fails_when_bound(llama: Any) -> None:
    with pytest.raises(rl.AddressError, match=r"read blocks\[9\]\.output @ all: .*has 3 entries"):
        bind(llama, rl.Read("blocks[9].output"))


def test_a_source_of_another_width_or_number_is_refused(llama: Any) -> None:
    source = rl.Source("other")

    def swap(at: str, read: rl.Read) -> rl.Edit:
        return edit("swap", at=at, intervention=rl.Swap(), source=read)

    with pytest.raises(rl.BindError, match=f"vectors of 32 features .* vectors of {4 * HEAD_SIZE}"):
        bind(llama, source, swap("blocks[1].output", rl.Read("blocks[1].attn.heads", run="other")))
    with pytest.raises(rl.BindError, match="acts at 3 sites and its source reads 2"):
        bind(llama, source, swap("blocks[*].output", rl.Read("blocks[:2].output", run="other")))
    with pytest.raises(
        rl.BindError, match=r"needs .*layers\.2\.output of the same run, which is reached later"
    ):
        bind(llama, swap("blocks[1].output", rl.Read("blocks[2].output")))


def test_a_source_that_reads_the_base_run_is_refused(llama: Any) -> None:
    swap = edit("swap", run="other", intervention=rl.Swap(), source=rl.Read())
    with pytest.raises(rl.BindError, match="reads from the base run, which is computed last"):
        bind(llama, rl.Source("other"), swap, rl.Read("blocks[2].output", run="other"))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(torch.relu(self.shared(x))))


def test_modules_called_never_or_twice_are_refused() -> None:
    example = torch.zeros(2, 4)
    with pytest.raises(
        rl.BindError, match=r"edit 'edit': shared\.output is reached 2 times in one forward pass"
    ):
        bind(Twice(), edit(at="shared.output"), example=example)
    with pytest.raises(rl.BindError, match=r"unused\.output: that module is never called"):
        bind(Twice(), edit(at="unused.output"), example=example)
    bind(Twice(), edit(at="head.output"), example=example)


@pytest.mark.usefixtures("users_call")
def test_what_cannot_be_bound_says_why(llama: Any) -> None:
    graph = rl.InterventionGraph(edit())
    with pytest.raises(rl.BindError, match="cannot make up inputs for it"):
        bind(Twice(), edit(at="head.output"))
    with pytest.raises(
        rl.BindError, match=r"could not run on the example inputs: .*Give inputs that it takes"
    ):
        bind(Twice(), edit(at="head.output"), example=torch.zeros(2, 5))
    with pytest.raises(rl.BindError, match="bound already; bind to its model and add"):
        graph.bind(graph.bind(llama))
    with pytest.raises(rl.BindError, match="bound to a torch module, not to 'llama'"):
        graph.bind("llama")


def test_a_path_of_several_places_makes_an_intervention_for_each(llama: Any) -> None:
    reft = bind(
        llama, edit("e", at="blocks[*].output", intervention=rl.LoReFT(2)), edit("one", at="blocks[0].output")
    )
    assert list(reft.interventions) == ["e[0]", "e[1]", "e[2]", "one"]
    weights = {reft.interventions[f"e[{n}]"].linear.weight.data_ptr() for n in range(3)}
    assert len(weights) == 3
    assert [bound.key for bound in reft.edits] == ["e[0]", "one", "e[1]", "e[2]"]


def test_edits_at_one_site_act_in_the_order_of_the_list(llama: Any) -> None:
    batch, add, clamp = (
        batch_of(),
        edit("add", intervention=rl.Add(1.0)),
        edit("clamp", intervention=rl.Clamp(-0.5, 0.5)),
    )
    values = {}
    for name, nodes in {"add first": (add, clamp), "clamp first": (clamp, add)}.items():
        values[name] = bind(llama, *nodes).read("blocks[1].output @ last", **batch)["blocks[1].output @ last"]
    bare = bind(llama).read("blocks[1].output @ last", **batch)["blocks[1].output @ last"]
    assert_close(values["add first"], (bare + 1).clamp(-0.5, 0.5))
    assert_close(values["clamp first"], bare.clamp(-0.5, 0.5) + 1)


@pytest.mark.parametrize("name", ["values", "keys", "train", "type", "forward", "training", "to"])
def test_an_edit_may_be_called_like_a_method_of_modules(llama: Any, name: str) -> None:
    reft, batch = bind(llama, edit(name, intervention=rl.LoReFT(2))), batch_of()
    with torch.no_grad():
        assert (reft(**batch).logits - llama(**batch).logits).abs().max() > 1e-3
    assert f"interventions.{name}.basis.weight" in reft.state_dict()
    assert reft.eval() is reft


def test_binding_changes_nothing_in_the_model(llama: Any) -> None:
    model = copy_of(llama).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pad = model.config.pad_token_id
    bind(model, edit(intervention=rl.LoReFT(2)))
    assert model.training
    assert model.config.pad_token_id == pad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_scan_runs_on_shapes_and_not_on_the_model(any_model: Any) -> None:
    ran: list[int] = []
    handle = any_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        bind(any_model, edit(), rl.Read("blocks[*].mlp.output"))
    finally:
        handle.remove()
    assert ran == []


def test_the_plan_says_what_happens_in_order(llama: Any) -> None:
    reft = bind(
        llama,
        rl.Read("blocks[2].output @ last", name="end"),
        edit(
            "late",
            at="blocks[2].output",
            positions="last",
            intervention=rl.LoReFT(4),
            phase="both",
            strength=0.5,
        ),
        rl.Source("other"),
        edit(
            "early", at="blocks[0].attn.heads", heads=[1], intervention=rl.Swap(), source=rl.Read(run="other")
        ),
    )
    plan = reft.plan()
    assert [(step.run, step.what, step.name) for step in plan.steps] == [
        ("other", "read", "early.source"), ("base", "edit", "early"), ("base", "edit", "late"), ("base", "read", "end"),
    ]  # fmt: skip
    count = 4 * 32 + 4 + 32 * 4
    assert plan.parameters == count
    text = str(plan)
    for part in (
        f"LlamaForCausalLM: 4 steps, {count} trainable numbers", "run other:", "run base:",
        "edit late at model.layers.2.output @ last, phase both (width 32): LoReFT(rank=4) at strength 0.5",
        "model.layers.0.self_attn.o_proj.input (heads 1)", "of run other", "read end at model.layers.2.output @ last",
    ):  # fmt: skip
        assert part in text
    assert repr(plan) == text
    assert len(plan.to_frame()) == 4
    assert "<table>" in plan._repr_html_()
    assert reft._repr_html_() == plan._repr_html_()
    with reft.disabled("late"):
        assert "(disabled)" in str(reft.plan())
    assert "as the bare model" in str(bind(llama).plan())


def test_a_bound_model_shows_where_it_acts(llama: Any) -> None:
    assert "edit at model.layers.1.output" in repr(bind(llama, edit()))
