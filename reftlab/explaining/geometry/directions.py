"""What an edit reads and what it writes: its linear part, taken apart into directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.interventions import Affine, Intervention

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.explaining.geometry.vectors import EditVectors
    from reftlab.runtime import BoundModel

__all__ = ["BASES", "CONSTANT", "Directions", "directions_of", "find_directions", "thin_svd"]

CONSTANT = "constant"
"""Label of the direction of the constant part."""

Basis = Literal["svd", "linearised", "written"]

BASES: dict[Basis, str] = {
    "svd": "singular value decomposition of the edit's linear part",
    "linearised": "the edit is not linear: singular value decomposition of its Jacobian, "
    "linearised at the mean of the vectors it edits",
    "written": "the edit's linear part has no few directions of its own (it acts on all features alike, "
    "or copies from elsewhere): principal directions of the vectors that it wrote for these examples",
}

_MOST = 16
_WRITTEN = 4
_SKETCH = 64
_UNSEEN = 0.01


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions that an edit reads and writes.

    The edit adds `Δ(h) = Σ_k u_k · a_k(h)` to a vector h, with orthonormal write directions `u_k`
    and amounts `a_k(h) = u_k · Δ(h)`. Where the edit is affine, `Δ(h) = M h + c`, the u_k are the
    left singular vectors of M, the read directions `v_k` its right ones, and
    `a_k(h) = σ_k (v_k · h) + u_k · c`. What of the constant part lies outside the span of the u_k is
    one more direction, `constant`, which reads nothing. Each pair (u_k, v_k) is turned so that the
    mean amount is positive.

    Singular vectors are one choice of basis: where two singular values are close, the pairs could
    be mixed among each other and be as right.

    Attributes:
        edit: key of the edit.
        basis: where the directions come from, see `BASES`.
        labels: `1`, `2`, … by falling singular value (by falling amount for `written`), and
            `constant`.
        write: unit vectors u_k, `(direction, width)`.
        read: unit vectors v_k, `(direction, width)`; 0 where nothing is read.
        gain: singular values σ_k: amount written for each unit read, `(direction,)`; for `written`
            the length of `Mᵀ u_k`.
        amounts: a_k of each vector, `(vector, direction)`, in the units of the site.
        explained: share of the squared length of all written vectors that lies along these
            directions, 0 to 1.
        rank: number of singular values above 1e-5 of the largest; None where it was not counted.
        spectrum: all of these singular values, also those past the directions kept, `(rank,)`,
            descending; None where they were not found.
    """

    edit: str
    basis: Basis
    labels: tuple[str, ...]
    write: Float[Tensor, "direction width"]
    read: Float[Tensor, "direction width"]
    gain: Float[Tensor, " direction"]
    amounts: Float[Tensor, "vector direction"]
    explained: float
    rank: int | None
    spectrum: Float[Tensor, " rank"] | None = None

    @property
    def mean(self) -> Float[Tensor, " direction"]:
        """Mean amount written along each direction."""
        return self.amounts.mean(0)

    @property
    def std(self) -> Float[Tensor, " direction"]:
        """Standard deviation of the amount over the vectors."""
        return self.amounts.std(0, correction=0)

    @property
    def rms(self) -> Float[Tensor, " direction"]:
        """Typical amount: root of the mean square."""
        return self.amounts.square().mean(0).sqrt()

    @property
    def share(self) -> Float[Tensor, " direction"]:
        """Each direction's part of the squared length of everything written."""
        energy = self.amounts.square().sum(0)
        return self.explained * energy / energy.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def __len__(self) -> int:
        return len(self.labels)

    def to_frame(self) -> pd.DataFrame:
        """One line a direction: edit, direction, basis, gain, mean, std, rms, share."""
        import pandas as pd

        return pd.DataFrame(
            {
                "edit": self.edit,
                "direction": list(self.labels),
                "basis": self.basis,
                "gain": self.gain.numpy(),
                "mean": self.mean.numpy(),
                "std": self.std.numpy(),
                "rms": self.rms.numpy(),
                "share": self.share.numpy(),
            }
        )

    def plot(self) -> Figure:
        from reftlab.plotting import directions_figure

        return directions_figure(
            self.edit, self.labels, self.gain.tolist(), self.mean.tolist(), self.std.tolist()
        )

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False, float_format="{:.3g}".format))

    def __repr__(self) -> str:
        gains = ", ".join(f"{gain:.3g}" for gain in self.gain.tolist())
        return f"Directions({self.edit!r}: {len(self)} by {self.basis}, gains {gains})"


