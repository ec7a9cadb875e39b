"""What drives an edit: the tokens and texts at which its read directions find the most and the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "Against", "Context", "Contexts", "Drive", "TokenMean"]

MEASURES = {
    "variance": "share of the vectors' variance along it",
    "kurtosis": "excess kurtosis: 0 for a Gaussian, large where few tokens drive it",
    "largest": "largest distance of a token from the mean, in standard deviations",
}


@dataclass(frozen=True)
class Against:
    """How a read direction stands against random ones.

    Attributes:
        measure: of `MEASURES`.
        value: of the direction.
        low, middle, high: quantiles 2.5%, 50% and 97.5% of random directions.
        p: how often a random direction has as much or more, `(1 + count) / (1 + draws)`.
    """

    measure: str
    value: float
    low: float
    middle: float
    high: float
    p: float


@dataclass(frozen=True)
class Context:
    """A text, and what a read direction finds at each of its tokens.

    Attributes:
        example: number of the example.
        place: number of the token that this text is here for.
        tokens: the text, readable; see `readable_token`.
        values: `v · h` at each token, in the units of the site.
        edited: whether the edit acts on each.
    """

    example: int
    place: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    edited: tuple[bool, ...]

    @property
    def token(self) -> str:
        """The token that this text is here for."""
        return self.tokens[self.place]

    @property
    def value(self) -> float:
        """What is found there."""
        return self.values[self.place]


@dataclass(frozen=True)
class TokenMean:
    """One token of the vocabulary: what is found where it stands, on average.

    Attributes:
        text: the token, readable.
        mean: of `v · h` over its places.
        count: number of places.
    """

    text: str
    mean: float
    count: int


@dataclass(frozen=True)
class Drive:
    """What drives one read direction.

    Attributes:
        label: of the direction, as in `Directions`.
        mean, std: of `v · h` over all tokens, in the units of the site.
        most: the texts with the largest values, each at its largest one, largest first.
        least: the texts with the smallest values, smallest first.
        highest, lowest: the tokens of the vocabulary with the largest and the smallest means.
        against: the direction beside random ones, a measure each.
    """

    label: str
    mean: float
    std: float
    most: tuple[Context, ...]
    least: tuple[Context, ...]
    highest: tuple[TokenMean, ...]
    lowest: tuple[TokenMean, ...]
    against: tuple[Against, ...]

    def z(self, value: float) -> float:
        """A value in standard deviations from the mean."""
        return (value - self.mean) / self.std if self.std > 0 else 0.0


@dataclass(frozen=True)
class Contexts:
    """The tokens and texts that drive each read direction of an edit, the most and the least.

    For a unit read direction v and the vector h that reaches the edit's site, `v · h` at *every* token of
    the examples, whether the edit acts there or not. h is taken before any edit of this site, with edits of
    earlier sites in force. What an edit is driven by where it does not act is what it would do there.

    Whatever direction is looked at has a largest token. Whether this one is special is told by random
    directions on the same vectors: their share of the variance, excess kurtosis and largest z-score.

    A token that stands in several examples with the same tokens before it, such as the first ones of a chat
    template, has the same vector in all of them, and counts once.

    Attributes:
        edit: key of the edit.
        site: its site.
        directions: what drives each read direction; the constant one reads nothing.
        tokens, examples: how many there were, repeats among them.
        draws: how many random directions.
        note: what was left out, or an empty text.
        missing: why there is nothing, or None.
    """

    edit: str
    site: str
    directions: tuple[Drive, ...]
    tokens: int
    examples: int
    draws: int
    note: str = ""
    missing: str | None = None

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.geometry.saying import of_contexts

        return of_contexts(self)

    def to_frame(self) -> pd.DataFrame:
        """One line a text: edit, direction, end (`most`, `least`), place, example, token, value, z."""
        import pandas as pd

        lines = [
            (
                self.edit, drive.label, end, place, one.example, one.place, one.token, one.value,
                drive.z(one.value), one.edited[one.place],
            )
            for drive in self.directions
            for end, some in (("most", drive.most), ("least", drive.least))
            for place, one in enumerate(some, 1)
        ]  # fmt: skip
        columns = [
            "edit",
            "direction",
            "end",
            "place",
            "example",
            "position",
            "token",
            "value",
            "z",
            "edited",
        ]
        return pd.DataFrame(lines, columns=columns)

    def controls(self) -> pd.DataFrame:
        """One line a direction and measure: value, quantiles of random directions, p."""
        import pandas as pd

        lines = [
            (self.edit, drive.label, one.measure, one.value, one.low, one.middle, one.high, one.p)
            for drive in self.directions
            for one in drive.against
        ]
        columns = ["edit", "direction", "measure", "value", "low", "middle", "high", "p"]
        return pd.DataFrame(lines, columns=columns)

    def plot(self) -> Figure:
        """Means of the most extreme tokens of each direction, and the direction beside random ones."""
        from reftlab.plotting import message_figure
        from reftlab.plotting.contexts import contexts_figure

        if self.missing is not None:
            return message_figure(f"What drives {self.edit}", self.missing)
        return contexts_figure(
            self.edit,
            [
                (
                    drive.label,
                    [
                        (one.text, drive.z(one.mean), one.count)
                        for one in (*drive.highest, *drive.lowest[::-1])
                    ],
                    [
                        (one.measure, one.value, (one.low, one.middle, one.high), one.p)
                        for one in drive.against
                    ],
                )
                for drive in self.directions
            ],
        )

    def inline_html(self) -> str:
        """The texts with every token marked, which a report shows below the figure."""
        from reftlab.explaining.geometry.contexts_html import texts_html

        return texts_html(self)

    def _repr_html_(self) -> str:
        from reftlab.explaining.geometry.contexts_html import contexts_html

        return contexts_html(self)

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"Contexts({self.edit!r}: not available, {self.missing})"
        shown = "; ".join(
            f"{drive.label}: {drive.most[0].token}, z {drive.z(drive.most[0].value):.2g}"
            for drive in self.directions[:3]
        )
        return (
            f"Contexts({self.edit!r}: {self.tokens} tokens of {self.examples} texts; most driven by {shown})"
        )
