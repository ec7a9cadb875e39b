"""One cell of the oracle matrix: a model, a site, a side of padding, and what is compared.

`check_*` return nothing where reftlab equals plain hooks and raise where it does not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import reftlab as rl
from tests.families.hand import answer_of, edit_by_hand, last_columns, plain_hook, read_by_hand, real_columns
from tests.families.table import TABLE
from tests.models import build, hook_count, inputs_of
from tests.oracle import assert_close, loreft, randomise

ADD, LOREFT = "add", "loreft"
_NEW_TOKENS = 3
VISIBLE = 1e-4


@functools.cache
def model_of(name: str) -> Any:
    return build(name)


@contextlib.contextmanager
def no_hook_stays(name: str) -> Iterator[None]:
    """What is done inside leaves as many hooks on the model as it found."""
    before = hook_count(model_of(name))
    yield
    assert hook_count(model_of(name)) == before


@functools.cache
def read_of(name: str, site: str, side: str) -> Tensor:
    return read_by_hand(model_of(name), TABLE[name][site], inputs_of(name, side))


@functools.cache
def answer_without_edits(name: str, side: str) -> Tensor:
    with torch.no_grad():
        return answer_of(model_of(name)(**inputs_of(name, side)))


def _vector(width: int) -> Tensor:
    return 0.5 + torch.linspace(-1.0, 1.0, width)


@functools.cache
def bound(name: str) -> rl.BoundModel:
    """All sites of a model bound together: a read of the whole site and two edits at its last token.

    Images are edited at their first token too, of which classifiers take their answer.
    """
    nodes: list[Any] = []
    for site, raw in TABLE[name].items():
        width, positions = read_of(name, site, "right").shape[-1], "last"
        if raw.axes == "rf":
            positions = "all"
        elif is_image(name, site):
            positions = "first(1)+last(1)"
        add, loreft = rl.Add(_vector(width)), rl.LoReFT(rank=2)
        nodes += [
            rl.Read(site, name=_named("read", name, site)),
            rl.Edit(_named(ADD, name, site), at=site, positions=positions, intervention=add),
            rl.Edit(_named(LOREFT, name, site), at=site, positions=positions, intervention=loreft),
        ]
    reft = bind(name, *nodes)
    randomise(reft)
    return reft


def _named(kind: str, name: str, site: str) -> str:
    return f"{kind}{list(TABLE[name]).index(site)}"


@functools.cache
def reading_of(name: str, side: str) -> Any:
    """What reftlab reads at all sites of a model."""
    with no_hook_stays(name), bound(name).disabled():
        return bound(name).read(**inputs_of(name, side))


def is_image(name: str, site: str) -> bool:
    return name == "vit" or site.startswith("vision.")


def bind(name: str, *nodes: Any) -> rl.BoundModel:
    """A graph of these nodes on the model; reftlab makes up inputs where it can."""
    example = inputs_of(name) if name in ("gru", "mlp") else None
    return rl.InterventionGraph(*nodes).bind(model_of(name), example=example)


def _change(name: str, site: str, kind: str) -> Any:
    """The edit's formula, written out."""
    if kind == ADD:
        return lambda h: h + _vector(h.shape[-1])
    built: Any = bound(name).interventions[_named(LOREFT, name, site)]
    return functools.partial(loreft, built)


def check_read(name: str, site: str, side: str) -> None:
    inputs, got = inputs_of(name, side), reading_of(name, side)[_named("read", name, site)]
    whole = read_of(name, site, side)
    for row, columns in enumerate(real_columns(TABLE[name][site], inputs, whole.shape[1])):
        expected = whole[row, columns]
        # Rows of different lengths begin at the same place and end in nan.
        assert_close(got.reshape(whole.shape[0], -1, whole.shape[2])[row, : len(columns)], expected)
        assert bool(got.reshape(whole.shape[0], -1, whole.shape[2])[row, len(columns) :].isnan().all())


def check_edit(name: str, site: str, side: str, kind: str) -> None:
    inputs, raw, model = inputs_of(name, side), TABLE[name][site], model_of(name)
    columns = last_columns(raw, inputs, read_of(name, site, side).shape[1])
    if is_image(name, site) and raw.axes == "rtf":
        columns = [[0, *row] for row in columns]
    with torch.no_grad():
        with plain_hook(model, raw, edit_by_hand(raw, columns, _change(name, site, kind))):
            expected = answer_of(model(**inputs))
        with no_hook_stays(name):
            got = answer_of(bound(name)(**inputs, select=[_named(kind, name, site)]))
    assert (expected - answer_without_edits(name, side)).abs().max() > VISIBLE
    assert_close(got, expected)


def generation_inputs(name: str, side: str) -> dict[str, Any]:
    inputs = inputs_of(name, side)
    if "decoder_input_ids" in inputs:
        start = model_of(name).config.decoder_start_token_id
        inputs["decoder_input_ids"][:, 0] = start
    return {
        **inputs, "max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip


@functools.cache
def scores_without_edits(name: str, side: str) -> Tensor:
    return torch.stack(model_of(name).generate(**generation_inputs(name, side)).scores)


def check_generation(name: str, site: str, side: str, kind: str) -> None:
    inputs, raw, model = generation_inputs(name, side), TABLE[name][site], model_of(name)
    columns = last_columns(raw, inputs_of(name, side), read_of(name, site, side).shape[1])
    act = edit_by_hand(raw, columns, _change(name, site, kind), first_pass_only=True)
    with torch.no_grad():
        with plain_hook(model, raw, act):
            expected = model.generate(**inputs)
        with no_hook_stays(name):
            got = bound(name).generate(**inputs, select=[_named(kind, name, site)])
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.scores), torch.stack(expected.scores))
    # A forbidden token's score is -inf with the edit and without.
    change = (torch.stack(expected.scores) - scores_without_edits(name, side)).nan_to_num()
    assert change.abs().max() > VISIBLE


def generation_sides(site: str) -> tuple[str, ...]:
    """The sides of padding on which a generation computes a site's last real token."""
    # Only the last column's logits are made, which with padding on the right belong to no token.
    return ("left",) if site == "unembed" else ("left", "right")


def check_decoding(name: str, site: str, side: str) -> None:
    """An edit of the prompt's last token and of every generated one, in a generation."""
    inputs, raw, model = generation_inputs(name, side), TABLE[name][site], model_of(name)
    vector = _vector(read_of(name, site, side).shape[-1])
    columns = last_columns(raw, inputs_of(name, side), read_of(name, site, side).shape[1])
    edit = rl.Edit("both", at=site, positions="last", phase="both", intervention=rl.Add(vector))
    in_prompt = edit_by_hand(raw, columns, lambda h: h + vector, first_pass_only=True)
    passes = 0

    def act(tensor: Tensor) -> Tensor | None:
        nonlocal passes
        passes += 1
        return in_prompt(tensor) if passes == 1 else tensor + vector

    with torch.no_grad():
        with plain_hook(model, raw, act):
            expected = model.generate(**inputs)
        with no_hook_stays(name):
            got = bind(name, edit).generate(**inputs)
    assert passes == _NEW_TOKENS
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.scores), torch.stack(expected.scores))
