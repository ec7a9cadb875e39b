"""Collected vectors against plain hooks on single rows without padding."""

from __future__ import annotations

from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.collecting.rows import by_length
from tests.models import VOCABULARY, batch_of, build, copy_of, hook_count, row_of
from tests.oracle import assert_close, hooked, plain_read, raw_blocks

TEXTS = [
    "the cat",
    "the Eiffel Tower is in Paris",
    "who is in London",
    "John and Mary gave a book to the dog",
    "Paris",
    "where is the friend",
    "a cat and a dog",
]
LAST = "blocks[1].output @ last"


def id_rows(lengths: tuple[int, ...] = (5, 11, 2, 9, 5, 7, 1, 11)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def alone(model: nn.Module, module: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    """A module's output for each row alone, `(token, width)`."""
    return [plain_read(model, module, {"input_ids": torch.tensor([row])})[0] for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert"])
def test_vectors_are_those_of_plain_hooks_on_single_rows(family: str, dtype: torch.dtype) -> None:
    model, rows = build(family).to(dtype), id_rows()
    early, late = (alone(model, raw_blocks(model)[number], rows) for number in (0, 2))
    expected_last = torch.stack([row[-1] for row in late])
    expected_all = torch.cat(early)
    sites = ("blocks[2].output @ last", "blocks[0].output")
    one = rl.collect(model, rows, *sites, batch_size=1, progress=False)
    assert torch.equal(one["blocks[2].output @ last"], expected_last)
    assert torch.equal(one["blocks[0].output @ all"], expected_all)
    many = rl.collect(model, rows, *sites, batch_size=3, progress=False)
    assert many["blocks[0].output @ all"].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    assert_close(many["blocks[2].output @ last"], expected_last, tolerance)
    assert_close(many["blocks[0].output @ all"], expected_all, tolerance)


def test_the_index_says_example_token_and_token_id(llama: Any) -> None:
    rows = id_rows()
    found = rl.collect(llama, rows, "blocks[0].output @ first(2)+last", progress=False)
    expected = [
        (example, token, row[token])
        for example, row in enumerate(rows)
        for token in sorted({0, min(1, len(row) - 1), len(row) - 1})
    ]
    values = found.flat("blocks[0].output @ first(2)+last")
    assert values.index.tolist() == [list(line) for line in expected]
    assert values.examples.tolist() == [example for example, _, _ in expected]
    frame = found.to_frame()
    assert list(frame.columns) == ["read", "example", "position", "token_id"]
    assert frame[["example", "position", "token_id"]].to_numpy().tolist() == values.index.tolist()


def test_no_block_above_the_deepest_site_runs_and_each_below_runs_once_a_batch(llama: Any) -> None:
    calls = [0, 0, 0, 0]

    def counter(number: int) -> Any:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    modules = [*raw_blocks(llama), llama.lm_head]
    handles = [module.register_forward_pre_hook(counter(n)) for n, module in enumerate(modules)]
    rl.collect(llama, id_rows(), "blocks[0].output @ last", LAST, batch_size=2, progress=False)
    for handle in handles:
        handle.remove()
    assert calls == [4, 4, 0, 0]
    assert hook_count(llama) == 0


def test_sites_of_different_depths_and_positions_come_from_one_pass(gpt2: Any, tokenizer: Any) -> None:
    passes: list[int] = []
    handle = gpt2.register_forward_pre_hook(lambda *_: passes.append(1))
    found = rl.collect(
        gpt2,
        TEXTS[1:3],
        rl.Read("blocks[2].output @ joined(last(2))", name="pair"),
        rl.Read("blocks[0].output @ span('is')+last", name="words", features=[3, 0]),
        rl.Read("blocks[1].attn.heads @ [-2]", name="head", heads=2),
        "blocks[*].mlp.output",
        positions="first",
        tokenizer=tokenizer,
        progress=False,
    )
    handle.remove()
    assert passes == [1]
    rows = [tokenizer(text)["input_ids"] for text in TEXTS[1:3]]
    last, first = (alone(gpt2, raw_blocks(gpt2)[number], rows) for number in (2, 0))
    assert_close(found["pair"], torch.stack([torch.cat([row[-2], row[-1]]) for row in last]))
    places = [row.index(tokenizer("is")["input_ids"][0]) for row in rows]
    expected = [row[[place, -1]][:, [3, 0]] for row, place in zip(first, places, strict=True)]
    assert_close(found["words"], torch.cat(expected))
    assert found["head"].shape == (2, 8)
    assert [found[name].shape for name in list(found)[3:]] == [(2, 32)] * 3
    assert found.of(1)["words"].shape == (2, 2)
    assert torch.equal(found.of(-1)["words"], found["words"][2:])


def test_every_form_of_data_gives_the_same(llama: Any, tokenizer: Any) -> None:
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = torch.stack([row[-1] for row in alone(llama, raw_blocks(llama)[1], ids)])
    left = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    forms: dict[str, Any] = {
        "texts": TEXTS,
        "pairs": [(text, "Paris") for text in TEXTS],
        "examples": [rl.Example(text, "dog", task="emoji") for text in TEXTS],
        "mappings": [{"prompt": text} for text in TEXTS],
        "texts in a table": [{"text": text, "label": 1} for text in TEXTS],
        "frame": pd.DataFrame({"question": TEXTS}),
        "dataset": datasets.Dataset.from_dict({"prompt": TEXTS, "answer": TEXTS}),
        "a dataset's texts": datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)}),
        "a tokenised dataset": datasets.Dataset.from_dict({"input_ids": ids}),
        "a padded dataset": datasets.Dataset.from_dict({name: left[name].tolist() for name in left}),
        "numbers": ids,
        "tensors": [torch.tensor(row) for row in ids],
        "encoded": rl.training.encode(tokenizer, rl.training.as_examples([(t, "dog") for t in TEXTS])),
        "a tokenizer's lists": tokenizer(TEXTS),
        "a tokenizer's tensors": left,
        "ready batches": [{name: left[name][rows] for name in ("input_ids", "attention_mask")}
                          for rows in (slice(0, 3), slice(3, 7))],
    }  # fmt: skip
    for name, data in forms.items():
        found = rl.collect(llama, data, LAST, tokenizer=tokenizer, batch_size=4, progress=False)
        assert found.rows == len(TEXTS), name
        assert_close(found[LAST], expected)
        assert found.flat(LAST).token_ids.tolist() == [row[-1] for row in ids], name


