"""What explanations keep of an effect, where the truth is planted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.evidence import faithfulness as work
from reftlab.explaining.evidence.faithfulness import ALL_EDITS
from reftlab.explaining.subject import Subject
from reftlab.measuring import behaviour_of, share_kept
from tests.explaining.conftest import WIDTH, bound, loreft, orthonormal, set_directions
from tests.oracle import randomise

LETTERS = "abcdefghijklmnop"
METRIC = rl.logit_diff("z", "q")


def faithfulness(reft: Any, examples: Any, metric: Any = None, **options: Any) -> Any:
    return work.faithfulness(reft, examples, metric, chat=False, progress=False, **options)


def texts(count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices(LETTERS, k=chosen.randint(3, 9))) for _ in range(count)]


def difference(model: Any, tokenizer: Any) -> torch.Tensor:
    """The unit vector that the logit difference reads at the output of the final norm."""
    weight = model.get_output_embeddings().weight.detach()
    z, q = tokenizer.convert_tokens_to_ids(["z", "q"])
    return torch.nn.functional.normalize(weight[z] - weight[q], dim=0)


def planted(model: Any, tokenizer: Any, amounts: list[float], gain: float) -> rl.BoundModel:
    """An edit of rank 4 just before the unembedding: its first direction is the metric's own, the other
    three are at right angles to it, so that they do nothing."""
    reft = bound(model, tokenizer, loreft(at="final_norm.output", rank=4))
    useful = difference(model, tokenizer)
    basis = torch.linalg.qr(torch.cat([useful[:, None], orthonormal(3, 5).T], dim=1)).Q.T
    write = basis * torch.sign(basis @ useful)[:1, None]
    gains = gain * torch.tensor([1.0, 0.7, 0.5, 0.3])
    set_directions(reft.interventions["shift"], write, gains, orthonormal(4, 9), torch.tensor(amounts))
    return reft


def kept(found: Any, edits: str = ALL_EDITS) -> dict[str, Any]:
    return {one.label: one for one in found.of(edits)}


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_one_useful_direction_of_four_keeps_everything_and_random_ones_a_quarter(
    family, byte_tokenizer, request
):
    reft = planted(request.getfixturevalue(family), byte_tokenizer, [3.0, 2.0, 2.0, 2.0], 0.01)
    found = faithfulness(reft, texts(12), METRIC, draws=6)
    lines = kept(found)
    assert lines["directions 1"].share.value == pytest.approx(1.0, abs=1e-3)
    assert lines["directions 1"].agreement == pytest.approx(1.0, abs=1e-3)
    assert sum(lines["directions 1"].controls) / 6 < 0.6
    assert all(share < 0.9 for share in lines["linearised"].controls)
    head = found.headline
    assert head.reached
    assert head.held_out
    assert (head.chosen_on, head.reported_on) == (6, 6)
    # Written for the constant part alone, which takes half as many numbers.
    assert head.what == "constant"
    assert "Always adding the mean change" in found.sentence


def test_a_direction_that_follows_the_input_is_the_headline_where_it_alone_matters(
    small_llama, byte_tokenizer
):
    reft = planted(small_llama, byte_tokenizer, [0.0, 0.0, 0.0, 0.0], 3.0)
    prompts = texts(24)
    amounts = written(reft, prompts) @ difference(small_llama, byte_tokenizer)
    with torch.no_grad():
        reft.interventions["shift"].linear.bias[0] -= amounts.median()
    amounts = written(reft, prompts) @ difference(small_llama, byte_tokenizer)
    right = ["z" if amount > 0 else "q" for amount in amounts.tolist()]
    wrong = ["q" if amount > 0 else "z" for amount in amounts.tolist()]
    found = faithfulness(reft, prompts, rl.logit_diff(right, wrong), draws=3)
    lines = kept(found)
    assert abs(lines["constant"].share.value) < 0.3
    assert abs(lines["steering"].share.value) < 0.9
    assert lines["directions 1"].share.value == pytest.approx(1.0, abs=1e-3)
    assert lines["reading 1"].share.value == pytest.approx(1.0, abs=1e-3)
    assert lines["linearised"].share.value == pytest.approx(1.0, abs=1e-3)
    assert (found.headline.what, found.headline.k) == ("directions", 1)
    assert found.sentence.startswith("What each edit writes along its one main direction keeps 1.00")


def written(reft: rl.BoundModel, prompts: list[str]) -> torch.Tensor:
    """What the edit adds to the last token of each prompt, one prompt at a time."""
    seen: list[torch.Tensor] = []
    with torch.no_grad(), reft.watching(lambda edit, tokens, base, new, source: seen.append(new - base)):
        for prompt in prompts:
            reft(**reft.tokenizer(prompt, return_tensors="pt"))
    return torch.cat(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_an_edit_that_adds_one_vector_is_its_constant_part(family, dtype, byte_tokenizer, request):
    model = request.getfixturevalue(family).to(dtype)
    push = 6 * difference(model.float(), byte_tokenizer) + orthonormal(1, 2)[0]
    model.to(dtype)
    edit = rl.Edit("push", at="blocks[1].output", positions="all", intervention=rl.Add(push), strength=0.5)
    found = faithfulness(bound(model, byte_tokenizer, edit), texts(8), METRIC, draws=1)
    lines = kept(found)
    for name in ("constant", "directions 1", "linearised", "steering"):
        assert lines[name].share.value == pytest.approx(1.0, abs=1e-4 if dtype == torch.float32 else 0.05)
    assert found.headline.what == "constant"
    assert not any(label.startswith("reading") for label in lines)


@pytest.mark.parametrize(
    "intervention", [rl.LoReFT(rank=3), rl.DiReFT(rank=2), rl.Scale(1.3), rl.Zero(), rl.ConsReFT(rank=2)]
)
def test_every_affine_edit_is_its_linear_form(intervention, small_llama, byte_tokenizer):
    edit = rl.Edit(
        "e", at="blocks[0].output", positions="first+last", intervention=intervention, strength=0.7
    )
    reft = bound(small_llama, byte_tokenizer, edit)
    randomise(reft)
    found = faithfulness(reft, texts(9), draws=0)
    line = kept(found)["linearised"]
    assert line.share.value == pytest.approx(1.0, abs=1e-3)
    assert line.agreement == pytest.approx(1.0, abs=1e-3)
    assert line.controls == ()


def by_hand(model: Any, tokenizer: Any, prompts: list[str], module: Any, added: Any) -> torch.Tensor:
    """Log-probabilities of the next token after each prompt alone, `(example, vocab)`, with
    `added(number, h)` put on the last token's vector by a plain torch hook."""
    found = []
    for number, prompt in enumerate(prompts):

        def hook(_module, _args, output, number=number):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, -1] += added(number, hidden[0, -1])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        handle.remove()
        found.append(logits.log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_values_are_those_of_plain_hooks_that_add_what_the_explanation_says(family, byte_tokenizer, request):
    model, prompts = request.getfixturevalue(family), texts(7, seed=4)
    reft = bound(model, byte_tokenizer, loreft(at="blocks[0].output", rank=3))
    randomise(reft)
    built = reft.interventions["shift"]
    # With as many parts as examples, each is measured with what was fitted on all others.
    found = faithfulness(reft, prompts, folds=len(prompts), draws=0)
    lines = kept(found)
    blocks = model.model.layers if family == "small_llama" else model.transformer.h
    deltas = written(reft, prompts)
    others = [torch.cat([deltas[:n], deltas[n + 1 :]]) for n in range(len(prompts))]

    with torch.no_grad():
        offset = built(torch.zeros(1, WIDTH))[0]
        matrix = (built(torch.eye(WIDTH)) - offset - torch.eye(WIDTH)).T
    full = by_hand(model, byte_tokenizer, prompts, blocks[0], lambda n, h: matrix @ h + offset)

    def values(added):
        found = by_hand(model, byte_tokenizer, prompts, blocks[0], added)
        return (full.exp() * (full - found)).sum(-1)

    torch.testing.assert_close(
        lines["constant"].values, values(lambda n, h: others[n].mean(0)), atol=2e-4, rtol=1e-3
    )

    def steering(n, h):
        mean = others[n].mean(0)
        return mean / mean.norm() * others[n].square().sum(1).mean().sqrt()

    torch.testing.assert_close(lines["steering"].values, values(steering), atol=2e-4, rtol=1e-3)
    left = torch.linalg.svd(matrix.double()).U[:, :3].float()

    def along(n, h):
        most = (others[n] @ left).square().mean(0).topk(2).indices
        delta = matrix @ h + offset
        return left[:, most] @ (left[:, most].T @ delta)

    outside = offset - left @ (left.T @ offset)
    assert float(outside.norm()) < 1e-4
    torch.testing.assert_close(lines["directions 2"].values, values(along), atol=2e-4, rtol=1e-3)
    bare = values(lambda n, h: torch.zeros(WIDTH)).mean()
    share = (lines["constant"].values.mean() - bare) / (0 - bare)
    assert lines["constant"].share.value == pytest.approx(float(share), rel=1e-3)


class Opposed(rl.Intervention):
    """Adds a vector to the first token of a text and takes it from every other."""

    counts_positions = True

    def __init__(self, vector: torch.Tensor) -> None:
        super().__init__()
        self.vector = vector

    def forward(self, base: Any, source: Any = None, positions: Any = None) -> torch.Tensor:
        return base + torch.where(positions == 0, 1.0, -1.0)[:, None] * self.vector


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_an_edit_that_adds_another_constant_at_each_token_is_its_mean_per_position(
    family, byte_tokenizer, request
):
    reft = bound(
        request.getfixturevalue(family), byte_tokenizer,
        rl.Edit("e", at="blocks[0].output", positions="first+last", intervention=Opposed(5 * orthonormal(1, 2)[0])),
    )  # fmt: skip
    found = faithfulness(reft, texts(12), draws=5)
    lines = kept(found)
    own = lines["mean per position"]
    assert own.share.value == pytest.approx(1.0, abs=1e-3)
    assert own.agreement == pytest.approx(1.0, abs=1e-3)
    assert own.numbers == 2 * WIDTH
    assert own.control == "per position"
    assert max(own.controls) < 0.9
    # The two cancel in the mean over both.
    assert lines["constant"].share.value == pytest.approx(0.0, abs=1e-3)
    assert found.headline.what == "mean per position"
    assert "each token's own mean change" in found.sentence
    assert "depends on which token it is, hardly on the input" in found.sentence
    assert found.plot().axes


def test_means_per_position_are_fitted_on_other_examples_and_put_where_plain_hooks_put_them(
    small_llama, byte_tokenizer
):
    prompts = texts(6, seed=4)
    edit = rl.Edit(
        "e", at="blocks[0].output", positions="first+last", intervention=rl.LoReFT(rank=3), strength=0.5
    )
    reft = bound(small_llama, byte_tokenizer, edit)
    randomise(reft)
    lines = kept(faithfulness(reft, prompts, folds=len(prompts), draws=0))
    built, block = reft.interventions["e"], small_llama.model.layers[0]

    def run(prompt: str, change: Any) -> torch.Tensor:
        def hook(_module, _args, output):
            hidden = output.clone()
            for slot, column in enumerate((0, -1)):
                hidden[0, column] += change(slot, output[0, column])
            return hidden

        handle = block.register_forward_hook(hook)
        with torch.no_grad():
            logits = small_llama(**byte_tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        handle.remove()
        return logits.log_softmax(-1)

    deltas: list[list[torch.Tensor]] = []

    def noted(slot: int, h: torch.Tensor) -> torch.Tensor:
        deltas[-1].append(0.5 * (built(h[None])[0] - h))
        return deltas[-1][-1]

    full = []
    for prompt in prompts:
        deltas.append([])
        full.append(run(prompt, noted))
    for number, prompt in enumerate(prompts):
        others = torch.stack([torch.stack(two) for n, two in enumerate(deltas) if n != number]).mean(0)
        got = run(prompt, lambda slot, h, others=others: others[slot])
        expected = (full[number].exp() * (full[number] - got)).sum()
        assert float(lines["mean per position"].values[number]) == pytest.approx(float(expected), abs=2e-4)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_means_per_position_need_several_tokens_and_as_many_in_every_example(
    positions, small_llama, byte_tokenizer
):
    edit = rl.Edit("e", at="blocks[0].output", positions=positions, intervention=rl.LoReFT(rank=1))
    reft = bound(small_llama, byte_tokenizer, edit)
    randomise(reft)
    assert "mean per position" not in kept(faithfulness(reft, texts(6), draws=0))
    if positions == "all":
        alike = [text[:3] for text in texts(6)]
        assert kept(faithfulness(reft, alike, draws=0))["mean per position"].numbers == 3 * WIDTH


def test_where_one_mean_does_as_well_nothing_is_said_of_positions(small_llama, byte_tokenizer):
    push = rl.Add(5 * orthonormal(1, 2)[0])
    edit = rl.Edit("e", at="blocks[0].output", positions="first+last", intervention=push)
    found = faithfulness(bound(small_llama, byte_tokenizer, edit), texts(12), draws=0)
    assert kept(found)["mean per position"].share.value == pytest.approx(1.0, abs=1e-3)
    assert found.headline.what == "constant"
    assert "depends on which token" not in found.sentence


@pytest.mark.parametrize("runs", [8, 60, 400])
def test_few_runs_leave_explanations_out_and_never_the_random_ones_beside_the_others(
    runs, small_llama, byte_tokenizer
):
    reft = planted(small_llama, byte_tokenizer, [3.0, 2.0, 2.0, 2.0], 0.01)
    behaviour = behaviour_of(reft, texts(9), METRIC, chat=False)
    recorded = Subject.of("test", reft, texts(9), METRIC, chat=False).recorded
    found = work.faithful(reft, behaviour, recorded, draws=5, runs=runs, progress=False)
    lines = kept(found)
    assert {"constant", "directions 1"} <= set(lines)
    assert all(len(line.controls) >= 5 for line in lines.values())
    # Explanations that are held against the same random ones share their runs.
    drawn = {(line.control, line.controls) for line in lines.values()}
    made = len(lines) * found.folds + sum(len(controls) for _, controls in drawn)
    every = kept(faithfulness(reft, texts(9), METRIC, draws=0))
    if runs == 8:
        assert set(lines) == {"constant", "directions 1"}
    if runs == 60:
        assert 2 < len(lines) < len(every)
        assert "linearised" in lines
    if runs == 400:
        assert list(lines) == list(every)
        assert all(len(line.controls) == 20 for line in lines.values())
    assert ("were not tried" in found.note) == (len(lines) < len(every))
    assert made <= max(runs, 14)


def test_answers_are_measured_and_each_edit_is_replaced_alone_too(small_gpt2, byte_tokenizer):
    useful = difference(small_gpt2, byte_tokenizer)
    strong = rl.Edit("strong", at="final_norm.output", positions="all", intervention=rl.Add(8 * useful))
    idle = rl.Edit(
        "idle", at="final_norm.output", positions="first", intervention=rl.Add(orthonormal(1, 3)[0])
    )
    reft = bound(small_gpt2, byte_tokenizer, strong, idle)
    found = faithfulness(reft, [(text, "z") for text in texts(6)], draws=2)
    assert found.behaviour == "answer loss"
    assert found.effect.value < 0
    assert kept(found)["constant"].share.value == pytest.approx(1.0, abs=1e-4)
    assert kept(found, "strong")["constant"].share.value == pytest.approx(1.0, abs=1e-4)
    assert not found.of("idle")
    assert "'idle' was not replaced alone" in found.note
    assert not found.headline.held_out
    assert "Chosen and measured on the same 6 examples" in found.sentence
    few = faithfulness(reft, [(text, "z") for text in texts(6)], max_edits=1, draws=0)
    assert {one.edits for one in few.kept} == {ALL_EDITS}
    assert "all at once only" in few.note


def test_where_edits_do_nothing_there_is_nothing_to_explain(small_llama, byte_tokenizer):
    reft = planted(small_llama, byte_tokenizer, [0.0, 2.0, 2.0, 2.0], 0.0)
    found = faithfulness(reft, texts(9), METRIC)
    assert found.headline is None
    assert found.kept == ()
    assert found.sentence.startswith("There is no effect to explain: over 9 examples")
    assert found.plot().axes
    assert "no effect to explain" in found._repr_html_()
    assert len(found.to_frame()) == 0


def test_random_right_answers_are_seldom_taken_for_an_effect(small_llama, byte_tokenizer):
    """With right and wrong answers drawn at random, the edit helps and harms by chance alone."""
    reft = bound(small_llama, byte_tokenizer, loreft(at="final_norm.output", rank=2))
    randomise(reft)
    prompts, claimed = texts(16), 0
    recorded = Subject.of("test", reft, prompts, METRIC, chat=False).recorded
    for seed in range(20):
        drawn = random.Random(seed)
        right = [drawn.choice("zq") for _ in prompts]
        metric = rl.logit_diff(right, ["z" if letter == "q" else "q" for letter in right])
        behaviour = behaviour_of(reft, prompts, metric, chat=False)
        found = work.faithful(reft, behaviour, recorded, top=1, draws=0, folds=1, progress=False)
        claimed += found.headline is not None
    assert claimed <= 4


def test_random_explanations_seldom_pass_for_the_edit(small_llama, byte_tokenizer):
    """A random direction has some effect of its own on all examples, so that it is the share it keeps that
    has to be small, and the range over draws that has to be shown; see the closing table for the counts."""
    reft = planted(small_llama, byte_tokenizer, [3.0, 0.5, 0.5, 0.5], 0.01)
    prompts = texts(8)
    line = kept(faithfulness(reft, prompts, METRIC, top=1, draws=20, folds=1))["linearised"]
    plain = behaviour_of(reft, prompts, METRIC, chat=False)
    shares = [share_kept(values, plain.bare, plain.full) for values in line.control_values]
    assert line.share.value == pytest.approx(1.0, abs=1e-3)
    assert line.controls == pytest.approx([one.value for one in shares], abs=1e-5)
    assert sum(one.value >= 0.9 for one in shares) == 0
    above = sum(one.low > 0 for one in shares)
    assert 3 <= above <= 17


def test_the_headline_is_measured_on_other_examples_than_it_was_chosen_on(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft(at="blocks[0].output", rank=3))
    randomise(reft)
    prompts = texts(16)
    found = faithfulness(reft, prompts, draws=1, enough=0.7)
    head = found.headline
    (line,) = [one for one in found.of() if (one.what, one.k) == (head.what, head.k)]
    # Of the two halves, which the seed decides, one gives the headline's share.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    half = order[8:]
    bare = kept_divergence(reft, prompts)
    expected = line.values[half].sum() / bare[half].sum()
    assert head.share.value == pytest.approx(1 - float(expected), abs=1e-3)


def kept_divergence(reft: rl.BoundModel, prompts: list[str]) -> torch.Tensor:
    """KL(edited ‖ bare) of the next token, one prompt at a time."""
    found = []
    for prompt in prompts:
        inputs = reft.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            edited, bare = (one(**inputs).logits[0, -1].log_softmax(-1) for one in (reft, reft.model))
        found.append((edited.exp() * (edited - bare)).sum())
    return torch.stack(found)


def test_a_budget_leaves_controls_out_before_explanations_and_says_so(small_llama, byte_tokenizer):
    reft = planted(small_llama, byte_tokenizer, [3.0, 2.0, 2.0, 2.0], 0.01)
    found = faithfulness(reft, texts(9), METRIC, budget=1e-9, folds=1)
    assert [one.label for one in found.kept] == ["constant"]
    assert "1 runs were made" in found.note
    assert "with no random control beside it" in found.sentence


def test_one_intervention_at_several_places_is_replaced_at_all_of_them(small_llama, byte_tokenizer):
    shared = rl.Edit(
        "s", at="blocks[0,1].output", positions="last", intervention=rl.LoReFT(rank=2), share="w"
    )
    reft = bound(small_llama, byte_tokenizer, shared)
    randomise(reft)
    found = faithfulness(reft, texts(5), draws=0)
    assert kept(found)["linearised"].share.value == pytest.approx(1.0, abs=1e-3)
    assert {one.edits for one in found.kept} == {ALL_EDITS}


def test_a_soft_gate_is_said_to_be_out_of_reach_and_the_model_is_left_as_it_was(small_llama, byte_tokenizer):
    gated = rl.Edit(
        "g", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=2),
        when=rl.gate("blocks[0].output @ last"),
    )  # fmt: skip
    found = faithfulness(bound(small_llama, byte_tokenizer, gated), texts(4), METRIC)
    assert "soft gate" in found.missing
    assert "soft gate" in found.sentence
    reft = planted(small_llama, byte_tokenizer, [3.0, 2.0, 2.0, 2.0], 0.01)
    built = reft.interventions["shift"]
    found = faithfulness(reft, texts(4), METRIC, draws=1)
    assert reft.interventions["shift"] is built
    assert found.plot().axes
    assert "directions" in found._repr_html_()
    assert repr(found).startswith("Faithfulness(")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top": 0}, "top=0"),
        ({"draws": -1}, "draws=-1"),
        ({"folds": 0}, "folds=0"),
        ({"enough": 1.2}, "enough=1.2"),
        ({"budget": -1}, "budget=-1: expected seconds, 0 or more"),
        ({"max_edits": -2}, "max_edits=-2"),
    ],
)
def test_settings_that_cannot_be_used_are_named(options, said, small_llama, byte_tokenizer):
    with pytest.raises(DataError, match=said):
        faithfulness(bound(small_llama, byte_tokenizer, loreft()), texts(4), METRIC, **options)


def test_a_model_that_is_not_bound_and_examples_of_tasks_are_refused(small_llama, byte_tokenizer):
    with pytest.raises(DataError, match="takes a bound model"):
        faithfulness(small_llama, texts(4), METRIC)
    with pytest.raises(DataError, match="needs a tokenizer"):
        faithfulness(bound(small_llama, None, loreft()), texts(4), METRIC)
