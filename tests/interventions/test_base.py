"""Arguments, building, dropout, and interventions of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab import InterventionError
from reftlab.interventions import intervention_types
from tests.models import batch_of
from tests.oracle import assert_close

RANKED = [rl.LoReFT, rl.NoReFT, rl.DiReFT, rl.NodiReFT, rl.ConsReFT, rl.LobiReFT]
LEARNED = RANKED[:4]


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("kind", RANKED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2, "dropout": 1.5}, "dropout=1.5"),
        ({"rank": 2, "dropout": "0.1"}, "dropout='0.1'"),
        ({"rank": 2, "scale": None}, "scale=None"),
        ({"rank": 2, "scale": float("nan")}, "scale=nan"),
    ],
)
def test_the_family_names_the_argument_that_is_wrong(kind: Any, arguments: Any, named: str) -> None:
    with pytest.raises(InterventionError, match=named):
        kind(**arguments)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("kind", LEARNED, ids=lambda kind: kind.__name__)
def test_activations_and_biases_are_checked(kind: Any) -> None:
    with pytest.raises(InterventionError, match=r"activation='rellu'.*Did you mean 'relu'"):
        kind(2, activation="rellu")
    with pytest.raises(InterventionError, match="bias=1"):
        kind(2, bias=1)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: rl.Scale("2"), "factor='2'"),
        (lambda: rl.Scale(float("inf")), "factor=inf"),
        (lambda: rl.Noise(-1.0), r"std=-1\.0"),
        (lambda: rl.Noise(1.0, seed=0.5), r"seed=0\.5"),
        (lambda: rl.Clamp(), "low=, high= or both"),
        (lambda: rl.Clamp(2.0, 1.0), "low=2 is above high=1"),
        (lambda: rl.Clamp(low="a"), "low='a'"),
        (lambda: rl.Add([[1.0, 2.0]]), r"value must be a number or a vector .* of shape \(1, 2\)"),
        (lambda: rl.Add([1.0, float("nan")]), "finite"),
        (lambda: rl.Subtract("up"), "value='up'"),
        (lambda: rl.Mean({"a": 1}), "value="),
        (lambda: rl.Function(3), "function=3 cannot be called"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(make: Any, named: str) -> None:
    with pytest.raises(InterventionError, match=named):
        make()


@pytest.mark.parametrize("kind", RANKED, ids=lambda kind: kind.__name__)
def test_a_rank_above_the_width_is_refused_when_built(kind: Any) -> None:
    with pytest.raises(InterventionError, match="rank=5 is more than the 4 features"):
        kind(rank=5).build(4)


def test_a_vector_of_another_width_is_refused_when_built() -> None:
    for kind in (rl.Add, rl.Subtract, rl.Mean):
        with pytest.raises(InterventionError, match="value has 2 numbers, the vectors here have 3"):
            kind([1.0, 2.0]).build(3)


def test_building_makes_a_copy_and_leaves_the_description() -> None:
    description = rl.LoReFT(2, activation="relu", dropout=0.1, bias=False, scale=2.0)
    built = description.build(6)
    assert description.width is None
    assert not list(description.parameters())
    assert built.width == 6
    assert built.config == description.config
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == {
        "linear.weight": (2, 6), "basis.weight": (6, 2),
    }  # fmt: skip
    assert built.linear.weight.data_ptr() != description.build(6).linear.weight.data_ptr()


def test_a_value_is_copied_from_the_users_tensor() -> None:
    mine = torch.ones(3)
    edit = rl.Add(mine).build(3)
    mine.zero_()
    assert torch.equal(edit(torch.zeros(1, 3)), torch.ones(1, 3))


def test_a_description_shows_what_differs_from_the_defaults() -> None:
    assert rl.LoReFT(4).describe() == "LoReFT(rank=4)"
    assert (
        rl.LoReFT(4, activation="relu", scale=0.5).describe()
        == "LoReFT(rank=4, activation='relu', scale=0.5)"
    )
    assert rl.Add(torch.zeros(3)).describe() == "Add(value=tensor(3,))"
    assert rl.Add(2.0).describe() == "Add(value=2)"
    assert rl.Function(torch.sin).describe() == "Function(function=sin)"
    assert "rank=4" in repr(rl.LoReFT(4))


@pytest.mark.parametrize("kind", RANKED, ids=lambda kind: kind.__name__)
def test_dropout_drops_amounts_in_training_and_nothing_in_eval(kind: Any) -> None:
    edit, base = kind(rank=8, dropout=0.5).build(16), torch.randn(64, 16)
    edit.train()
    assert (edit(base) - edit(base)).abs().max() > 1e-2
    edit.eval()
    assert torch.equal(edit(base), edit(base))
    everything = kind(rank=8, dropout=1.0).build(16).train()
    torch.testing.assert_close(everything(base), base)


def test_a_swap_asks_for_its_source_and_a_zero_refuses_one() -> None:
    with pytest.raises(InterventionError, match="Swap needs source="):
        rl.Swap().check_source(False)
    with pytest.raises(InterventionError, match="Zero takes no source"):
        rl.Zero().check_source(True)
    rl.Function(torch.sin).check_source(True)
    rl.Function(torch.sin).check_source(False)


@pytest.mark.parametrize("kind", [rl.Add, rl.Subtract, rl.Mean], ids=lambda kind: kind.__name__)
def test_a_vector_edit_has_a_value_or_a_source_and_not_both(kind: Any) -> None:
    with pytest.raises(InterventionError, match="has both a value and a source"):
        kind(1.0).check_source(True)
    with pytest.raises(InterventionError, match="has neither a value nor a source"):
        kind().check_source(False)


def test_a_function_must_return_vectors_of_the_same_shape() -> None:
    base = torch.zeros(2, 3)
    with pytest.raises(InterventionError, match=r"shape \(2, 3\), it returned \(2,\)"):
        rl.Function(lambda h: h.sum(1)).build(3)(base)
    with pytest.raises(InterventionError, match="it returned NoneType"):
        rl.Function(lambda h: None).build(3)(base)


class Shift(rl.Intervention):
    """Move every feature by a learned amount.

    h + vector
    """

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.start = start

    def setup(self, width: int) -> None:
        self.vector = nn.Parameter(torch.full((width,), self.start))

    def forward(self, base: Tensor, source: Tensor | None = None) -> Tensor:
        return base + self.vector


def test_an_intervention_of_ones_own_is_registered_built_trained_and_written(llama: Any) -> None:
    assert intervention_types()["Shift"] is Shift
    graph = rl.InterventionGraph(rl.Edit("mine", at="blocks[1].output", intervention=Shift(start=2.0)))
    assert rl.InterventionGraph.from_yaml(graph.to_yaml()) == graph
    reft, batch = graph.bind(llama), batch_of((4, 3))
    added = rl.InterventionGraph(rl.Edit("add", at="blocks[1].output", intervention=rl.Add(2.0))).bind(llama)
    with torch.no_grad():
        assert_close(reft(**batch).logits, added(**batch).logits)
    reft(**batch).logits.sum().backward()
    assert reft.interventions["mine"].vector.grad.abs().max() > 0
    assert reft.interventions["mine"].formula == "h + vector"


def test_an_argument_that_is_not_kept_is_an_error_that_says_so() -> None:
    class Forgetful(rl.Intervention):
        def __init__(self, amount: float) -> None:
            super().__init__()

    with pytest.raises(InterventionError, match=r"takes 'amount' but does not keep it as self\.amount"):
        Forgetful(1.0).build(3)


def test_a_class_without_a_docstring_has_no_formula() -> None:
    class Silent(rl.Intervention):
        pass

    assert Silent().formula == ""


def test_an_intervention_without_forward_says_so() -> None:
    class Empty(rl.Intervention):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not say what forward does"):
        Empty()(torch.zeros(1, 2))