def test_a_file_of_prompts_is_read(llama: Any, tokenizer: Any, tmp_path: Any) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt\n" + "\n".join(TEXTS))
    found = rl.collect(llama, file, LAST, tokenizer=tokenizer, progress=False)
    assert torch.equal(found[LAST], rl.collect(llama, TEXTS, LAST, tokenizer=tokenizer, progress=False)[LAST])


def test_answers_are_read_where_positions_are_among_them(llama: Any, tokenizer: Any) -> None:
    pairs = [("the cat is", "a dog"), ("Paris", "the friend"), ("who", "John and Mary")]
    label = "blocks[1].output @ generated(0:)"
    found = rl.collect(llama, pairs, label, LAST, tokenizer=tokenizer, progress=False)
    prompts, answers = (
        [tokenizer(text)["input_ids"] for text in column] for column in zip(*pairs, strict=True)
    )
    answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    whole = alone(
        llama, raw_blocks(llama)[1], [p + a for p, a in zip(prompts, answers, strict=True)]
    )  # fmt: skip
    assert_close(found[label], torch.cat([row[-len(a) :] for row, a in zip(whole, answers, strict=True)]))
    assert_close(found[LAST], torch.stack([row[len(p) - 1] for row, p in zip(whole, prompts, strict=True)]))
    assert found.flat(label).token_ids.tolist() == [token for answer in answers for token in answer]


