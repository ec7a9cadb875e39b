"""What the split of effects into direct and total returns."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.explaining.geometry.tokens import readable_token
from reftlab.measuring import Estimate, mean_of, share_kept
from reftlab.sweeping.drawing import inline
from reftlab.sweeping.metric import Measured

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["DirectEffect", "DirectEffects", "TokenSplit", "split_effect"]

_NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class TokenSplit:
    """How an edit changes one token's logit.

    Attributes:
        id: number of the token; text: the token, readable.
        direct, total: mean change of its logit against the mean of the vocabulary, in logits, by the
            residual stream alone and in all.
    """

    id: int
    text: str
    direct: float
    total: float


@dataclass(frozen=True, eq=False)
class DirectEffect:
    """The effect of one edit on the next token, split.

    Attributes:
        edit: name of the edit.
        sites: where it acts.
        at_last: at how many prompts' last token it acts; where that is 0 its direct effect is 0 by
            construction, since nothing that it writes is in that token's residual stream.
        direct, total: mean change of the metric by the residual stream alone, and in all.
        share: `direct / total` of the metric; NaN where the interval of the total holds 0.
        logit_share: share of the change of all logits that is direct, `Σ d·t / Σ t·t` over examples, with
            d and t the direct and the total change of the logits less their mean over the vocabulary: 1
            where they are equal, 0 where they are orthogonal.
        direct_logits, total_logits: `(vocab,)` mean of d and of t over examples, in logits.
        tokens: those that are raised or lowered most by one of the two, by total change.
        missing: why there are no numbers, or None.
    """

    edit: str
    sites: tuple[str, ...]
    at_last: int
    direct: Estimate
    total: Estimate
    share: Estimate
    logit_share: Estimate
    direct_logits: Float[Tensor, " vocab"]
    total_logits: Float[Tensor, " vocab"]
    tokens: tuple[TokenSplit, ...]
    missing: str | None = None

    @classmethod
    def unavailable(cls, edit: str, sites: tuple[str, ...], why: str) -> DirectEffect:
        empty = torch.zeros(0)
        return cls(edit, sites, 0, _NOTHING, _NOTHING, _NOTHING, _NOTHING, empty, empty, (), why)

    @property
    def in_words(self) -> str:
        """Its shares, one a line."""
        return f"share {self.share:.2f}\nof all logits {self.logit_share:.2f}"

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"DirectEffect({self.edit!r}: not available, {self.missing})"
        return f"DirectEffect({self.edit!r}: direct {self.direct} of {self.total}, share {self.share})"


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """The effects of all edits on the next token, split into direct and total.

    Attributes:
        name: what was measured; unit: of its numbers.
        context: whether the other edits are off (`alone`) or on (`together`).
        effects: one an edit.
        missing: why there are none, or None.
    """

    name: str
    unit: str
    context: str
    effects: tuple[DirectEffect, ...]
    missing: str | None = None

    def __getitem__(self, edit: str) -> DirectEffect:
        return {effect.edit: effect for effect in self.effects}[edit]

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.causes.saying import of_direct

        return of_direct(self)

    def to_frame(self) -> pd.DataFrame:
        """One line an edit: its direct and total effect and their shares, with ends of intervals."""
        import pandas as pd

        lines = []
        for effect in self.effects:
            line: dict[str, Any] = {"edit": effect.edit, "site": ", ".join(effect.sites)}
            line["prompts_at_last"] = effect.at_last
            for name in ("direct", "total", "share", "logit_share"):
                found: Estimate = getattr(effect, name)
                line |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            lines.append(line | {"missing": effect.missing or ""})
        return pd.DataFrame(lines)

    def tokens_to_frame(self) -> pd.DataFrame:
        """One line an edit and token: edit, id, token, direct, total, in logits."""
        import pandas as pd

        lines = [(e.edit, t.id, t.text, t.direct, t.total) for e in self.effects for t in e.tokens]
        return pd.DataFrame(lines, columns=["edit", "id", "token", "direct", "total"])

    def plot(self) -> Figure:
        """Direct and total effect of each edit, and the tokens that they raise and lower most."""
        from reftlab.plotting.direct import direct_figure
        from reftlab.plotting.style import message_figure

        known = [effect for effect in self.effects if effect.missing is None]
        if self.missing is not None or not known:
            why = self.missing or "; ".join(e.missing or "" for e in self.effects) or "there are no edits"
            return message_figure("Direct and total effects", why)
        unit = f" ({self.unit})" if self.unit else ""
        return direct_figure(
            [(e.edit, _ends(e.direct), _ends(e.total), e.in_words) for e in known],
            {e.edit: [(t.text, t.direct, t.total) for t in e.tokens] for e in known},
            f"change of {self.name}{unit}",
        )

    def _repr_html_(self) -> str:
        if self.missing is not None:
            return f"<p>{html.escape(self.missing)}</p>"
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}</div>"

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"DirectEffects(not available: {self.missing})"
        parts = [
            f"{e.edit}: not available"
            if e.missing
            else f"{e.edit}: share {e.share:.2f}, of all logits {e.logit_share:.2f}"
            for e in self.effects
        ]
        return f"DirectEffects({self.name}, other edits {_OTHERS[self.context]}; {'; '.join(parts)})"


def _unsigned(found: Estimate) -> Estimate:
    """The same with 0 in place of −0."""
    return replace(found, value=found.value + 0.0, low=found.low + 0.0, high=found.high + 0.0)


def _ends(found: Estimate) -> tuple[float, float, float]:
    return found.value, found.low, found.high


_OTHERS = {"alone": "off", "together": "on"}


def split_effect(
    edit: str,
    sites: tuple[str, ...],
    at_last: int,
    metrics: Sequence[Measured],
    base: Float[Tensor, "example vocab"],
    direct: Float[Tensor, "example vocab"],
    total: Float[Tensor, "example vocab"],
    tokenizer: Any,
    top: int,
    seed: int,
) -> DirectEffect:
    """Compare three runs: without the edit, with its direct path alone, and with all of it.

    Args:
        edit: name of the edit; sites: where it acts; at_last: as in `DirectEffect`.
        metrics: what is measured, for each example.
        base, direct, total: logits of the next token in the three runs.
        tokenizer: to name tokens; top: how many of each kind.
        seed: of the bootstrap.
    """
    # Rows of models that pad their vocabulary hold logits of −∞, which no edit changes.
    changes = [torch.nan_to_num(run - base, nan=0.0) + 0.0 for run in (direct, total)]
    d, t = (change - change.mean(1, keepdim=True) for change in changes)
    bare, by_stream, full = (
        torch.cat([own(row[None]) for own, row in zip(metrics, run, strict=True)]).float()
        for run in (base, direct, total)
    )
    along, length = (d * t).sum(1), (t * t).sum(1)
    means = d.mean(0), t.mean(0)
    chosen: dict[int, None] = {}
    for mean in means:
        count = min(top, len(mean))
        chosen |= dict.fromkeys((*mean.topk(count).indices.tolist(), *(-mean).topk(count).indices.tolist()))
    ids = sorted(chosen, key=lambda number: -float(means[1][number]))
    tokens = [
        TokenSplit(n, readable_token(tokenizer, n), float(means[0][n]), float(means[1][n])) for n in ids
    ]
    return DirectEffect(
        edit,
        sites,
        at_last,
        mean_of(by_stream - bare, seed=seed),
        mean_of(full - bare, seed=seed),
        _unsigned(share_kept(by_stream, bare, full, seed=seed)),
        _unsigned(share_kept(along, torch.zeros_like(along), length, seed=seed)),
        means[0],
        means[1],
        tuple(tokens),
    )
