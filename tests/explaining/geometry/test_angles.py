"""Angles: scipy's, planted ones, and p-values that mean what they say."""

import re

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import kstest

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.geometry.angles import cosines_at_random, principal_angles, span, subspace_angles
from reftlab.explaining.geometry.edit_angles import edit_angles
from reftlab.explaining.geometry.label_spans import METHODS, LabelSpans, leace_read
from tests.explaining.conftest import bound, loreft, orthonormal, set_directions

DRAWS = 200


def gaussian(count, deviations, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(deviations), generator=generator) * deviations


@pytest.mark.parametrize(("r", "s"), [(1, 1), (2, 5), (4, 3)])
def test_the_angles_are_scipys_for_any_bases(r, s):
    a, b = torch.randn(12, r), torch.randn(12, s)
    found = subspace_angles(a, b, draws=10)
    expected = np.sort(np.degrees(scipy.linalg.subspace_angles(a.numpy(), b.numpy())))
    np.testing.assert_allclose(found.angles, expected, atol=1e-3)
    assert found.overlap == pytest.approx((np.cos(np.radians(expected)) ** 2).mean(), abs=1e-5)
    assert found.dimensions == (r, s)


def test_random_subspaces_overlap_as_theory_says():
    found = cosines_at_random(span(torch.randn(30, 3)), 5, 2000, 0)
    # The mean squared cosine of a fixed direction and a random 5-dimensional subspace of 30 is 5/30.
    assert (found**2).mean() == pytest.approx(5 / 30, rel=0.03)


def test_a_planted_shared_direction_is_found():
    found = 0
    for seed in range(20):
        shared, a, b = orthonormal(3, seed, 24)
        one, two = torch.stack([shared, a]).T, torch.stack([shared + 0.2 * a, b]).T
        result = subspace_angles(one, two, draws=DRAWS, seed=seed)
        found += result.p_angle <= 0.01
        assert result.smallest < 1.0
    assert found == 20


def test_p_of_independent_subspaces_is_uniform():
    found = [
        subspace_angles(
            orthonormal(2, 2 * seed, 16).T, orthonormal(3, 2 * seed + 1, 16).T, draws=DRAWS, seed=seed
        )
        for seed in range(200)
    ]
    for values in ([one.p_angle for one in found], [one.p_overlap for one in found]):
        assert kstest(values, "uniform").pvalue > 0.01
        # Of 200 at 5%, 10 are expected; more than 20 happen once in a thousand.
        assert 2 <= sum(value <= 0.05 for value in values) <= 20