class Svd(NamedTuple):
    """`write` `(k, width)`, `values` `(k,)`, `read` `(k, width)`; M = Σ values_k write_k read_kᵀ."""

    write: Float[Tensor, "k width"]
    values: Float[Tensor, " k"]
    read: Float[Tensor, "k width"]


def thin_svd(write: Float[Tensor, "width rank"], read: Float[Tensor, "rank width"]) -> Svd:
    """Singular value decomposition of `write @ read` without ever forming it.

    `write = Q_w R_w` and `readᵀ = Q_r R_r` by QR, then the SVD of the small `R_w R_rᵀ = U Σ Vᵀ`
    gives write directions `Q_w U` and read directions `Q_r V`. Work O(width · rank²), in float64.
    Singular values up to 1e-5 of the largest are left out.

    >>> thin_svd(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 3.0]])).values
    tensor([6.])
    """
    if write.shape[1] == 0:
        return Svd(read.new_zeros(read.shape).float(), read.new_zeros(0).float(), read.float())
    q_write, r_write = torch.linalg.qr(write.double())
    q_read, r_read = torch.linalg.qr(read.double().T)
    left, values, right = torch.linalg.svd(r_write @ r_read.T, full_matrices=False)
    kept = values > 1e-5 * values.max().clamp(min=1e-30)
    left, values, right = left[:, kept], values[kept], right[kept]
    return Svd((q_write @ left).T.float(), values.float(), (right @ q_read.T).float())


def find_directions(
    built: nn.Module, strength: float, vectors: EditVectors, subspace: tuple[int, ...] | None = None
) -> Directions:
    """Find the directions that an edit reads and writes.

    Args:
        built: the built intervention.
        strength: the edit's strength, which multiplies all that it writes.
        vectors: what it was given and made; they say how much is written along each direction, and
            where a non-linear edit is linearised.
        subspace: the directions of its basis that the edit is confined to, or None.

    Returns:
        At most 16 directions and the constant one.
    """
    delta = vectors.delta
    # The affine form is that of the whole intervention.
    affine = built.affine() if isinstance(built, Intervention) and subspace is None else None
    slope: _Affine | _Jacobian
    if isinstance(affine, Affine):
        slope = _Affine(strength * affine.write.float().cpu(), affine.read.float().cpu())
    else:
        slope = _Jacobian(built, strength, vectors, subspace)
    svd = slope.svd()
    if svd is not None:
        spread = delta - (delta @ svd.write.T) @ svd.write
        outside = spread - spread.mean(0)
        if _energy(outside) <= _UNSEEN * _energy(delta):
            return _finished(vectors, slope.basis, svd, spread.mean(0))
    kept = _principal(delta)
    pulled = slope.pull(kept)
    gain = pulled.norm(dim=1)
    read = torch.where(gain[:, None] > 1e-6, pulled / gain[:, None].clamp(min=1e-6), 0.0)
    return _finished(vectors, "written", Svd(kept, gain, read), None)


def directions_of(reft: BoundModel, vectors: Mapping[str, EditVectors]) -> dict[str, Directions]:
    """The directions of bound edits, see `find_directions`.

    Args:
        reft: the bound model.
        vectors: what edits were given and made, by `BoundEdit.key`.

    Returns:
        By key, in the order in which the edits act.
    """
    return {
        b.key: find_directions(
            reft.interventions[b.module], b.edit.strength, vectors[b.key], b.edit.subspace
        )
        for b in reft.edits
        if b.key in vectors
    }  # fmt: skip


