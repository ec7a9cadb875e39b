"""What a sweep of paths returns."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from reftlab.sweeping.result import t_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["PathResult"]


@dataclass(frozen=True, eq=False)
class PathResult:
    """The metric for every direct path between two heads.

    Attributes:
        metric: what was measured.
        unit: of its numbers.
        direction: `denoise` or `noise`.
        inputs: through which of its inputs receivers hear: `q`, `k`, `v` or `all`.
        senders, receivers: `(block, head)` of each.
        values: the metric `(pair, sender, receiver)`, float64; NaN where the receiver's block is not later.
        clean, corrupt: the metric of the unpatched runs, `(pair,)`.
        seconds: wall-clock time of this call.
    """

    metric: str
    unit: str
    direction: str
    inputs: str
    senders: tuple[tuple[int, int], ...]
    receivers: tuple[tuple[int, int], ...]
    values: Float[np.ndarray, "pair sender receiver"]
    clean: Float[np.ndarray, " pair"]
    corrupt: Float[np.ndarray, " pair"]
    seconds: float

    @property
    def pairs(self) -> int:
        """How many pairs of prompts there are, the n of every interval."""
        return len(self.values)

    @property
    def base(self) -> Float[np.ndarray, " pair"]:
        """The metric of the run that was patched."""
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def effect(self) -> Float[np.ndarray, "pair sender receiver"]:
        """What each path changed: the metric minus that of the unpatched run."""
        return self.values - self.base[:, None, None]

    @property
    def normalised(self) -> Float[np.ndarray, "pair sender receiver"]:
        """The metric on a scale on which the corrupted run is 0 and the clean run 1."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (self.values - self.corrupt[:, None, None]) / (self.clean - self.corrupt)[:, None, None]
        return np.where(np.isfinite(found), found, np.nan)

    def mean(self) -> Float[np.ndarray, "sender receiver"]:
        """Mean effect over the pairs of prompts."""
        return self.effect.mean(0)

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "sender receiver"], Float[np.ndarray, "sender receiver"]]:
        """Ends of the t interval of the mean effect over pairs, `mean ± t·s/√n`; NaN for one pair."""
        return t_interval(self.effect, level)

    def to_frame(self) -> pd.DataFrame:
        """One line a path and pair: sender and receiver by block and head, value, effect, normalised."""
        import pandas as pd

        pair, sender, receiver = (index.ravel() for index in np.indices(self.values.shape))
        frame = pd.DataFrame(
            {
                "pair": pair,
                "sender_block": [self.senders[n][0] for n in sender],
                "sender_head": [self.senders[n][1] for n in sender],
                "receiver_block": [self.receivers[n][0] for n in receiver],
                "receiver_head": [self.receivers[n][1] for n in receiver],
                "value": self.values.ravel(),
                "effect": self.effect.ravel(),
                "normalised": self.normalised.ravel(),
            }
        )
        return frame[frame["value"].notna()].reset_index(drop=True)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The `k` paths with the largest mean effect of either sign, with its t interval and n."""
        import pandas as pd

        mean, (low, high) = self.mean(), self.interval()
        places = np.argsort(-np.abs(np.nan_to_num(mean)), axis=None, kind="stable")
        lines = []
        for sender, receiver in zip(*np.unravel_index(places, mean.shape), strict=True):
            if np.isnan(mean[sender, receiver]):
                continue
            heads = [_named(self.senders[sender]), _named(self.receivers[receiver])]
            ends = low[sender, receiver], high[sender, receiver]
            lines.append((*heads, mean[sender, receiver], *ends, self.pairs))
            if len(lines) == k:
                break
        return pd.DataFrame(lines, columns=["sender", "receiver", "effect", "low", "high", "n"])

    def plot(self) -> Figure:
        """A heat map of mean effects, senders × receivers, as `block.head`; grey where there is no path."""
        from reftlab.plotting.sweep import HeatMap, sweep_figure
        from reftlab.sweeping.drawing import scale_of

        into = {"q": "queries", "k": "keys", "v": "values", "all": "queries, keys and values"}[self.inputs]
        which = "Clean" if self.direction == "denoise" else "Corrupted"
        title = f"{which} senders, heard by receivers in their {into}; "
        if self.pairs == 1:
            title += "1 pair of prompts"
        else:
            low, high = self.interval()
            half = np.nanmax((high - low) / 2) if np.isfinite(high).any() else float("nan")
            title += f"mean over n = {self.pairs} pairs of prompts, 95% t interval at most ±{half:.2g}"
        names = [[_named(head) for head in own] for own in (self.senders, self.receivers)]
        panel = HeatMap(
            "direct paths", self.mean(), names[0], names[1], "sender (block.head)", "receiver (block.head)"
        )
        return sweep_figure([panel], title, scale_of(self.metric, self.unit, "effect"))

    def __repr__(self) -> str:
        count = int(np.isfinite(self.values[0]).sum())
        return (
            f"PathResult({self.metric}; {len(self.senders)} senders × {len(self.receivers)} receivers by "
            f"{self.inputs}; {count} paths; {self.pairs} pair{'s' * (self.pairs != 1)}; {self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        from reftlab.sweeping.drawing import inline

        table = self.top(10).to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}</div>"


def _named(head: tuple[int, int]) -> str:
    return f"{head[0]}.{head[1]}"