def test_directions_taken_from_data_are_close_by_chance_alone_which_the_data_null_knows():
    deviations = torch.cat([torch.tensor([6.0, 4.0]), torch.ones(22)])
    covariance = torch.diag(deviations**2)
    isotropic, data = [], []
    for seed in range(100):
        a, b = gaussian(2, deviations, 2 * seed).T, gaussian(2, deviations, 2 * seed + 1).T
        isotropic.append(subspace_angles(a, b, draws=100, seed=seed).p_angle)
        data.append(subspace_angles(a, b, null="data", covariance=covariance, draws=100, seed=seed).p_angle)
    assert np.mean(np.array(isotropic) <= 0.05) > 0.4
    assert np.mean(np.array(data) <= 0.05) <= 0.12
    assert kstest(data, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null": "labels"}, "null='labels'"),
        ({"null": "data"}, "needs covariance="),
        ({"covariance": torch.eye(4)}, "covariance= is for null='data'"),
        ({"null": "data", "covariance": torch.eye(3)}, r"covariance of shape \(3, 3\)"),
        ({"draws": 0}, "draws=0"),
        ({"a": torch.zeros(4, 1)}, "a of shape .* holds no direction"),
        ({"b": torch.full((4, 1), float("nan"))}, "b of shape .* holds NaN"),
        ({"b": torch.ones(5, 1)}, "a has vectors of 4 numbers and b of 5"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, users_call):
    given = {"a": torch.ones(4, 1), "b": torch.ones(4, 1), **options}
    with pytest.raises(DataError, match=message):
        subspace_angles(given.pop("a"), given.pop("b"), **given)


def test_dependent_columns_count_once_and_the_angles_show_themselves():
    a = torch.randn(8, 2)
    found = subspace_angles(torch.cat([a, a.sum(1, keepdim=True)], 1), a, draws=20)
    assert found.dimensions == (2, 2)
    assert found.angles == pytest.approx((0.0, 0.0), abs=1e-3)
    assert found.p_angle == 1 / 21
    assert list(found.to_frame()["number"]) == [1, 2]
    [axes] = found.plot().axes
    assert axes.get_ylabel() == "principal angle (degrees)"
    assert "p 0.048" in repr(found)
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize("classes", [2, 3])
def test_what_leace_reads_and_removes_is_what_the_library_erases_with(classes):
    labels = torch.arange(120) % classes
    vectors = torch.randn(120, 10) @ torch.randn(10, 10) + torch.randn(classes, 10)[labels]
    eraser = rl.Erase.fit(vectors, labels, constrain_cov_trace=False)
    own = span(torch.as_tensor(leace_read(vectors.double().numpy(), labels.numpy())))
    assert float(principal_angles(own, span(eraser.right.T)).max()) < 0.1
    means = torch.stack([vectors[labels == k].mean(0) for k in range(classes)])
    assert float(principal_angles(span((means[1:] - means[0]).T), span(eraser.left)).max()) < 0.1


def test_shuffled_labels_are_told_from_a_planted_direction_and_random_ones_are_not():
    deviations, planted = 1 + 3 * torch.rand(16), orthonormal(1, 3, 16)[0]
    rows, alarms = torch.arange(100), dict.fromkeys(METHODS, 0)
    own = span(planted[:, None])
    for seed in range(20):
        generator = np.random.default_rng(seed)
        labels, noise = generator.permutation(100) % 2, gaussian(100, deviations, seed)
        some = METHODS if seed < 2 else ("mean_difference", "leace")
        for signal in (0.0, 12.0):
            spans = LabelSpans.of(labels, 100, some if signal == 0 or seed < 2 else (), 39, seed)
            vectors = noise + signal * torch.as_tensor(labels)[:, None].float() * planted
            for fit in spans.fitted(vectors, rows).fits:
                angle = float(principal_angles(own, fit.basis)[0])
                random = [float(principal_angles(own, other)[0]) for other in fit.shuffled]
                p = (1 + sum(one <= angle for one in random)) / 40
                if signal:
                    assert angle < 30 or fit.method != "mean_difference"
                    assert p == 1 / 40
                else:
                    alarms[fit.method] += p <= 0.05
    assert max(alarms.values()) <= 4


def planted(model, tokenizer, direction):
    """A model in which the last token's embedding is along a direction as the label says, and an edit of it."""
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        for piece, sign in (("y", 1), ("n", -1)):
            table[tokenizer.convert_tokens_to_ids(piece)] = sign * 6 * direction
    options = {"at": "blocks[0].output", "positions": "last"}
    edits = [
        rl.Edit(name, **options, intervention=rl.LoReFT(rank=2)) for name in ("reads_it", "like_it", "other")
    ]
    reft = bound(model, tokenizer, *edits)
    for number, edit in enumerate(edits):
        read, write = orthonormal(2, 30 + number), orthonormal(2, 40 + number)
        if number < 2:
            read = torch.linalg.qr(torch.stack([direction, read[1]]).T).Q.T.contiguous()
        bias = torch.zeros(2)
        set_directions(reft.interventions[edit.name], write, torch.tensor([2.0, 1.0]), read, bias)
    return reft


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_an_edit_that_reads_the_labels_direction_is_found_by_every_method(family, byte_tokenizer, request):
    reft = planted(request.getfixturevalue(family), byte_tokenizer, orthonormal(1, 8)[0])
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (24, 5))
    labels = np.arange(24) % 2
    texts = ["".join(some) + "ny"[label] for some, label in zip(letters, labels, strict=True)]
    slow = family == "small_llama"
    methods, shuffles = (("lda", "logistic"), 19) if slow else (("mean_difference", "leace"), 100)
    found = edit_angles(
        reft, texts, labels, methods=methods, draws=1000, shuffles=shuffles, chat=False, progress=False
    )
    for method in methods:
        [line] = found.of("reads_it", "read", method)
        assert line.angles.p_angle == 1 / (1 + shuffles)
        assert line.angles.null == "labels"
        [other] = found.of("other", "read", method)
        assert other.angles.smallest > line.angles.smallest + 20
    shared = {
        line.angles.null: line
        for line in found.of("reads_it", "read", "edit")
        if line.against == "like_it, read"
    }
    assert set(shared) == {"isotropic", "data"}
    for line in shared.values():
        assert line.angles.smallest < 0.1
        assert line.angles.p_angle <= 0.01
        assert line.q <= 0.05
    assert found.vectors == dict.fromkeys(("reads_it", "like_it", "other"), 24)
    frame = found.to_frame()
    assert list(frame["edit"].unique()) == ["reads_it", "like_it", "other"]
    assert "q ≤ 0.05" in repr(found)
    close = sum(line.q <= 0.05 and line.kind != "own" for line in found.lines)
    assert found.sentence.startswith(
        f"Of {len(found.lines)} comparisons of subspaces, 3 are of an edit's own"
    )
    assert f"Of the other {len(found.lines) - 3}, " in found.sentence
    assert f", {close} have a smaller angle than random subspaces explain" in found.sentence
    assert re.search(r"read subspace of (reads_it and like_it|like_it and reads_it), read", found.sentence)
    assert len(found.plot("other").axes) == 2


