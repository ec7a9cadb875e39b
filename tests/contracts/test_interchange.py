"""Interchange at every site of two models equals their passes written out by hand with that value replaced."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.contracts.by_hand import (
    HEAD_SIZES,
    HEADS,
    KEY_VALUE_HEADS,
    LAYERS,
    VOCABULARY,
    Values,
    forward,
    two_layers,
)
from tests.models import row_of, with_position_ids
from tests.oracle import assert_close

LENGTHS = (6, 4, 7)
TOKENS = {"all": slice(None), "last": slice(-1, None), "[1, -1]": [1, -1]}
"""Positions and the tokens that they mean in a row without padding."""
VISIBLE = 1e-3

SITES = [(family, site) for family in HEAD_SIZES for site in forward(family, torch.arange(4))]
ATTENTION = ("q", "k", "v", "heads", "scores", "pattern")
either_side = pytest.mark.parametrize("side", ["left", "right"])


def heads_at(family: str, part: str) -> int:
    return KEY_VALUE_HEADS if family == "llama" and part in ("k", "v") else HEADS


HEAD_SITES = [
    (family, f"blocks[{layer}].attn.{part}", head)
    for family in HEAD_SIZES
    for layer in range(LAYERS)
    for part in ATTENTION
    for head in range(heads_at(family, part))
]


@functools.cache
def prompts(seed: int, side: str) -> dict[str, Tensor]:
    """Three rows of different lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(-length, None) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return with_position_ids({"input_ids": ids, "attention_mask": mask})


def ids_of(batch: dict[str, Tensor], row: int) -> Tensor:
    return row_of(batch, row)["input_ids"][0]


@functools.cache
def clean(family: str, seed: int, row: int) -> Values:
    """By hand, the values of one row of `prompts`; padding, and so its side, has no part in them."""
    return forward(family, ids_of(prompts(seed, "right"), row))


def interchanged(family: str, site: str, row: int, tokens: slice | list[int], head: int | None) -> Tensor:
    """By hand, for one row: the logits where the source's value stands at those tokens of the site."""
    value, other = clean(family, 1, row)[site].clone(), clean(family, 2, row)[site]
    if head is None and value.dim() == 2:
        value[tokens] = other[tokens]
    elif head is None:
        value[:, tokens] = other[:, tokens]
    elif value.dim() == 3:
        value[head, tokens] = other[head, tokens]
    else:
        size = HEAD_SIZES[family]
        own = slice(head * size, (head + 1) * size)
        value[tokens, own] = other[tokens, own]
    return forward(family, ids_of(prompts(1, "right"), row), {site: value})["unembed"]


@functools.cache
def swap(family: str, site: str, positions: str, head: int | None) -> rl.BoundModel:
    return rl.InterventionGraph(
        rl.Source("source"),
        rl.Edit(
            "swap", at=site, positions=positions, heads=head, intervention=rl.Swap(), source=rl.Read(run="source")
        ),
    ).bind(two_layers(family))  # fmt: skip


def check(family: str, site: str, side: str, positions: str, head: int | None = None) -> None:
    base, source = prompts(1, side), prompts(2, side)
    with torch.no_grad():
        logits = swap(family, site, positions, head)(**base, sources={"source": source}).logits
    changes = []
    for row in range(len(LENGTHS)):
        expected = interchanged(family, site, row, TOKENS[positions], head)
        assert_close(logits[row][base["attention_mask"][row].bool()], expected, 1e-4)
        changes.append(expected - clean(family, 1, row)["unembed"])
    assert torch.cat(changes).abs().max() > VISIBLE


@either_side
@pytest.mark.parametrize("family", HEAD_SIZES)
def test_the_passes_written_out_by_hand_are_those_of_the_models(family: str, side: str) -> None:
    batch = prompts(1, side)
    with torch.no_grad():
        logits = two_layers(family)(**batch).logits
    for row in range(len(LENGTHS)):
        own = batch["attention_mask"][row].bool()
        assert_close(logits[row][own], clean(family, 1, row)["unembed"], 1e-4)


@either_side
@pytest.mark.parametrize(("family", "site"), SITES)
def test_a_read_is_the_value_of_the_pass_written_out_by_hand(family: str, site: str, side: str) -> None:
    batch = prompts(1, side)
    read = rl.InterventionGraph(rl.Read(site, name="value")).bind(two_layers(family)).read(**batch)["value"]
    for row, length in enumerate(LENGTHS):
        expected = clean(family, 1, row)[site]
        if expected.dim() == 2:
            assert_close(read[row, :length], expected, 1e-4)
            assert bool(read[row, length:].isnan().all())
            continue
        keys = batch["attention_mask"][row].bool()
        seen = torch.ones(length, length).tril().bool().expand(HEADS, -1, -1)
        assert_close(read[row, :, :length][..., keys][seen], expected[seen], 1e-4)


