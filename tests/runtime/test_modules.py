"""What modules take and return, and models that are no transformers."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from tests.models import batch_of
from tests.oracle import assert_close

Pair = namedtuple("Pair", ["state", "extra"])


class Layer(nn.Module):
    """Returns its state in the way it is told to."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.linear = form, nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Any:
        state, extra = self.linear(x), torch.ones(x.shape[0], x.shape[1], 4)
        forms = {
            "tensor": state, "tuple": (state, extra), "list": [state, extra], "dict": {"state": state, "n": 3},
            "output": OrderedDict(extra=extra, last_hidden_state=state), "named": Pair(state, extra),
            "nested": ((state, extra), {"deep": extra}),
        }  # fmt: skip
        return forms[self.form]


class Holder(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layer = Layer(form)
        self.seen: Any = None

    def forward(self, x: Tensor) -> Any:
        self.seen = self.layer(x=x, scale=torch.ones(4))
        return self.seen


INPUTS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def zeroed(form: str, at: str, positions: Any = "last") -> tuple[Holder, Any]:
    model = Holder(form)
    edit = rl.Edit("zero", at=at, positions=positions, intervention=rl.Zero())
    with torch.no_grad():
        return model, rl.InterventionGraph(edit).bind(model, example=INPUTS)(INPUTS)


def is_zeroed(value: Tensor) -> bool:
    return bool((value[:, -1] == 0).all() and (value[:, :-1] != 0).all())


@pytest.mark.parametrize(
    ("form", "at", "where"),
    [
        ("tensor", "layer.output", lambda out: out),
        ("tuple", "layer.output", lambda out: out[0]),
        ("tuple", "layer.output[1]", lambda out: out[1]),
        ("tuple", "layer.output[-1]", lambda out: out[1]),
        ("list", "layer.output[0]", lambda out: out[0]),
        ("dict", "layer.output", lambda out: out["state"]),
        ("dict", "layer.output.state", lambda out: out["state"]),
        ("output", "layer.output", lambda out: out["last_hidden_state"]),
        ("output", "layer.output.extra", lambda out: out["extra"]),
        ("named", "layer.output.extra", lambda out: out.extra),
        ("named", "layer.output[0]", lambda out: out.state),
        ("nested", "layer.output[0][1]", lambda out: out[0][1]),
        ("nested", "layer.output[1].deep", lambda out: out[1]["deep"]),
    ],
)
def test_one_value_of_an_output_is_edited_and_its_form_kept(form: str, at: str, where: Any) -> None:
    model, output = zeroed(form, at)
    bare = model.layer(INPUTS)
    assert type(output) is type(bare)
    assert is_zeroed(where(output))
    torch.testing.assert_close(where(output)[:, :-1], where(bare)[:, :-1])
    where_else = [t for t in _tensors(output) if t is not where(output)]
    assert not any(is_zeroed(tensor) for tensor in where_else)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [tensor for item in items for tensor in _tensors(item)]


@pytest.mark.parametrize("at", ["layer.input", "layer.input.x", "layer.input[0]", "layer.linear.input"])
def test_inputs_given_by_keyword_are_edited(at: str) -> None:
    model, output = zeroed("tensor", at)
    assert_close(output[:, -1], model.layer.linear.bias.expand(2, 4))
    assert_close(output[:, :-1], model.layer.linear(INPUTS)[:, :-1])


@pytest.mark.parametrize(
    ("form", "at", "message"),
    [
        ("tuple", "layer.output[2]", "no 2 in it; it is a tuple of 2"),
        ("dict", "layer.output.n", "is a int, not a tensor"),
        ("dict", "layer.output.stat", "no 'stat' in it; it is a dict with state, n"),
        ("nested", "layer.output", "no tensor comes first"),
        ("tensor", "layer.output[0][0]", "no 0 in it|not a tensor|has shape"),
        ("tensor", "layer.input.y", "not with 'y'"),
    ],
)
def test_a_value_that_is_not_there_says_what_is(form: str, at: str, message: str) -> None:
    with pytest.raises(rl.ReftlabError, match=message):
        zeroed(form, at)


def test_attention_called_by_keyword_is_edited_at_its_input(llama: Any) -> None:
    batch = batch_of((5, 5))
    edit = rl.Edit("zero", at="model.layers[1].self_attn.input", positions="last", intervention=rl.Zero())

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert not args
        hidden = kwargs["hidden_states"].clone()
        hidden[:, -1] = 0
        return args, {**kwargs, "hidden_states": hidden}

    with torch.no_grad():
        got = rl.InterventionGraph(edit).bind(llama)(**batch).logits
        handle = llama.model.layers[1].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            expected = llama(**batch).logits
        finally:
            handle.remove()
        assert (expected - llama(**batch).logits).abs().max() > 1e-3
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("at", "same_as"),
    [
        ("model.layers[1].self_attn.output[0]", "model.layers[1].self_attn.output"),
        ("model.output.last_hidden_state", "model.norm.output"),
        ("model.output", "model.norm.output"),
        ("output.logits", "lm_head.output"),
        ("output", "lm_head.output"),
        ("lm_head.input", "model.norm.output"),
        ("model.layers[2].input", "model.layers[1].output"),
    ],
)
def test_explicit_values_are_the_places_they_name(llama: Any, at: str, same_as: str) -> None:
    batch = batch_of((5, 5))

    def logits(site: str) -> Tensor:
        edit = rl.Edit("clamp", at=site, positions="f1+l1", intervention=rl.Clamp(-0.1, 0.1))
        with torch.no_grad():
            return rl.InterventionGraph(edit).bind(llama)(**batch).logits

    assert_close(logits(at), logits(same_as))
    with torch.no_grad():
        assert (logits(at) - llama(**batch).logits).abs().max() > 1e-3


