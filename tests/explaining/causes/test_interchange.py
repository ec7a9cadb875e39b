"""Interchange accuracy: planted variables are found, and nothing is found where nothing is."""

import math

import pytest
import torch
from torch import nn

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.causes.interchange import interchange_accuracy, interchanges
from reftlab.explaining.causes.interchanged import wilson
from tests.contracts.planted import Bits, Planted, decide
from tests.explaining.conftest import bound

pytestmark = pytest.mark.usefixtures("users_call")

SIZE, WIDTH, COUNT = 3, 12, 300
QUIET = {"progress": False, "chat": False}


class Spare(nn.Module):
    """A planted network in the first half of the coordinates that `mix` rotates; the rest is not looked at."""

    def __init__(self):
        super().__init__()
        self.inner, self.mix = Planted(WIDTH // 2, SIZE), nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q)

    def forward(self, input):
        seen = self.mix(input) @ self.mix.weight
        return self.inner(seen[:, : WIDTH // 2])


def swap_at(net, swap, **options):
    edit = rl.Edit("word", at="mix.output", intervention=swap, source=rl.Read(run="source"), **options)
    return rl.InterventionGraph(rl.Source("source"), edit).bind(net, example=torch.zeros(3, WIDTH))


def set_basis(reft, columns):
    with torch.no_grad():
        reft.interventions["word"].basis.weight.copy_(columns)


def asked(reft, data):
    def correct(**options):
        sources = {"source": {"input": data.sources["source"]}}
        answers = reft(input=data.base, sources=sources, **options)
        return (decide(answers) == data.labels).all(1)

    return correct


def test_the_planted_subspace_is_right_and_each_of_its_directions_is_needed():
    net, data = Planted(WIDTH, SIZE), Bits(WIDTH, SIZE).draw(COUNT)
    reft = swap_at(net, rl.RotatedSwap(rank=SIZE))
    set_basis(reft, net.directions)
    found = interchanges(reft, asked(reft, data), progress=False)
    assert found.accuracy.value == 1
    assert found.random_accuracy.value < 0.5
    assert found.advantage.low > 0.3
    assert found.accuracy_without_swap.value < 0.3
    # A swap of everything answers for the source, whose rest is another.
    assert found.whole_accuracy.value < 0.3
    assert found.ranks["word"] == pytest.approx(SIZE, abs=1e-4)
    assert [one.direction for one in found.removed] == [0, 1, 2]
    assert all(one.change.high < 0 for one in found.removed)
    assert found.sentence.startswith("Swapping 3 directions from the source run gives")
    assert found.sentence.endswith("(5 draws). It does more than these.")


def test_useless_directions_of_a_subspace_are_told_from_useful_ones():
    net = Spare()
    given = Bits(WIDTH // 2, SIZE).draw(COUNT)
    pad = [torch.randn(COUNT, WIDTH // 2) for _ in range(2)]
    base, source = (
        torch.cat([bits, spare], 1)
        for bits, spare in zip((given.base, given.sources["source"]), pad, strict=True)
    )
    data = type(given)(base, {"source": source}, given.labels)
    reft = swap_at(net, rl.RotatedSwap(rank=SIZE + 2))
    turned = net.mix.weight.detach()
    set_basis(reft, torch.cat([turned[:, :SIZE], turned[:, -2:]], 1))
    found = interchanges(reft, asked(reft, data), progress=False)
    assert found.accuracy.value == 1
    changes = [one.change.value for one in found.removed]
    assert all(change < -0.2 for change in changes[:SIZE])
    assert changes[SIZE:] == [0, 0]


@pytest.mark.parametrize("kind", ["masked", "boundless", "components"])
def test_other_swaps_are_compared_in_as_many_directions(kind):
    net, data = Planted(WIDTH, SIZE), Bits(WIDTH, SIZE).draw(COUNT)
    if kind == "components":
        reft = swap_at(net, rl.PCASwap(net.directions.T))
    elif kind == "masked":
        reft = swap_at(net, rl.MaskedSwap(rotated=True))
    else:
        reft = swap_at(net, rl.BoundlessSwap())
    built = reft.interventions["word"]
    if kind != "components":
        set_basis(reft, net.mix.weight.detach())
        built.schedule(1.0)
        with torch.no_grad():
            if kind == "masked":
                built.logits.copy_(torch.where(torch.arange(WIDTH) < SIZE, 1.0, -1.0))
            else:
                built.boundary.fill_(math.log(SIZE / (WIDTH - SIZE)))
    found = interchanges(reft, asked(reft, data), draws=3, progress=False)
    assert found.accuracy.value == 1
    assert found.ranks["word"] == pytest.approx(SIZE, abs=0.05)
    assert [one.direction for one in found.removed] == list(range(SIZE))
    assert found.advantage.low > 0.3


def test_a_random_subspace_keeps_base_and_rank_and_draws_anew():
    """The control is a projection of the same rank; what it does not swap stays the base's."""
    from reftlab.explaining.causes.swaps import turned

    inner = rl.RotatedSwap(rank=SIZE).build(WIDTH)
    generator = torch.Generator().manual_seed(0)
    one, other = (turned(inner, generator) for _ in range(2))
    zero, eye = torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH)
    maps = [swap.edited(zero, eye).detach() for swap in (one, other)]
    for found in maps:
        torch.testing.assert_close(found @ found, found, atol=1e-5, rtol=0)
        assert float(found.trace()) == pytest.approx(SIZE, abs=1e-4)
        torch.testing.assert_close(one.edited(eye, eye), eye)
    assert float((maps[0] - maps[1]).norm()) > 0.5


def test_random_labels_are_not_answered_above_chance_over_20_seeds():
    alarms = 0
    net = Planted(WIDTH, SIZE)
    for seed in range(20):
        torch.manual_seed(seed)
        data = Bits(WIDTH, SIZE).draw(200)
        reft = swap_at(net, rl.RotatedSwap(rank=SIZE))
        wanted = torch.rand(200) < 0.5

        def correct(data=data, reft=reft, wanted=wanted, **options):
            sources = {"source": {"input": data.sources["source"]}}
            return decide(reft(input=data.base, sources=sources, **options))[:, 0] == wanted

        found = interchanges(reft, correct, draws=1, detailed=0, progress=False)
        alarms += int(found.accuracy.excludes(0.5))
    # At 95%, four or more of 20 have a probability of 1.6%.
    assert alarms <= 3


def test_the_interval_is_wilsons():
    found, z, n, p = wilson(torch.arange(50) < 40), 1.959963985, 50, 0.8
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (found.value, found.low, found.high) == pytest.approx((p, centre - half, centre + half), abs=1e-6)


PROMPTS = [("the sea", "a hill on a hill"), ("a cat", "the dog"), ("snow", "blue and two"), ("a b c", "sea")]


def of_texts(model, tokenizer, swap=None, at="blocks[1].output"):
    edit = rl.Edit(
        "swap", at=at, positions="last", intervention=swap or rl.Swap(), source=rl.Read(run="other")
    )
    return rl.InterventionGraph(rl.Source("other"), edit).bind(model, tokenizer)


def next_token(model, tokenizer, prompt):
    with torch.no_grad():
        return int(model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())


def test_swapping_the_last_residual_gives_the_sources_next_token(small_gpt2, byte_tokenizer):
    examples, half = [], []
    for number, (prompt, other) in enumerate(PROMPTS):
        answer = byte_tokenizer.decode([next_token(small_gpt2, byte_tokenizer, other)])
        if byte_tokenizer(answer)["input_ids"] != [next_token(small_gpt2, byte_tokenizer, other)]:
            continue
        examples.append(rl.Example(prompt, answer, sources={"other": other}))
        half.append(rl.Example(prompt, answer if number % 2 else "zz", sources={"other": other}))
    assert len(examples) >= 2
    reft = of_texts(small_gpt2, byte_tokenizer)
    found = interchange_accuracy(reft, examples, **QUIET)
    assert found.right.all()
    assert found.whole.all()
    wrong = interchange_accuracy(reft, half, draws=1, **QUIET)
    assert wrong.right.tolist() == [example.answer != "zz" for example in half]


def test_whole_answers_are_those_of_greedy_generation(small_llama, byte_tokenizer):
    reft = of_texts(small_llama, byte_tokenizer)
    examples = []
    for number, (prompt, other) in enumerate(PROMPTS):
        made = [rl.Example(prompt, sources={"other": other})]
        (reply,) = rl.reply(reft, made, chat=False, max_new_tokens=3)
        examples.append(rl.Example(prompt, reply if number else "zzz", sources={"other": other}))
    expected = []
    for example in examples:
        wanted = byte_tokenizer(example.answer)["input_ids"]
        batch = byte_tokenizer(example.prompt, return_tensors="pt")
        other = dict(byte_tokenizer(example.sources["other"], return_tensors="pt"))
        with torch.no_grad():
            tokens = reft.generate(
                **batch, sources={"other": other}, max_new_tokens=len(wanted), do_sample=False, pad_token_id=0
            )
        expected.append(tokens[0, batch["input_ids"].shape[1] :].tolist() == wanted)
    found = interchange_accuracy(reft, examples, match="answer", draws=1, **QUIET)
    assert found.right.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_choices_decide_among_themselves(small_llama, byte_tokenizer):
    reft = of_texts(small_llama, byte_tokenizer)
    ids = [byte_tokenizer(choice)["input_ids"][0] for choice in ("x", "y")]
    examples, expected = [], []
    for prompt, other in PROMPTS:
        examples.append(rl.Example(prompt, "x", sources={"other": other}))
        batch = byte_tokenizer(prompt, return_tensors="pt")
        source = dict(byte_tokenizer(other, return_tensors="pt"))
        with torch.no_grad():
            logits = reft(**batch, sources={"other": source}).logits[0, -1]
        expected.append(bool(logits[ids[0]] > logits[ids[1]]))
    found = interchange_accuracy(reft, examples, choices=["x", "y"], draws=1, **QUIET)
    assert found.right.tolist() == expected


def test_what_cannot_be_used_is_refused_by_name(small_llama, byte_tokenizer):
    example = rl.Example("the sea", "x", sources={"other": "a"})
    reft = of_texts(small_llama, byte_tokenizer)
    with pytest.raises(DataError, match="no answer"):
        interchange_accuracy(reft, [rl.Example("the sea", sources={"other": "a"})], **QUIET)
    with pytest.raises(DataError, match="begins with none of them"):
        interchange_accuracy(reft, [example], choices=["y", "z"], **QUIET)
    with pytest.raises(DataError, match="different tokens"):
        interchange_accuracy(reft, [example], choices=["xa", "xb"], **QUIET)
    with pytest.raises(DataError, match="draws=0"):
        interchange_accuracy(reft, [example], draws=0, **QUIET)
    push = rl.Edit("push", at="blocks[0].output", intervention=rl.Add(torch.ones(32)))
    with pytest.raises(DataError, match="takes its values from a source run"):
        interchange_accuracy(bound(small_llama, byte_tokenizer, push), [("the sea", "x")], **QUIET)


def test_directions_left_out_are_named_and_everything_is_shown():
    net, data = Planted(WIDTH, SIZE), Bits(WIDTH, SIZE).draw(60)
    reft = swap_at(net, rl.RotatedSwap(rank=SIZE))
    many = interchanges(reft, asked(reft, data), draws=1, detailed=2, progress=False)
    assert many.removed == ()
    assert "it has 3" in many.note
    late = interchanges(reft, asked(reft, data), draws=1, budget=0, progress=False)
    assert "the time was over before direction 0" in late.note
    full = interchanges(reft, asked(reft, data), draws=2, progress=False)
    assert list(full.to_frame()["swapped"])[:2] == ["learned subspace", "random subspaces (2)"]
    assert len(full.to_frame()) == 4 + SIZE
    labels = [label.get_text() for axes in full.plot().axes for label in axes.get_yticklabels()]
    assert {"learned subspace", "no swap", "0", "1", "2"} <= set(labels)
    assert "<img" in full._repr_html_()