@either_side
@pytest.mark.parametrize("positions", TOKENS)
@pytest.mark.parametrize(("family", "site"), SITES)
def test_interchange_at_a_site_replaces_that_value(family: str, site: str, side: str, positions: str) -> None:
    check(family, site, side, positions)


@either_side
@pytest.mark.parametrize(("family", "site", "head"), HEAD_SITES)
def test_interchange_at_one_head_replaces_that_heads_value(
    family: str, site: str, head: int, side: str
) -> None:
    check(family, site, side, "[1, -1]", head)


@pytest.mark.parametrize("family", HEAD_SIZES)
def test_interchange_of_a_whole_stream_hands_the_sources_answer_over(family: str) -> None:
    """Where everything goes through one value, its source's answer comes out, number for number."""
    base, source = prompts(1, "right"), prompts(2, "right")
    real = base["attention_mask"].bool()
    for site in ("blocks[0].input", "blocks[0].output", "blocks[1].output", "final_norm.output", "unembed"):
        graph = rl.InterventionGraph(
            rl.Source("source"),
            rl.Edit("swap", at=site, intervention=rl.Swap(), source=rl.Read(run="source")),
        )
        with torch.no_grad():
            got = graph.bind(two_layers(family))(**base, sources={"source": source}).logits
            assert torch.equal(got[real], two_layers(family)(**source).logits[real])


@pytest.mark.parametrize("family", HEAD_SIZES)
def test_interchanges_at_two_sites_replace_both_values(family: str) -> None:
    """The source's attention at one token and its MLP at another, each from the clean source run."""
    base, source = prompts(1, "right"), prompts(2, "right")
    graph = rl.InterventionGraph(
        rl.Source("source"),
        rl.Edit("mlp", at="blocks[1].mlp.output", positions="last", intervention=rl.Swap(), source=rl.Read(run="source")),
        rl.Edit("attn", at="blocks[0].attn.output", positions=[1], intervention=rl.Swap(), source=rl.Read(run="source")),
    )  # fmt: skip
    with torch.no_grad():
        logits = graph.bind(two_layers(family))(**base, sources={"source": source}).logits
    for row, length in enumerate(LENGTHS):
        own, other = ids_of(base, row), forward(family, ids_of(source, row))
        first = forward(family, own)["blocks[0].attn.output"].clone()
        first[1] = other["blocks[0].attn.output"][1]
        # The MLP's value of the other tokens is the one that the first interchange leaves there.
        second = forward(family, own, {"blocks[0].attn.output": first})["blocks[1].mlp.output"].clone()
        second[-1] = other["blocks[1].mlp.output"][-1]
        given = {"blocks[0].attn.output": first, "blocks[1].mlp.output": second}
        assert_close(logits[row, :length], forward(family, own, given)["unembed"], 1e-4)


@pytest.mark.parametrize("family", HEAD_SIZES)
def test_nested_interchange_replaces_a_value_inside_the_source_run(family: str) -> None:
    """The source run itself has a head from a third run; the base takes what comes of it."""
    base, source, third = (prompts(seed, "left") for seed in (1, 2, 3))
    graph = rl.InterventionGraph(
        rl.Source("source"),
        rl.Source("third"),
        rl.Edit("outer", at="blocks[1].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="source")),
        rl.Edit(
            "inner", at="blocks[0].attn.heads", heads=2, run="source", intervention=rl.Swap(),
            source=rl.Read(run="third"),
        ),
    )  # fmt: skip
    with torch.no_grad():
        logits = graph.bind(two_layers(family))(**base, sources={"source": source, "third": third}).logits
    own = slice(2 * HEAD_SIZES[family], 3 * HEAD_SIZES[family])
    for row in range(len(LENGTHS)):
        ids, site = ids_of(source, row), "blocks[0].attn.heads"
        heads = forward(family, ids)[site].clone()
        heads[:, own] = forward(family, ids_of(third, row))[site][:, own]
        value = forward(family, ids_of(base, row))["blocks[1].output"].clone()
        value[-1] = forward(family, ids, {site: heads})["blocks[1].output"][-1]
        expected = forward(family, ids_of(base, row), {"blocks[1].output": value})["unembed"]
        assert_close(logits[row][base["attention_mask"][row].bool()], expected, 1e-4)