def test_the_models_own_output_type_comes_back(any_model: Any) -> None:
    edit = rl.Edit("zero", at="blocks[1].output", positions="last", intervention=rl.Zero())
    reft, batch = rl.InterventionGraph(edit).bind(any_model), batch_of()
    with torch.no_grad():
        assert type(reft(**batch)) is type(any_model(**batch))
        as_tuple = reft(**batch, return_dict=False)
        assert torch.equal(as_tuple[0], reft(**batch).logits)


def test_an_mlp_is_edited_row_by_row() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(5, 4)
    edit = rl.Edit("add", at="[0].output", features=[1, 3], intervention=rl.Add([10.0, -10.0]))
    reft = rl.InterventionGraph(edit).bind(model, example=inputs)
    hidden = model[0](inputs)
    expected = model[2](torch.relu(hidden + torch.tensor([0.0, 10, 0, -10, 0, 0])))
    torch.testing.assert_close(reft(inputs), expected)
    torch.testing.assert_close(reft(inputs[:2]), expected[:2])


def test_a_site_without_a_token_axis_takes_no_positions() -> None:
    edit = rl.Edit("zero", at="output", positions="last", intervention=rl.Zero())
    with pytest.raises(rl.BindError, match="no token axis, so positions must be 'all', not 'last'"):
        rl.InterventionGraph(edit).bind(nn.Linear(3, 3), example=torch.zeros(2, 3))


def test_an_rnn_is_edited_at_its_time_steps() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model = Tagger()
    edit = rl.Edit("add", at="rnn.output", positions="f1+l2", intervention=rl.Add(torch.arange(8.0)))
    reft = rl.InterventionGraph(edit).bind(model, example=torch.zeros(2, 5, 4))
    inputs = torch.randn(3, 6, 4)
    hidden = model.rnn(inputs)[0].clone()
    hidden[:, [0, 4, 5]] += torch.arange(8.0)
    torch.testing.assert_close(reft(inputs), model.head(hidden))


def test_an_rnn_that_takes_time_first_is_edited_at_its_time_steps() -> None:
    model = nn.GRU(4, 8)
    edit = rl.Edit("add", at="[0].output", positions="f1+l2", intervention=rl.Add(torch.arange(8.0)))
    reft = rl.InterventionGraph(edit).bind(nn.Sequential(model, First()), example=torch.zeros(5, 2, 4))
    inputs = torch.randn(6, 3, 4)
    expected = model(inputs)[0].clone()
    expected[[0, 4, 5]] += torch.arange(8.0)
    torch.testing.assert_close(reft(inputs), expected)