def test_positions_of_each_example_follow_it_through_batches_by_length(llama: Any) -> None:
    rows = id_rows()
    chosen = [[0], [3, 10], [], [1, 2, 8], [4], [6, 0], [0], [5]]
    text = f"rows({', '.join(map(str, chosen))})"
    found = rl.collect(llama, rows, "blocks[1].output", positions=text, batch_size=3, progress=False)
    single = alone(llama, raw_blocks(llama)[1], rows)
    expected = torch.cat([row[sorted(tokens)] for row, tokens in zip(single, chosen, strict=True)])
    (name,) = found
    assert_close(found[name], expected)
    assert found.of(2)[name].shape == (0, 32)
    joined = [sorted({0, len(row) - 1}) if len(row) > 1 else None for row in rows]
    rows = [row for row, pair in zip(rows, joined, strict=True) if pair]
    pairs = f"joined(rows({', '.join(str([0, len(row) - 1]) for row in rows)}))"
    found = rl.collect(
        llama, rows, rl.Read("blocks[1].output", pairs, name="p"), batch_size=3, progress=False
    )
    single = [row for row, pair in zip(single, joined, strict=True) if pair]
    assert_close(found["p"], torch.stack([torch.cat([row[0], row[-1]]) for row in single]))


def test_edits_are_in_force_and_can_be_left_out(llama: Any) -> None:
    rows, vector = id_rows(), torch.linspace(-1, 1, 32)
    graph = rl.InterventionGraph(
        rl.Edit("push", at="blocks[0].output", positions="last", intervention=rl.Add(vector), tasks=("a",)),
        rl.Read("blocks[2].output @ last", name="own"),
    )
    reft = graph.bind(llama)

    def change(hidden: Tensor) -> Tensor:
        hidden[:, -1] += vector
        return hidden

    block = raw_blocks(llama)[2]
    plain = torch.stack([row[-1] for row in alone(llama, block, rows)])
    with hooked(raw_blocks(llama)[0], change):
        edited = torch.stack([row[-1] for row in alone(llama, block, rows)])
    assert (plain - edited).abs().max() > 0.1
    assert_close(rl.collect(reft, rows, batch_size=3, progress=False)["own"], edited)
    with reft.disabled():
        assert_close(rl.collect(reft, rows, batch_size=3, progress=False)["own"], plain)
    tasks = ["a", None, None, "a", None, "a", "a", None]
    mixed = torch.stack([(edited if task else plain)[row] for row, task in enumerate(tasks)])
    assert_close(rl.collect(reft, rows, tasks=tasks, batch_size=3, progress=False)["own"], mixed)
    with pytest.raises(rl.DataError, match="8 examples"):
        rl.collect(reft, rows, tasks=tasks[1:], progress=False)
    with pytest.raises(rl.RunError, match="psh"):
        rl.collect(reft, rows, select="psh", progress=False)


def test_examples_bring_their_own_sources_to_the_edits(llama: Any, tokenizer: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "swap",
            at="blocks[1].output",
            positions="last",
            intervention=rl.Swap(),
            source=rl.Read(run="other"),
        ),
    )
    examples = [rl.Example(text, sources={"other": TEXTS[-1 - n]}) for n, text in enumerate(TEXTS)]
    found = rl.collect(graph.bind(llama, tokenizer), examples, LAST, batch_size=3, progress=False)
    bare = rl.collect(llama, TEXTS, LAST, tokenizer=tokenizer, progress=False)
    assert_close(found[LAST], bare[LAST].flip(0))


def test_chat_templates_are_used_as_everywhere(llama: Any, tokenizer: Any) -> None:
    own = copy_of(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %} :"
    found = rl.collect(
        llama, TEXTS, "blocks[0].output", tokenizer=own, chat=True, system="the dog", progress=False
    )
    ids = own(f"system the doguser {TEXTS[0]} :", add_special_tokens=False)["input_ids"]
    values = found.flat("blocks[0].output @ all")
    assert values.token_ids[values.examples == 0].tolist() == ids
    plain = rl.collect(llama, TEXTS, "blocks[0].output", tokenizer=own, chat=False, progress=False)
    assert plain["blocks[0].output @ all"].shape[0] == sum(len(own(text)["input_ids"]) for text in TEXTS)


