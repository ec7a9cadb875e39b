"""Sizes and principal axes, and which vectors they are of."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import reftlab as rl
from reftlab.explaining import EditVectors
from reftlab.explaining.geometry.record import record
from reftlab.explaining.geometry.vectors import common_axes, sizes_of
from reftlab.measuring.inputs import accepted
from reftlab.training.collate import Collator
from reftlab.training.data import as_examples, encode
from tests.explaining.conftest import PAIRS, WIDTH, bound, loreft


def made(base: torch.Tensor, delta: torch.Tensor) -> EditVectors:
    rows = torch.arange(len(base))
    return EditVectors("e", base, delta, None, rows, torch.zeros_like(rows))


def recorded(reft, tokenizer):
    batch = Collator.of(tokenizer, "right")(encode(tokenizer, as_examples(PAIRS)))
    return record(reft, [batch], accepted(reft.model)), batch


def test_sizes_are_those_computed_by_hand():
    base = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    delta = torch.tensor([[0.0, 5.0], [2.0, 0.0]])
    sizes = sizes_of(made(base, delta))
    torch.testing.assert_close(sizes.relative, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(sizes.absolute, torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(sizes.cosine, torch.tensor([45 / (5 * 90**0.5), 0.5**0.5]))
    assert sizes.median == pytest.approx(1.0)
    assert list(sizes.to_frame()["example"]) == [0, 1]


def test_principal_axes_agree_with_scikit_learn():
    base = torch.randn(15, 10) * torch.linspace(4, 0.1, 10)
    vectors = made(base, torch.randn(10).expand(15, -1) * torch.rand(15, 1))
    found = common_axes(vectors)
    union = torch.cat([vectors.base, vectors.after]).numpy()
    oracle = PCA(n_components=2).fit(union)
    np.testing.assert_allclose(found.explained.numpy(), oracle.explained_variance_ratio_, rtol=1e-4)
    points = np.concatenate([found.before.numpy(), found.after.numpy()])
    expected = oracle.transform(union)
    signs = np.sign((points * expected).sum(0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-4)
    assert bool(((found.after - found.before).mean(0) >= 0).all())


def test_one_vector_has_principal_axes_too():
    found = common_axes(made(torch.ones(1, 4), torch.ones(1, 4)))
    assert found.before.shape == (1, 2)
    assert len(found.to_frame()) == 2


def test_recorded_vectors_are_those_that_hooks_see(small_llama, byte_tokenizer):
    """Before: what enters the site with the other edits in force; after: what leaves the edit."""
    reft = bound(
        small_llama, byte_tokenizer,
        loreft("first", "blocks[0].output"), loreft("one", strength=0.5), loreft("two"),
    )  # fmt: skip
    found, batch = recorded(reft, byte_tokenizer)
    last = ((batch["labels"] == -100) & (batch["attention_mask"] == 1)).sum(1) - 1

    def output(*disabled):
        with torch.no_grad(), reft.disabled(*disabled):
            vectors = reft.read("blocks[1].output @ last", **batch).flat("blocks[1].output @ last").vectors
        return vectors

    torch.testing.assert_close(found.vectors["one"].base, output("one", "two"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.vectors["one"].after, output("two"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.vectors["two"].base, output("two"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.vectors["two"].after, _all(reft, batch), atol=1e-5, rtol=1e-5)
    assert found.vectors["two"].rows.tolist() == [0, 1, 2]
    assert found.vectors["two"].positions.tolist() == last.tolist()


def _all(reft, batch):
    with torch.no_grad():
        return reft.read("blocks[1].output @ last", **batch).flat("blocks[1].output @ last").vectors


def test_the_centre_is_the_mean_of_what_enters_the_final_norm(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())
    found, batch = recorded(reft, byte_tokenizer)
    seen = []
    handle = small_llama.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        reft(**batch)
    handle.remove()
    rows, positions = found.vectors["shift"].rows, found.vectors["shift"].positions
    torch.testing.assert_close(found.centres["shift"], seen[0][rows, positions].mean(0), atol=1e-5, rtol=1e-5)


def test_edits_of_heads_are_recorded_in_their_own_width(small_llama, byte_tokenizer):
    edit = rl.Edit("heads", at="blocks[1].attn.heads", positions="all", heads=[1, 3], intervention=rl.Zero())
    found, batch = recorded(bound(small_llama, byte_tokenizer, edit), byte_tokenizer)
    prompt_tokens = int(batch["attention_mask"].sum() - (batch["labels"] != -100).sum())
    assert found.vectors["heads"].base.shape == (prompt_tokens, WIDTH // 2)
