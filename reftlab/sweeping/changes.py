"""What stands in the place of a run's own vectors: another run's, a fill, or the vectors with noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reftlab.errors import DataError
from reftlab.sweeping.passes import Patch, Recorded
from reftlab.sweeping.prompts import Column
from reftlab.sweeping.sites import SweptSite

__all__ = ["Changes", "Direction", "Kind", "checked_fill", "means_of"]

Kind = Literal["patch", "ablate", "noise"]
Direction = Literal["denoise", "noise"]


@dataclass(frozen=True)
class Changes:
    """What is put into each cell.

    Attributes:
        kind: values of the other run, a fill, or Gaussian noise on top.
        direction: into which run the values of the other go: `denoise` into the corrupted one.
        fill: for `ablate`: `zero`, `mean`, `position mean`, a vector, or vectors by site.
        scale: for `noise`: its standard deviation, in standard deviations of the site's own numbers.
        samples: for `noise`: how many draws each cell is the mean of.
        seed: for `noise`.
        means: for a mean: gives it by site, see `means_of`; asked for once a cell needs it.
    """

    kind: Kind = "patch"
    direction: Direction = "denoise"
    fill: Any = "zero"
    scale: float = 3.0
    samples: int = 10
    seed: int = 0
    means: Callable[[], Mapping[str, Any]] | None = None

    @property
    def into_corrupt(self) -> bool:
        """Whether the run that is changed is the corrupted one."""
        return self.kind == "patch" and self.direction == "denoise"

    @property
    def runs(self) -> int:
        """How many runs a cell takes."""
        return self.samples if self.kind == "noise" else 1

    def columns(self, column: Column) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A column's tokens in the run that is changed, and in the one that values come from."""
        return (column.corrupt, column.clean) if self.into_corrupt else (column.clean, column.corrupt)

    def patches(
        self,
        site: SweptSite,
        head: int,
        number: int,
        column: Column,
        base: Recorded,
        source: Recorded | None,
        name: str,
        unchanged: int = 0,
    ) -> list[Patch] | None:
        """The patches of a cell's runs; None where they would change nothing.

        Args:
            site: the site.
            head: which of its parts.
            number: the column's number.
            column: the column.
            base: the run that is changed.
            source: the other run.
            name: what tells this cell's noise from that of all others.
            unchanged: before which token both runs are the same.
        """
        into, out_of = self.columns(column)
        features = site.parts[head]
        values = base.values[site.name]
        own = _taken(values, into, features)
        where = torch.tensor(into)
        if self.kind == "noise":
            spread = float(values.float().std()) * self.scale
            return [Patch(site, where, new, features) for new in self._noisy(own, spread, name)]
        if self.kind == "patch":
            assert source is not None
            new = _taken(source.values[site.name], out_of, features)
            if into == out_of and max(into) < unchanged and _rounding(new, own):
                return None
        else:
            new = self._filled(site, number, own, features)
        return None if torch.equal(new, own) else [Patch(site, where, new, features)]

    def _noisy(self, own: Tensor, spread: float, name: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(_seed(self.seed, name))
        # Drawn on the CPU, so that a seed means the same on every device.
        draws = torch.randn(self.samples, *own.shape, generator=generator)
        return [(own.float() + spread * draw.to(own.device)).to(own.dtype) for draw in draws]

    def _filled(self, site: SweptSite, number: int, own: Tensor, features: Tensor | None) -> Tensor:
        fill = self.fill
        if isinstance(fill, Mapping):
            fill = fill[site.name] if site.name in fill else fill[site.path]
        if isinstance(fill, str) and fill == "zero":
            return torch.zeros_like(own)
        if isinstance(fill, str):
            assert self.means is not None
            fill = self.means()[site.name]
            fill = fill[number] if isinstance(fill, list) else fill
        fill = fill.to(own)
        fill = fill if features is None else fill[..., features.to(fill.device)]
        return fill.expand_as(own).contiguous()


def _taken(values: Tensor, columns: tuple[int, ...], features: Tensor | None) -> Tensor:
    chosen = values[list(columns)]
    return chosen if features is None else chosen[:, features.to(chosen.device)]


def _rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding makes of the same numbers."""
    bound = torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max())
    return float((one - other).abs().max()) <= bound


def _seed(seed: int, name: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest())


def checked_fill(fill: Any, sites: Sequence[SweptSite]) -> Any:
    """What ablation puts in, after a look at its form.

    Raises:
        DataError: an unknown word, or a vector of another width than the site's.
    """
    if isinstance(fill, str):
        if fill not in ("zero", "mean", "position mean"):
            raise DataError(
                f"fill={fill!r}: expected 'zero', 'mean' (over all tokens of all clean prompts), "
                "'position mean' (over the clean prompts, for each column), a vector, or a mapping from "
                "sites to vectors"
            )
        return fill
    given = {site.name: _of_site(fill, site) for site in sites}
    for site in sites:
        vector, width = given[site.name], site.place.site_width
        if not isinstance(vector, Tensor) or vector.shape != (width,):
            what = tuple(vector.shape) if isinstance(vector, Tensor) else repr(vector)
            raise DataError(f"fill: {site.name} needs a vector of {width} numbers, and was given {what}")
    return given


def _of_site(fill: Any, site: SweptSite) -> Any:
    if not isinstance(fill, Mapping):
        return fill
    for name in (site.name, site.path):
        if name in fill:
            return fill[name]
    raise DataError(f"fill: there is none for {site.name}; it names {', '.join(map(str, fill))}")


def means_of(
    recorded: Sequence[Recorded], sites: Sequence[SweptSite], columns: Sequence[Sequence[Column]], fill: str
) -> dict[str, Any]:
    """Mean vectors over prompts.

    Args:
        recorded: each clean prompt's run.
        sites: the sites.
        columns: each prompt's columns.
        fill: `mean`, over all tokens of all clean prompts; or `position mean`, over the clean prompts, for
            each column.

    Returns:
        By site `(width,)`; or, for `position mean`, a list with `(token, width)` for each column.

    Raises:
        DataError: a mean over prompts of one prompt, or of columns of different numbers of tokens.
    """
    if fill == "mean":
        return {
            site.name: torch.cat([run.values[site.name].float() for run in recorded]).mean(0)
            for site in sites
        }
    if len(recorded) < 2:
        raise DataError(
            "fill='position mean' is a mean over prompts, and there is one; take 'mean', or give more"
        )
    for number, sizes in enumerate(zip(*[[len(c.clean) for c in own] for own in columns], strict=True)):
        if len(set(sizes)) > 1:
            raise DataError(
                f"fill='position mean': column {number} has {list(sizes)} tokens in the prompts; it "
                "needs as many in all of them, or take 'mean'"
            )
    return {
        site.name: [
            torch.stack(
                [
                    run.values[site.name][list(own[number].clean)].float()
                    for run, own in zip(recorded, columns, strict=True)
                ]
            ).mean(0)
            for number in range(len(columns[0]))
        ]
        for site in sites
    }