def test_only_edits_of_one_site_are_compared_and_principal_components_are_the_sites_own(
    small_llama, byte_tokenizer
):
    reft = bound(
        small_llama.bfloat16(), byte_tokenizer, loreft("a", "blocks[0].output", 1),
        loreft("b", "blocks[1].output", 1), rl.Edit("c", at="blocks[1].output", intervention=rl.Add(1.0)),
    )  # fmt: skip
    texts = ["the sea", "a cat and a dog", "snow on a hill"]
    found = edit_angles(reft, texts, components=2, draws=50, chat=False, progress=False)
    assert {line.against for line in found.of("a", kind="edit")} == set()
    assert {line.against for line in found.of("b", "read", "edit")} == {"c, write"}
    assert not found.of("c", "read")
    seen = []
    with torch.no_grad(), reft.disabled("b", "c"):
        hook = small_llama.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out[0]))
        for text in texts:
            reft(torch.tensor([byte_tokenizer(text)["input_ids"]]))
        hook.remove()
    vectors = torch.cat(seen).float()
    axes = torch.linalg.svd(vectors - vectors.mean(0)).Vh[:2].T
    built = reft.interventions["b"]
    expected = scipy.linalg.subspace_angles(built.basis.weight.detach().numpy(), axes.numpy())
    [line] = found.of("b", "write", "pca")
    assert line.angles.smallest == pytest.approx(float(np.degrees(expected.min())), abs=1.0)


def test_labels_that_cannot_be_used_are_refused_or_noted(small_llama, byte_tokenizer, users_call):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[0].output", 1))
    options = {"draws": 10, "shuffles": 5, "chat": False, "progress": False}
    with pytest.raises(DataError, match=r"labels: .*2 vectors need one class each"):
        edit_angles(reft, ["a", "b"], [0, 1, 1], **options)
    with pytest.raises(DataError, match="components=0"):
        edit_angles(reft, ["a", "b"], components=0, **options)
    with pytest.raises(DataError, match="'svm' is none of"):
        edit_angles(reft, ["a", "b"], [0, 1], methods=["svm"], **options)
    few = edit_angles(reft, ["the sea", "b", "cc"], [0, 1, 1], **options)
    assert "class 0 has fewer than 2 examples" in few.note
    same = edit_angles(reft, ["aa"] * 4, [0, 1, 0, 1], methods=["mean_difference"], **options)
    assert "do not differ" in same.note
    assert not same.of("a", kind="mean_difference")