def test_sites_in_a_list_are_those_one_after_the_other_and_heads_have_names_of_their_own(llama: Any) -> None:
    heads = [rl.Read("blocks[1].attn.heads @ last", heads=head) for head in (0, 3)]
    found = rl.collect(llama, id_rows(), [LAST, *heads], "blocks[0].output @ first", progress=False)
    apart = rl.collect(llama, id_rows(), LAST, *heads, "blocks[0].output @ first", progress=False)
    names = ["blocks[1].attn.heads (heads 0) @ last", "blocks[1].attn.heads (heads 3) @ last"]
    assert list(found) == [LAST, *names, "blocks[0].output @ first"]
    assert list(apart) == list(found)
    (whole,) = rl.collect(llama, id_rows(), "blocks[1].attn.heads @ last", progress=False).values()
    size = whole.shape[1] // 4
    assert torch.equal(found[heads[0].label], whole[:, :size])
    assert torch.equal(found[heads[1].label], whole[:, 3 * size :])
    assert all(torch.equal(found[name], apart[name]) for name in found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ready_batches_are_taken_as_they_are(any_model: Any, side: str) -> None:
    batches = [batch_of((7, 4, 9), side), batch_of((3, 8), side, seed=8)]
    found = rl.collect(any_model, batches, LAST, "blocks[0].output", progress=False)
    rows = [row_of(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
    ids = [row["input_ids"][0].tolist() for row in rows]
    assert found.flat("blocks[0].output @ all").token_ids.tolist() == [token for row in ids for token in row]
    assert found.flat(LAST).positions.tolist() == [len(row) - 1 for row in ids]
    if side == "right":  # on the left, absolute positions are what the caller makes them
        single = alone(any_model, raw_blocks(any_model)[1], ids)
        assert_close(found[LAST], torch.stack([row[-1] for row in single]))


def test_sites_with_tokens_of_their_own_are_collected_from_ready_batches() -> None:
    vit = build("vit")
    images = torch.randn(5, 3, 24, 24)
    found = rl.collect(
        vit, [{"pixel_values": images[:3]}, {"pixel_values": images[3:]}], "blocks[1].output", progress=False
    )
    expected = plain_read(vit, vit.get_submodule("vit.layers.1"), {"pixel_values": images}).flatten(0, 1)
    values = found.flat("blocks[1].output @ all")
    assert_close(values.vectors, expected)
    assert values.token_ids.unique().tolist() == [-1]
    assert values.examples.tolist() == [row for row in range(5) for _ in range(len(expected) // 5)]


def test_encoders_are_read_from_texts_and_decoders_from_ready_batches(tokenizer: Any) -> None:
    t5, rows = build("t5"), id_rows((4, 6, 3))
    inside, outside = "encoder.block[1].output", "decoder.block[1].output"
    decoder: list[int] = []
    handle = t5.decoder.register_forward_pre_hook(lambda *_: decoder.append(1))
    found = rl.collect(t5, rows, inside, progress=False)
    handle.remove()
    assert decoder == []
    given = {"decoder_input_ids": torch.tensor([[3, 5]])}
    expected = [
        plain_read(t5, t5.encoder.block[1], {"input_ids": torch.tensor([row]), **given})[0] for row in rows
    ]
    assert_close(found[f"{inside} @ all"], torch.cat(expected))
    with pytest.raises(rl.DataError, match=r"decoder.*batches that are ready"):
        rl.collect(t5, rows, outside, progress=False)
    batch = {**batch_of((4, 6)), "decoder_input_ids": torch.tensor([[3, 5, 8], [3, 9, 9]])}
    values = rl.collect(t5, [batch], outside, progress=False).flat(f"{outside} @ all")
    assert values.token_ids.tolist() == [3, 5, 8, 3, 9, 9]
    assert_close(values.vectors, plain_read(t5, t5.decoder.block[1], batch).flatten(0, 1))


def test_a_model_that_is_told_of_no_padding_gets_none() -> None:
    gru, rows = build("gru"), id_rows()
    widths: list[tuple[int, ...]] = []
    handle = gru.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = rl.collect(gru, rows, "rnn.output[0] @ last", progress=False)
    handle.remove()
    lengths = [len(row) for row in rows]
    assert sorted(widths) == sorted((lengths.count(length), length) for length in set(lengths))
    expected = [gru.rnn(gru.embed_words(torch.tensor([row])))[0][0, -1] for row in rows]
    assert_close(found["rnn.output[0] @ last"], torch.stack(expected).detach())


def test_batches_hold_few_padded_tokens_and_keep_their_bounds() -> None:
    lengths = [17, 3, 40, 3, 90, 16, 5, 300, 39, 4, 88]
    groups = by_length(lengths, rows=4, tokens=180)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    assert all(group == sorted(group) and len(group) <= 4 for group in groups)
    sizes = [max(lengths[n] for n in group) * len(group) for group in groups]
    assert all(size <= 180 or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert sum(sizes) < 1.2 * sum(lengths)
    in_order = [lengths[start : start + 4] for start in range(0, len(lengths), 4)]
    assert sum(max(part) * len(part) for part in in_order) > 2 * sum(lengths)


def test_the_model_is_left_as_it_was(gpt2: Any) -> None:
    gpt2.train()
    twice = [rl.collect(gpt2, id_rows(), LAST, progress=False)[LAST] for _ in range(2)]
    assert torch.equal(*twice)  # without dropout
    assert gpt2.training
    assert hook_count(gpt2) == 0
    assert not twice[0].requires_grad
    assert gpt2.config.use_cache


def test_vectors_can_be_kept_in_another_dtype(llama: Any) -> None:
    half = rl.collect(llama, id_rows(), LAST, dtype="bfloat16", progress=False)[LAST]
    assert torch.equal(half, rl.collect(llama, id_rows(), LAST, progress=False)[LAST].bfloat16())


def test_the_result_shows_itself(llama: Any) -> None:
    found = rl.collect(llama, id_rows(), LAST, progress=False)
    assert repr(found) == f"Activations(8 examples; '{LAST}': (8, 32) float32; 1.02 kB in memory)"
    assert "(8, 32)" in found._repr_html_()
    assert len(found) == 1
    with pytest.raises(KeyError, match="Did you mean 'blocks"):
        found["blocks[1].output @ lst"]
    with pytest.raises(rl.DataError, match=r"of\(8\).*8 examples"):
        found.of(8)


def test_numbers_too_large_for_float16_are_refused(llama: Any) -> None:
    edit = rl.Edit("grow", at="blocks[1].output", positions="last", intervention=rl.Scale(1e7))
    reft = rl.InterventionGraph(edit).bind(llama)
    with pytest.raises(rl.RunError, match=r"too narrow: a number of .*e\+0"):
        rl.collect(reft, id_rows(), LAST, dtype="float16", progress=False)
    assert bool(rl.collect(reft, id_rows(), LAST, dtype="bfloat16", progress=False)[LAST].isfinite().all())


def test_tasks_come_from_one_place(llama: Any, tokenizer: Any) -> None:
    edit = rl.Edit("zero", at="blocks[0].output", intervention=rl.Zero(), tasks=("a",))
    reft = rl.InterventionGraph(edit).bind(llama, tokenizer)
    batches = [{**batch_of((4, 6)), "tasks": ["a", None]}, {**batch_of((3, 2)), "tasks": [None, "a"]}]
    found = rl.collect(reft, batches, "blocks[0].output @ last", progress=False)
    assert (found["blocks[0].output @ last"] == 0).all(1).tolist() == [True, False, False, True]
    examples = [rl.Example(text, task="a") for text in TEXTS]
    assert not rl.collect(reft, examples, "blocks[0].output", progress=False)["blocks[0].output @ all"].any()
    for data in (batches, examples):
        with pytest.raises(rl.DataError, match="already"):
            rl.collect(reft, data, LAST, tasks="a", progress=False)


def test_inputs_that_are_the_same_for_all_rows_are_no_rows(gpt2: Any) -> None:
    batch = {"position_ids": torch.arange(5)[None], "input_ids": torch.randint(3, VOCABULARY, (3, 5))}
    found = rl.collect(gpt2, [batch, batch], LAST, progress=False)
    assert found.rows == 6
    assert found.flat(LAST).examples.tolist() == [0, 1, 2, 3, 4, 5]


WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, rl.DataError, "no examples"),
    ([[5, 6], [7]], {"sites": ["blocks[7].output"]}, rl.AddressError, "has 3 entries"),
    ([[5, 6], [7]], {"sites": ["blocks[0].output @ [1]"]}, rl.PositionError, "example 1: position 1.*1 prompt tokens"),
    ([[5, 6], [7]], {"sites": ["blocks[0].output @ rows([0])"]}, rl.PositionError, "2 examples"),
    ([[5, 6], [7]], {"sites": ["blocks[0].output @ span('cat')"]}, rl.PositionError, "looks at text needs tokenizer"),
    ([[5, 6], [7]], {"sites": [LAST, rl.Read(LAST, heads=0)]}, rl.AddressError, "heads"),
    ([[5, 6], [7]], {"sites": [rl.Read(LAST, name="a"), rl.Read(LAST, name="a", features=[0])]}, rl.RunError, "give them names"),
    ([[5, 6], [7]], {"sites": []}, rl.RunError, "nothing to collect"),
    ([[5, 6], [7]], {"sites": [[]]}, rl.DataError, r"sites=\[\]: expected sites such as 'blocks\[5\].output @ last'"),
    ([[5, 6], [7]], {"sites": [[LAST, 3]]}, rl.RunError, r"read\(3\): expected a site such as"),
    ([[5, 6], [7]], {"sites": ["blocks[0].attn.pattern"]}, rl.DataError, "as long as its prompt"),
    ([[5, 6], []], {}, rl.DataError, "example 1"),
    ([[5, 6], "the cat"], {}, rl.DataError, "example 1"),
    (["the cat"], {}, rl.DataError, "no tokenizer"),
    ([[5, 6]], {"chat": True}, rl.DataError, "are for texts"),
    ([[5, 6]], {"sites": ["blocks[0].output @ generated(0:)"]}, rl.DataError, "no token of any example; no example"),
    ({"prompt": ["the cat"]}, {}, rl.DataError, "no tensor with rows; it has .'prompt'"),
    ("the cat", {}, rl.DataError, r"\[text\]"),
    (3, {}, rl.DataError, "not int"),
    ([[5, 6]], {"budget": "2 gigs"}, rl.DataError, "budget='2 gigs'"),
    ([[5, 6]], {"budget": -1}, rl.DataError, "budget=-1"),
    ([[5, 6]], {"batch_size": 0}, rl.DataError, "batch_size=0"),
    ([[5, 6]], {"dtype": "int8"}, rl.DataError, "dtype='int8'"),
    ([{"input_ids": torch.ones(2, 3).long()}, 5], {}, rl.DataError, "batch 1"),
    ([batch_of()], {"sites": ["blocks[0].output @ rows([0], [0], [0])"]}, rl.DataError, "positions of each example"),
    ([batch_of((3, 5)), batch_of((4, 2))], {"sites": ["blocks[0].output @ [3]"]}, rl.PositionError, "example 0: position 3"),
    ([batch_of((5, 5)), batch_of((4, 2))], {"sites": ["blocks[0].output @ [3]"]}, rl.PositionError, "example 3: position 3"),
]  # fmt: skip


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(("data", "arguments", "kind", "message"), WRONG)
def test_what_cannot_be_collected_is_refused(
    llama: Any, data: Any, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    sites = arguments.get("sites", [LAST])
    rest = {name: value for name, value in arguments.items() if name != "sites"}
    with pytest.raises(kind, match=message):
        rl.collect(llama, data, *sites, progress=False, **rest)


def test_an_edits_missing_position_names_the_example(llama: Any) -> None:
    edit = rl.Edit("far", at="blocks[0].output", positions=[4], intervention=rl.Zero())
    reft = rl.InterventionGraph(edit).bind(llama)
    with pytest.raises(rl.PositionError, match="example 2: position 4"):
        rl.collect(reft, id_rows(), LAST, batch_size=2, progress=False)
