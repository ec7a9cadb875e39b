"""Which tokens a direction of the residual stream promotes and suppresses."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.address import parse_path, resolve
from reftlab.errors import AddressError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.explaining.geometry.directions import Directions
    from reftlab.explaining.geometry.lens import DataLens

__all__ = ["Lens", "TokenEffect", "TokenEffects", "readable_token", "token_effects"]

AGREES = 0.99
"""Lowest correlation with the model's own logits at which the lens counts as the model's readout."""


@dataclass(frozen=True)
class TokenEffect:
    """One token and how much a direction changes its logit.

    Attributes:
        id: number of the token.
        text: the token, readable; see `readable_token`.
        change: change of its logit against the mean of the vocabulary, in logits (nats of log-odds).
    """

    id: int
    text: str
    change: float


@dataclass(frozen=True)
class TokenEffects:
    """The tokens that each write direction of an edit promotes and suppresses.

    For a unit write direction u with typical (root mean square) amount s, the change of the logits
    is `(f(h̄ + s u) − f(h̄ − s u)) / 2` with `f(h) = unembed(final_norm(h))` and h̄ the mean of the
    vectors that enter the final norm at the edited tokens while the edits are in force. It is the
    *direct* effect of the write: what it does to the logits by way of the residual stream alone, at
    the scale at which the model really reads its final norm. What later blocks make of it is left
    out. The symmetric difference needs no linearisation of the norm, and treats u and −u alike. The
    mean over the vocabulary is subtracted, since adding one number to all logits changes nothing.

    Source: direct logit attribution and the logit lens, nostalgebraist 2020; Elhage et al., "A
    Mathematical Framework for Transformer Circuits" (2021).

    Attributes:
        edit: key of the edit.
        labels: as in `Directions`.
        promoted: for each direction the tokens it raises most, strongest first.
        suppressed: the tokens it lowers most, strongest first.
        missing: why there are none, or None.
        caveat: what to keep in mind about these, or an empty text.
        lens: by which lens, `logit lens` or `data lens`.
        data: the same by a lens fitted to data, where one was given: with A u in place of u, what later
            blocks make of the direction counts too, as far as it is linear; see `DataLens`.
        data_lens: that lens, with its held-out scores; where these are low, `data.caveat` says so.
    """

    edit: str
    labels: tuple[str, ...]
    promoted: tuple[tuple[TokenEffect, ...], ...]
    suppressed: tuple[tuple[TokenEffect, ...], ...]
    missing: str | None = None
    caveat: str = ""
    lens: str = "logit lens"
    data: TokenEffects | None = None
    data_lens: DataLens | None = None

    def to_frame(self) -> pd.DataFrame:
        """One line a token: edit, direction, effect (`promoted` or not), place, id, token, change, lens."""
        import pandas as pd

        lines = [
            (found_by.edit, label, effect, place, token.id, token.text, token.change, found_by.lens)
            for found_by in ((self,) if self.data is None else (self, self.data))
            for effect, found in (("promoted", found_by.promoted), ("suppressed", found_by.suppressed))
            for label, tokens in zip(found_by.labels, found, strict=True)
            for place, token in enumerate(tokens, 1)
        ]
        columns = ["edit", "direction", "effect", "place", "id", "token", "change", "lens"]
        return pd.DataFrame(lines, columns=columns)

    def plot(self) -> Figure:
        from reftlab.plotting import message_figure, tokens_figure

        if self.missing is not None:
            return message_figure(f"Tokens of {self.edit}", self.missing)
        if self.data is not None and self.data.missing is None:
            from reftlab.plotting.lens import two_lenses_figure

            return two_lenses_figure(self.edit, self.labels, self._pairs(), self.data._pairs())
        return tokens_figure(self.edit, self.labels, self._pairs())

    def _pairs(self) -> list[tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
        """Texts and changes of the promoted and the suppressed tokens of each direction."""
        return [
            ([(t.text, t.change) for t in up], [(t.text, t.change) for t in down])
            for up, down in zip(self.promoted, self.suppressed, strict=True)
        ]

    def _repr_html_(self) -> str:
        import html

        if self.missing is not None:
            return f"<p>{html.escape(self.missing)}</p>"
        return str(self.to_frame().to_html(index=False, float_format="{:+.2f}".format))

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"TokenEffects({self.edit!r}: not available, {self.missing})"
        first = "; ".join(
            f"{label}: {' '.join(token.text for token in tokens[:3])}"
            for label, tokens in zip(self.labels, self.promoted, strict=True)
        )
        return f"TokenEffects({self.edit!r}: {first})"


class Lens:
    """The model's own way from the residual stream to logits: final norm, then unembedding.

    Attributes:
        missing: why the model has none, or None.
        width: features of the residual stream.
        stream: module names and sides whose values are the residual stream, or are added to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.missing: str | None = None
        self.stream: set[tuple[str, str]] = set()
        self.width = 0
        try:
            self._own_norm = _module(model, "final_norm.output")
            head = _module(model, "unembed")
        except AddressError as error:
            self.missing = (
                f"{type(model).__name__} has no final norm and unembedding that reftlab can find ({error}), "
                "so a direction cannot be read as tokens"
            )
            return
        # In float32, whatever the model's type: the effect of a small write is lost in bfloat16.
        self._norm, self._head = (copy.deepcopy(module).float() for module in (self._own_norm, head))
        weight = getattr(self._norm, "weight", None)
        self.width = 0 if weight is None else len(weight)
        for name in ("blocks[*].output", "blocks[*].input", "blocks[*].attn.output", "blocks[*].mlp.output",
                     "embed.output", "final_norm.input"):  # fmt: skip
            self.stream |= {(site.module, site.side) for site in resolve(parse_path(name), model)}

    @torch.no_grad()
    def logits(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n vocabulary"]:
        """Read vectors as logits, in float32, returned on the CPU."""
        parameter = next(self._head.parameters())
        found: Tensor = self._head(self._norm(vectors.to(parameter.device, torch.float32)))
        return found.float().cpu()

    @contextlib.contextmanager
    def watching(self, act: Callable[..., None]) -> Iterator[None]:
        """Call `act(module, args, kwargs, output)` whenever the model's final norm runs."""
        handle = self._own_norm.register_forward_hook(act, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def check(self, vectors: Float[Tensor, "n width"], logits: Float[Tensor, "n vocabulary"]) -> None:
        """Compare with the logits that the model itself gave for these vectors; sets `missing`."""
        own = self.logits(vectors)
        pairs = torch.stack([own - own.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True)])
        likeness = torch.nn.functional.cosine_similarity(pairs[0], pairs[1], dim=1).min()
        if not float(likeness) > AGREES:
            self.missing = (
                "reading the final norm's input with norm and unembedding does not give this model's own "
                f"logits (correlation {float(likeness):.2f}), as in models that do more in between; so a "
                "direction cannot be read as tokens"
            )


@torch.no_grad()
def token_effects(
    lens: Lens,
    tokenizer: Any,
    directions: Directions,
    centre: Float[Tensor, " width"] | None,
    *,
    top: int = 8,
    caveat: str = "",
    data_lens: DataLens | None = None,
) -> TokenEffects:
    """Find the tokens that each write direction promotes and suppresses; see `TokenEffects`.

    Args:
        lens: the model's readout.
        tokenizer: to name the tokens.
        directions: the edit's directions.
        centre: h̄, `(width,)`; None where the edited tokens have none.
        top: how many tokens of each kind.
        caveat: kept with the result.
        data_lens: a lens fitted at the edit's site; with it the result has both lists.
    """
    width = directions.write.shape[1]
    missing = lens.missing
    if missing is None and centre is None:
        missing = "the edited tokens do not reach the final norm in the base run"
    step = directions.write * directions.rms[:, None]
    other: TokenEffects | None = None
    if data_lens is not None:
        why = missing or data_lens.missing
        if why is not None or centre is None:
            other = TokenEffects(directions.edit, (), (), (), why, lens="data lens")
        else:
            carried = data_lens.carried(step)
            other = _effects(lens, tokenizer, directions, centre, carried, top, data_lens.caveat, "data lens")
    if missing is None and width != lens.width:
        missing = (
            f"this edit writes vectors of {width} features and the residual stream has {lens.width}, so "
            "its directions cannot be read as tokens"
        )
    if missing is not None or centre is None:
        return TokenEffects(directions.edit, (), (), (), missing, data=other, data_lens=data_lens)
    found = _effects(lens, tokenizer, directions, centre, step, top, caveat, "logit lens")
    return replace(found, data=other, data_lens=data_lens)


def _effects(
    lens: Lens,
    tokenizer: Any,
    directions: Directions,
    centre: Float[Tensor, " width"],
    step: Float[Tensor, "direction width"],
    top: int,
    caveat: str,
    name: str,
) -> TokenEffects:
    """The tokens that steps of what enters the final norm promote and suppress."""
    # One call for all: rows h̄ + s u, then rows h̄ − s u.
    plus, minus = lens.logits(torch.cat([centre + step, centre - step])).chunk(2)
    change = (plus - minus) / 2
    change = change - change.mean(1, keepdim=True)
    top = min(top, change.shape[1])
    return TokenEffects(
        directions.edit,
        directions.labels,
        tuple(_strongest(row, top, tokenizer) for row in change),
        tuple(_strongest(row, top, tokenizer, lowest=True) for row in change),
        None,
        caveat,
        name,
    )


def readable_token(tokenizer: Any, number: int) -> str:
    """A token as text that can be read.

    Spaces are `␣`, line breaks `⏎`, tabs `⇥`. A byte-level piece that is not whole characters shows
    its bytes, `‹F0 9F›`; characters that cannot be seen show their code, `‹U+200D›`.
    """
    piece = tokenizer.convert_ids_to_tokens(number)
    if piece is None:
        return f"‹token {number}›"
    piece = str(piece)
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return _from_bytes(bytes([int(piece[3:5], 16)]))
    if number in getattr(tokenizer, "all_special_ids", ()):
        return piece
    text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
    if "▁" in piece:
        return _visible(piece.replace("▁", " "))
    if text != piece and all(character in _byte_of() for character in piece):
        return _from_bytes(bytes(_byte_of()[character] for character in piece))
    return _visible(text or piece)


def _strongest(
    change: Float[Tensor, " vocabulary"], top: int, tokenizer: Any, lowest: bool = False
) -> tuple[TokenEffect, ...]:
    numbers: Sequence[int] = change.topk(top, largest=not lowest).indices.tolist()
    return tuple(TokenEffect(n, readable_token(tokenizer, n), float(change[n])) for n in numbers)


def _module(model: nn.Module, alias: str) -> nn.Module:
    (site,) = resolve(parse_path(alias), model)
    return model.get_submodule(site.module)


def _from_bytes(data: bytes) -> str:
    """Decode UTF-8 and make it visible; bytes that are no whole character become `‹F0 9F›`."""
    parts = re.split("([\udc80-\udcff]+)", data.decode("utf-8", errors="surrogateescape"))
    # `re.split` puts what the group matched, the stray bytes, at every other place.
    parts[1::2] = ["‹" + " ".join(f"{ord(c) - 0xDC00:02X}" for c in part) + "›" for part in parts[1::2]]
    parts[::2] = [_visible(part) for part in parts[::2]]
    return "".join(parts)


def _visible(text: str) -> str:
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    alone = all(unicodedata.category(c)[0] in "CMZ" for c in text)
    return "".join(
        f"‹U+{ord(c):04X}›" if unicodedata.category(c) == "Cc" or (alone and c != "␣") else c for c in text
    )


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + n): b for n, b in enumerate(moved)}}