class First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0]


class Unrolled(nn.Module):
    """A recurrent cell called once for each time step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)


@pytest.mark.parametrize(("positions", "steps"), [("f1", [0]), ("[2,4]", [2, 4]), ("all", range(6))])
def test_a_recurrent_cells_calls_are_its_time_steps(positions: str, steps: Any) -> None:
    model, inputs = Unrolled(), torch.randn(3, 6, 4)
    edit = rl.Edit("add", at="cell.output", positions=positions, intervention=rl.Add(torch.arange(8.0)))
    reft = rl.InterventionGraph(edit).bind(model, example=torch.zeros(2, 6, 4))
    state = torch.zeros(3, 8)
    for step in range(6):
        state = model.cell(inputs[:, step], state) + (torch.arange(8.0) if step in steps else 0)
    torch.testing.assert_close(reft(inputs), model.head(state))


def small_cnn() -> nn.Sequential:
    layers = {"conv": nn.Conv2d(1, 4, 3), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(**layers, head=nn.Linear(4, 2)))


def test_a_cnn_is_edited_behind_its_pooling() -> None:
    model, images = small_cnn(), torch.randn(3, 1, 8, 8)
    edit = rl.Edit("zero", at="flat.output", intervention=rl.Zero())
    got = rl.InterventionGraph(edit).bind(model, example=images)(images)
    torch.testing.assert_close(got, model.head.bias.expand(3, 2))


def test_a_feature_map_is_edited_at_places_in_raster_order() -> None:
    model, images = small_cnn(), torch.randn(3, 1, 8, 6)
    vector = torch.tensor([3.0, -1.0, 2.0, 5.0])
    # Places 1 and 6 of a map 4 wide are row 0 column 1 and row 1 column 2; the last is row 5 column 3.
    edit = rl.Edit("add", at="conv.output", positions="[1,6]+last", intervention=rl.Add(vector))
    reft = rl.InterventionGraph(edit).bind(model, example=images)
    maps = model.conv(images).clone()
    for row, column in ((0, 1), (1, 2), (5, 3)):
        maps[:, :, row, column] += vector
    torch.testing.assert_close(reft(images), model.head(maps.mean((2, 3))))
    read = reft.read("conv.output @ [6]", input=images)["conv.output @ [6]"]
    torch.testing.assert_close(read[:, 0], maps[:, :, 1, 2])


def test_a_signal_is_edited_at_its_samples() -> None:
    model, signal = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(28, 2)), torch.randn(3, 2, 9)
    edit = rl.Edit("add", at="[0].output", positions="last", intervention=rl.Add(torch.arange(4.0)))
    samples = model[0](signal).clone()
    samples[:, :, -1] += torch.arange(4.0)
    got = rl.InterventionGraph(edit).bind(model, example=signal)(signal)
    torch.testing.assert_close(got, model[2](samples.flatten(1)))


def test_a_model_that_looks_at_values_is_bound_by_a_real_pass() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.a(x)) if float(x.sum()) >= 0 else x

    model, inputs = Looks().train(), torch.ones(2, 3)
    edit = rl.Edit("zero", at="a.output", intervention=rl.Zero())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    reft = rl.InterventionGraph(edit).bind(model, example=inputs)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.drop.training
    assert torch.equal(reft(inputs), torch.zeros(2, 3))


def test_a_pass_that_does_not_reach_an_edit_is_an_error() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor, skip: bool = False) -> Tensor:
            return x if skip else self.a(x)

    inputs = torch.ones(2, 3)
    edit = rl.Edit("zero", at="a.output", intervention=rl.Zero())
    reft = rl.InterventionGraph(edit).bind(Skips(), example=inputs)
    with pytest.raises(rl.RunError, match=r"edit 'zero' touched no token: a\.output did not run"):
        reft(inputs, skip=True)
    with pytest.raises(rl.RunError, match="was not reached"):
        reft.read("a.output", x=inputs, skip=True)