class _Affine(NamedTuple):
    """A linear part that is known: `write @ read`."""

    write: Float[Tensor, "width rank"]
    read: Float[Tensor, "rank width"]
    basis: Basis = "svd"

    def svd(self) -> Svd | None:
        width, rank = self.write.shape
        # A scaled identity has no directions of its own: any basis would be as right.
        return None if rank > width // 2 and rank > _MOST else thin_svd(self.write, self.read)

    def pull(self, write: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
        """`Mᵀ u` for each row u."""
        return (write @ self.write) @ self.read


class _Jacobian:
    """The linear part of any edit at the mean of the vectors that it edits, by autograd.

    Interventions treat the rows of a batch apart from each other, so a batch of copies of the mean
    vector gives one product with the Jacobian for each row.
    """

    basis: Basis = "linearised"

    def __init__(
        self, built: nn.Module, strength: float, vectors: EditVectors, subspace: tuple[int, ...] | None
    ) -> None:
        self.built, self.strength, self.subspace = built, strength, subspace
        self.point, self.source = vectors.base.mean(0), vectors.source
        parameter = next(iter([*built.parameters(), *built.buffers()]), self.point)
        self.device = parameter.device

    def svd(self) -> Svd | None:
        """By a random sketch (Halko, Martinsson, Tropp 2011), exact up to rank 64."""
        width = len(self.point)
        count = min(_SKETCH, width)
        generator = torch.Generator().manual_seed(0)
        try:
            rows = self.pull(torch.randn(count, width, generator=generator))
            read = torch.linalg.qr(rows.T.double()).Q.T.float()
            image = self.push(read)
        except (RuntimeError, TypeError):
            return None
        found = thin_svd(image.T, read)
        full = len(found.values) > min(_SKETCH - 16, max(1, width // 2))
        return None if full else found

    def pull(self, write: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
        """`Jᵀ u` for each row u; 0 where autograd finds no way back."""
        with torch.enable_grad():
            base, delta = self._copies(len(write))
            if not delta.requires_grad:
                return torch.zeros_like(write)
            (found,) = torch.autograd.grad(delta, base, write.to(delta), allow_unused=True)
        return torch.zeros_like(write) if found is None else found.detach().float().cpu()

    def push(self, read: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
        """`J v` for each row v: the derivative of `Jᵀ u`, which is linear in u, by u."""
        with torch.enable_grad():
            base, delta = self._copies(len(read))
            if not delta.requires_grad:
                return torch.zeros_like(read)
            start = torch.zeros_like(delta, requires_grad=True)
            (back,) = torch.autograd.grad(delta, base, start, create_graph=True)
            (found,) = torch.autograd.grad(back, start, read.to(delta))
        return found.detach().float().cpu()

    def _copies(self, count: int) -> tuple[Tensor, Tensor]:
        base = self.point.to(self.device).expand(count, -1).clone().requires_grad_()
        source = None if self.source is None else self.source.to(self.device).expand(count, -1)
        if not isinstance(self.built, Intervention):
            return base, self.strength * (self.built(base, source) - base)
        mask = None
        if self.subspace is not None:
            mask = torch.zeros(count, self.built.directions or 0, dtype=torch.bool)
            mask[:, list(self.subspace)] = True
        # Each copy stands alone, as the first token of a row of its own.
        new = self.built.edited(
            base,
            source,
            subspace=mask,
            positions=torch.zeros(count, dtype=torch.long),
            rows=torch.arange(count),
        )
        return base, self.strength * (new - base)


def _principal(delta: Float[Tensor, "vector width"]) -> Float[Tensor, "k width"]:
    """The few orthonormal directions that hold 99% of the written vectors, at most 4."""
    _, values, axes = torch.linalg.svd(delta.double(), full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    count = min(_WRITTEN, int((share < 0.99).sum()) + 1, int((values > 1e-5 * values.max()).sum()))
    kept: Tensor = axes[: max(1, count)].float()
    return kept


def _finished(vectors: EditVectors, basis: Basis, svd: Svd, rest: Tensor | None) -> Directions:
    """Add the constant direction, measure the amounts, and turn each direction."""
    delta, spectrum = vectors.delta, None if basis == "written" else svd.values
    write, gain, read = svd.write[:_MOST], svd.values[:_MOST], svd.read[:_MOST]
    labels = [str(number) for number in range(1, len(write) + 1)]
    typical = (_energy(delta) / max(1, len(delta))) ** 0.5
    if rest is not None and float(rest.norm()) > 1e-3 * typical:
        write = torch.cat([write, (rest / rest.norm())[None]])
        read, gain = torch.cat([read, torch.zeros(1, read.shape[1])]), torch.cat([gain, torch.zeros(1)])
        labels.append(CONSTANT)
    amounts = delta @ write.T
    sign = torch.where(amounts.mean(0) < 0, -1.0, 1.0)
    write, read, amounts = write * sign[:, None], read * sign[:, None], amounts * sign
    explained = min(1.0, _energy(amounts) / max(_energy(delta), 1e-30))
    rank = None if spectrum is None else len(spectrum)
    return Directions(
        vectors.edit, basis, tuple(labels), write, read, gain, amounts, explained, rank, spectrum
    )


def _energy(vectors: Tensor) -> float:
    return float(vectors.double().square().sum())
