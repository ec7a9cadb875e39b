"""What every intervention promises: subspaces row by row, half precision, and a config that survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reftlab import InterventionError
from reftlab import interventions as iv
from reftlab.graph import Edit, InterventionGraph, Read, Source
from tests.interventions.catalog import CATALOG, WIDTH, built, source_of

BASED = {name: made for name, made in CATALOG.items() if made.takes_subspace == "basis"}
FEATURED = {name: made for name, made in CATALOG.items() if made.takes_subspace == "features"}
WITHOUT = {name: made for name, made in CATALOG.items() if made.takes_subspace == "no"}
ALL = pytest.mark.parametrize("made", CATALOG.values(), ids=CATALOG)
ROWS = torch.tensor([0, 0, 1, 1, 2])


def edited(edit: Any, base: torch.Tensor, **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return edit.edited(base, source_of(edit, base), positions=torch.arange(len(base)), **extra)


@pytest.mark.parametrize("made", {**BASED, **FEATURED}.values(), ids={**BASED, **FEATURED})
def test_a_rows_subspace_touches_that_row_only(made: Any) -> None:
    edit, base = built(made), torch.randn(5, WIDTH)
    source, positions = source_of(edit, base), torch.arange(5)
    chosen = torch.rand(5, edit.directions) < 0.5
    chosen[0], chosen[1] = True, False
    together = edited(edit, base, subspace=chosen)
    with torch.no_grad():
        alone = [
            edit.edited(
                base[i : i + 1], None if source is None else source[i : i + 1],
                subspace=chosen[i : i + 1], positions=positions[i : i + 1],
            )
            for i in range(5)
        ]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    everything = edited(edit, base)
    torch.testing.assert_close(together[0], everything[0], rtol=1e-5, atol=1e-5)
    assert (together[2:] - everything[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("made", BASED.values(), ids=BASED)
def test_an_empty_subspace_leaves_the_vector_as_it_is(made: Any) -> None:
    if isinstance(made, iv.SAEEdit) and not made.error_term:
        pytest.skip("without the error term the vector is reconstructed in any case")
    edit, base = built(made), torch.randn(4, WIDTH)
    nothing = torch.zeros(4, edit.directions, dtype=torch.bool)
    assert torch.equal(edited(edit, base, subspace=nothing), base)


@pytest.mark.parametrize("kind", [iv.LoReFT, iv.NoReFT, iv.DiReFT, iv.NodiReFT, iv.ConsReFT, iv.LobiReFT])
def test_a_subspace_of_a_low_rank_edit_is_the_edit_of_those_rows_alone(kind: Any) -> None:
    edit, base = built(kind(3)), torch.randn(4, WIDTH)
    small = kind(2).build(WIDTH)
    keep = [0, 2]
    with torch.no_grad():
        if hasattr(edit, "linear"):
            small.linear.weight.copy_(edit.linear.weight[keep])
            small.linear.bias.copy_(edit.linear.bias[keep])
        else:
            small.target.copy_(edit.target[keep])
        if hasattr(edit, "basis"):
            small.basis.weight.copy_(edit.basis()[:, keep])
        else:
            small.projection.weight.copy_(edit.projection.weight[keep])
    chosen = torch.tensor([True, False, True]).expand(4, 3)
    torch.testing.assert_close(edited(edit, base, subspace=chosen), edited(small, base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("made", FEATURED.values(), ids=FEATURED)
def test_features_outside_the_choice_stay_and_those_in_it_are_edited(made: Any) -> None:
    edit, base = built(made), torch.randn(3, WIDTH)
    chosen = torch.rand(3, WIDTH) < 0.5
    whole, part = edited(edit, base), edited(edit, base, subspace=chosen)
    assert torch.equal(part[chosen], whole[chosen])
    assert torch.equal(part[~chosen], base[~chosen])


@pytest.mark.usefixtures("users_call")
def test_a_subspace_that_does_not_fit_is_refused() -> None:
    edit, base = iv.LoReFT(3).build(WIDTH), torch.randn(2, WIDTH)
    for wrong in (torch.ones(2, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(InterventionError, match=r"LoReFT\(rank=3\) takes a bool tensor .* \(2, 3\)"):
            edit.edited(base, subspace=wrong)
    with pytest.raises(InterventionError, match=r"numbered 0 to 2"):
        edit.edited(base, subspace=[0, 5])


@pytest.mark.parametrize("made", WITHOUT.values(), ids=WITHOUT)
def test_an_edit_without_directions_refuses_a_subspace(made: Any) -> None:
    edit = built(made)
    assert edit.directions is None
    with pytest.raises(InterventionError, match=f"{type(made).__name__} has no directions"):
        edited(edit, torch.randn(2, WIDTH), subspace=torch.ones(2, WIDTH, dtype=torch.bool))


def test_directions_are_counted() -> None:
    counts = {
        iv.LoReFT(3): 3, iv.RotatedSwap(2): 2, iv.RotatedSwap(): WIDTH, iv.BoundlessSwap(): WIDTH, iv.Swap(): WIDTH,
        iv.MaskedSwap(): WIDTH, iv.Gated(iv.LoReFT(2)): 2, iv.Gated(iv.Scale(2.0)): WIDTH, iv.Adapter(2): None,
    }  # fmt: skip
    for made, count in counts.items():
        assert made.build(WIDTH).directions == count
    assert iv.LoReFT(3).directions == 3
    assert iv.Swap().directions is None


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_worked_out_in_float32_and_cast_back(made: Any, dtype: torch.dtype) -> None:
    edit, base = built(made), torch.randn(5, WIDTH).to(dtype)
    got = edited(edit, base, rows=ROWS)
    assert got.dtype == dtype
    expected = edited(edit, base.float(), rows=ROWS)
    if source_of(edit, base) is None:
        assert torch.equal(got, expected.to(dtype))
    else:
        torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=5e-2)


@ALL
def test_an_edit_leaves_its_inputs_alone_and_a_row_to_itself(made: Any) -> None:
    edit, base = built(made), torch.randn(5, WIDTH)
    before = base.clone()
    whole = edited(edit, base, rows=ROWS)
    assert torch.equal(base, before)
    changed = base.clone()
    changed[4] += 1.0
    assert torch.equal(edited(edit, changed, rows=ROWS)[:4], whole[:4])


@ALL
def test_no_vectors_give_no_vectors(made: Any) -> None:
    edit = built(made)
    assert edited(edit, torch.zeros(0, WIDTH), rows=torch.zeros(0, dtype=torch.long)).shape == (0, WIDTH)


@ALL
def test_building_again_from_the_config_gives_the_same_edit(made: Any) -> None:
    edit, base = built(made), torch.randn(5, WIDTH)
    again = type(made)(**edit.config).build(WIDTH)
    again.load_state_dict(edit.state_dict())
    assert torch.equal(edited(again, base, rows=ROWS), edited(edit, base, rows=ROWS))
    assert again.describe() == made.describe()
    assert made.width is None
    assert not list(made.parameters())


@ALL
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_what_is_written_to_a_graph_is_read_again(made: Any, form: str) -> None:
    source = None if source_of(built(made), torch.zeros(1, WIDTH)) is None else Read(run="other")
    nodes = [Source("other")] if source is not None else []
    graph = InterventionGraph(*nodes, Edit("mine", at="blocks[0].output", intervention=made, source=source))
    again = getattr(InterventionGraph, f"from_{form}")(getattr(graph, f"to_{form}")())
    assert again == graph
    edit, base = built(made), torch.randn(5, WIDTH)
    read = again.edits[0].intervention.build(WIDTH)
    read.load_state_dict(edit.state_dict())
    assert torch.equal(edited(read, base, rows=ROWS), edited(edit, base, rows=ROWS))


@ALL
def test_gradients_are_those_of_finite_differences(made: Any) -> None:
    edit, base = built(made).eval(), torch.randn(4, WIDTH)
    # These have kinks, which a small step passes by; between them they are straight lines.
    straight = isinstance(made, iv.SparseAutoencoder | iv.SAEEdit | iv.Clamp)
    source, weights, step = source_of(edit, base), torch.randn(4, WIDTH), 1e-3 if straight else 1e-2
    base.requires_grad_()

    def measure(h: torch.Tensor) -> torch.Tensor:
        return (
            edit.edited(h, source, rows=torch.tensor([0, 0, 0, 1]), positions=torch.arange(4)) * weights
        ).sum()

    total = measure(base)
    if not total.requires_grad:
        assert isinstance(made, iv.Swap | iv.Zero | iv.Mean)
        return
    (gradient,) = torch.autograd.grad(total, base, allow_unused=True)
    gradient = torch.zeros_like(base) if gradient is None else gradient
    for direction in torch.randn(3, 4, WIDTH):
        with torch.no_grad():
            slope = (measure(base + step * direction) - measure(base - step * direction)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-2, atol=5e-2)


def test_an_edit_of_ones_own_with_a_basis_is_handed_its_subspace() -> None:
    class Push(iv.Intervention):
        """Push along chosen axes.

        h + e
        """

        takes_subspace = "basis"

        def forward(self, base: Any, source: Any = None, *, subspace: Any = None) -> Any:
            return base + 1.0 if subspace is None else base + subspace.float()

    chosen = torch.tensor([[True, False], [False, False]])
    got = Push().build(2).edited(torch.zeros(2, 2), subspace=chosen)
    assert got.tolist() == [[1.0, 0.0], [0.0, 0.0]]
