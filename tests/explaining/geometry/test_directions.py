"""Read and write directions: planted ones come back."""

import pytest
import torch
from torch import nn

import reftlab as rl
from reftlab.explaining import explain
from reftlab.explaining.geometry.directions import find_directions, thin_svd
from reftlab.explaining.geometry.vectors import EditVectors
from tests.explaining.conftest import PAIRS, WIDTH, bound, orthonormal, set_directions


def vectors_of(built: nn.Module, base: torch.Tensor, strength: float = 1.0, source=None) -> EditVectors:
    with torch.no_grad():
        delta = strength * (built(base, source) - base)
    rows = torch.arange(len(base))
    mean = None if source is None else source.mean(0)
    return EditVectors("e", base, delta, mean, rows, torch.zeros_like(rows))


def planted(bias: torch.Tensor | None = None) -> tuple[rl.LoReFT, torch.Tensor, torch.Tensor, torch.Tensor]:
    built = rl.LoReFT(rank=3).build(WIDTH)
    write, read, gains = orthonormal(3, 1), orthonormal(3, 2), torch.tensor([5.0, 2.0, 0.5])
    set_directions(built, write, gains, read, torch.zeros(3) if bias is None else bias)
    return built, write, gains, read


def test_a_loreft_set_by_hand_gives_back_its_directions_and_gains():
    built, write, gains, read = planted()
    found = find_directions(built, 1.0, vectors_of(built, torch.randn(20, WIDTH)))
    assert found.basis == "svd"
    assert found.labels == ("1", "2", "3")
    assert found.rank == 3
    torch.testing.assert_close(found.gain, gains, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((found.write * write).sum(1).abs(), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close((found.read * read).sum(1).abs(), torch.ones(3), atol=1e-4, rtol=0)
    # u and v are turned together, so that their product is the planted one.
    torch.testing.assert_close(
        found.write[0].outer(found.read[0]), write[0].outer(read[0]), atol=1e-4, rtol=0
    )


def test_the_amounts_are_the_gain_times_what_is_read_plus_the_bias():
    built, _, gains, read = planted(torch.tensor([3.0, -4.0, 1.0]))
    base = torch.randn(20, WIDTH)
    found = find_directions(built, 1.0, vectors_of(built, base))
    by_hand = gains * (base @ read.T) + torch.tensor([3.0, -4.0, 1.0])
    by_hand = by_hand * torch.where(by_hand.mean(0) < 0, -1.0, 1.0)
    torch.testing.assert_close(found.mean, by_hand.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.std, by_hand.std(0, correction=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.rms, by_hand.square().mean(0).sqrt(), atol=1e-4, rtol=1e-4)
    assert bool((found.mean >= 0).all())
    assert found.explained == pytest.approx(1.0, abs=1e-5)
    assert float(found.share.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_directions_put_the_edit_together_again():
    built = rl.NoReFT(rank=4).build(WIDTH)
    vectors = vectors_of(built, torch.randn(9, WIDTH))
    found = find_directions(built, 1.0, vectors)
    torch.testing.assert_close(found.amounts @ found.write, vectors.delta, atol=1e-4, rtol=1e-4)


def test_strength_multiplies_gain_and_amount():
    built, *_ = planted(torch.ones(3))
    base = torch.randn(20, WIDTH)
    one = find_directions(built, 1.0, vectors_of(built, base))
    half = find_directions(built, 0.5, vectors_of(built, base, 0.5))
    torch.testing.assert_close(half.gain, 0.5 * one.gain)
    torch.testing.assert_close(half.mean, 0.5 * one.mean, atol=1e-5, rtol=1e-4)


def test_an_added_vector_is_one_constant_direction():
    value = torch.randn(WIDTH)
    built = rl.Add(value).build(WIDTH)
    found = find_directions(built, 1.0, vectors_of(built, torch.randn(5, WIDTH)))
    assert found.labels == ("constant",)
    torch.testing.assert_close(found.write[0], value / value.norm(), atol=1e-5, rtol=1e-5)
    assert float(found.mean[0]) == pytest.approx(float(value.norm()), rel=1e-5)
    assert float(found.std[0]) < 1e-4
    assert float(found.gain[0]) == 0.0


def test_a_constant_outside_of_the_write_directions_is_a_direction_of_its_own():
    class Both(rl.Intervention):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v, self.c = orthonormal(3, 5)

        def forward(self, base, source=None):
            return base + (base @ self.v)[:, None] * self.u + 2.0 * self.c

    built = Both().build(WIDTH)
    found = find_directions(built, 1.0, vectors_of(built, torch.randn(30, WIDTH)))
    assert found.labels == ("1", "constant")
    assert float((found.write[1] @ built.c).abs()) == pytest.approx(1.0, abs=1e-4)
    assert float(found.mean[1]) == pytest.approx(2.0, abs=1e-4)


def test_an_activation_is_linearised_at_the_mean_and_its_jacobian_is_right():
    built = rl.LoReFT(rank=3, activation="tanh").build(WIDTH)
    base = 0.1 * torch.randn(12, WIDTH)
    found = find_directions(built, 1.0, vectors_of(built, base))
    assert found.basis == "linearised"
    jacobian = torch.func.jacrev(lambda h: built(h[None])[0] - h)(base.mean(0)).detach()
    rebuilt = (found.write[:3].T * found.gain[:3]) @ found.read[:3]
    torch.testing.assert_close(rebuilt, jacobian, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "intervention", [rl.Zero(), rl.Scale(0.5), rl.Mean(1.0), rl.Clamp(-0.5, 0.5), rl.Noise(1.0)]
)
def test_edits_of_all_features_are_described_by_what_they_wrote(intervention):
    built = intervention.build(WIDTH)
    base = torch.randn(6, WIDTH) + 3 * orthonormal(1, 7)
    vectors = vectors_of(built, base)
    found = find_directions(built, 1.0, vectors)
    assert found.basis == "written"
    assert 1 <= len(found) <= 4
    first = torch.linalg.svd(vectors.delta).Vh[0]
    assert float((found.write[0] @ first).abs()) == pytest.approx(1.0, abs=1e-3)


def test_a_swap_is_described_by_what_it_wrote():
    source = torch.randn(6, WIDTH) + 20 * orthonormal(1, 8)
    built = rl.Swap().build(WIDTH)
    found = find_directions(built, 1.0, vectors_of(built, torch.randn(6, WIDTH), source=source))
    assert found.basis == "written"
    assert float((found.write[0] @ orthonormal(1, 8)[0]).abs()) > 0.9


def test_a_function_that_autograd_cannot_follow_is_still_described():
    built = rl.Function(lambda h: h.detach() + 1.0).build(WIDTH)
    found = find_directions(built, 1.0, vectors_of(built, torch.randn(4, WIDTH)))
    assert float(found.mean[0]) == pytest.approx(WIDTH**0.5, rel=1e-4)
    assert found.explained == pytest.approx(1.0, abs=1e-4)


def test_an_edit_that_writes_nothing_has_no_directions():
    built = rl.Add(0.0).build(WIDTH)
    assert len(find_directions(built, 1.0, vectors_of(built, torch.randn(4, WIDTH)))) == 0


def test_the_thin_svd_agrees_with_the_full_one():
    write, read = torch.randn(40, 5), torch.randn(5, 40)
    found = thin_svd(write, read)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(write @ read)[:5], rtol=1e-4, atol=1e-4)
    rebuilt = (found.write.T * found.values) @ found.read
    torch.testing.assert_close(rebuilt, write @ read, rtol=1e-4, atol=1e-4)


def test_the_frame_has_one_line_a_direction():
    built, *_ = planted()
    found = find_directions(built, 1.0, vectors_of(built, torch.randn(5, WIDTH)))
    assert list(found.to_frame()["direction"]) == ["1", "2", "3"]
    assert "gains" in repr(found)
    assert found.plot().axes
    assert "<table" in found._repr_html_()


def test_an_edit_confined_to_a_subspace_is_described_by_what_it_does_there(small_llama, byte_tokenizer):
    edit = rl.Edit(
        "one", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=3), subspace=[1]
    )
    reft = bound(small_llama, byte_tokenizer, edit)
    built, write, gains, read = planted(torch.tensor([3.0, -4.0, 1.0]))
    reft.interventions["one"].load_state_dict(built.state_dict())
    [found] = explain(reft, PAIRS, max_new_tokens=0, only=[], progress=False, max_edits=0).edits
    directions, base = found.directions, found.vectors.base
    assert directions.rank == 1
    assert directions.gain[0] == pytest.approx(float(gains[1]), rel=1e-3)
    assert abs(float(directions.write[0] @ write[1])) == pytest.approx(1.0, abs=1e-3)
    amounts = gains[1] * (base @ read[1]) - 4.0
    sign = torch.sign(amounts.mean())
    torch.testing.assert_close(directions.amounts[:, 0], sign * amounts, atol=1e-3, rtol=1e-3)
