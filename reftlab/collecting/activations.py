"""What `collect` returns: vectors by site, and of which example and token each of them is."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.collecting.arrays import read_array, read_record
from reftlab.errors import ArtifactError, DataError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Activations", "SiteVectors"]

_SHOWN = 4


@dataclass(frozen=True, eq=False)
class SiteVectors:
    """The vectors of one read, example after example and ascending in each.

    Attributes:
        vectors: `(n, width)`; the width of several joined tokens together where they are joined.
        index: `(n, 3)` int64: example, token, token id; see the properties.
    """

    vectors: Float[Tensor, "n width"]
    index: Int[Tensor, "n 3"]

    @property
    def examples(self) -> Int[Tensor, " n"]:
        """The number of the example that each vector comes from, in the caller's order, from 0."""
        return self.index[:, 0]

    @property
    def positions(self) -> Int[Tensor, " n"]:
        """Its token's number among the real tokens of the example; the first one's of joined ones."""
        return self.index[:, 1]

    @property
    def token_ids(self) -> Int[Tensor, " n"]:
        """Its token's id; -1 at sites that have no tokens, and where the model was given vectors."""
        return self.index[:, 2]


@dataclass(frozen=True, eq=False)
class Activations(Mapping[str, Tensor]):
    """Tensors `(n, width)` by the name of the read or `"path @ positions"`, in the order of the examples.

    Those of a folder are memory-mapped: they are read from the disk where they are looked at, and what
    is written into them does not change the files.

    Attributes:
        values_by_name: each read's vectors together with their index.
        rows: number of examples.
        folder: where the files are, or None where everything is in memory.
        temporary: whether the folder goes when this object does.

    >>> X = activations["blocks[5].output @ last"].numpy()          # doctest: +SKIP
    >>> LogisticRegression().fit(X, labels)                         # doctest: +SKIP
    """

    values_by_name: dict[str, SiteVectors]
    rows: int
    folder: Path | None = None
    temporary: bool = field(default=False)

    @classmethod
    def open(cls, folder: str | Path) -> Activations:
        """Open a finished collection; no model is needed.

        Args:
            folder: what `collect` was given as `folder=`.

        Raises:
            ArtifactError: it is missing, damaged, newer or not finished.
        """
        where = Path(folder).expanduser()
        record = read_record(where)
        if not record["finished"]:
            raise ArtifactError(
                f"the collection in {where} was interrupted after {record['batches_done']} batches; call "
                "rl.collect again with the same arguments to finish it"
            )
        arrays = {name: read_array(where, name) for name in record["arrays"]}
        for name, array in arrays.items():
            _, width, dtype = record["arrays"][name]
            expected = (record["rows"][name], width, dtype)
            if (*array.shape, str(array.dtype).removeprefix("torch.")) != expected:
                raise ArtifactError(f"{where}: {name} does not hold {expected}; copy the whole folder again")
        found = {
            label: SiteVectors(arrays[vectors], arrays[index])
            for label, (vectors, index) in record["reads"].items()
        }
        return cls(found, record["examples"], where)

    def __getitem__(self, name: str) -> Float[Tensor, "n width"]:
        return self.flat(name).vectors

    def flat(self, name: str) -> SiteVectors:
        """The vectors of one read with their index."""
        if name not in self.values_by_name:
            known = ", ".join(map(repr, list(self)[:_SHOWN])) + (", …" if len(self) > _SHOWN else "")
            raise KeyError(
                f"{name!r} was not collected; there is {known}.{did_you_mean(name, self.values_by_name)}"
            )
        return self.values_by_name[name]

    def of(self, example: int) -> dict[str, Float[Tensor, "k width"]]:
        """The vectors of one example, by the name of the read.

        Args:
            example: its number in the data, from 0; negative numbers count from the end.

        Raises:
            DataError: there is no such example.
        """
        if type(example) is not int or not -self.rows <= example < self.rows:
            raise DataError(
                f"of({example!r}): expected the number of one of the {self.rows} examples, from 0"
            )
        ends = torch.tensor([example % self.rows, example % self.rows + 1])
        found = {}
        for name, values in self.values_by_name.items():
            start, stop = torch.searchsorted(values.examples.contiguous(), ends).tolist()
            found[name] = values.vectors[start:stop]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    @property
    def nbytes(self) -> int:
        """Size of all vectors, in bytes."""
        return sum(values.vectors.nbytes for values in self.values_by_name.values())

    def to_frame(self) -> pd.DataFrame:
        """One line a vector, in the order of the tensors: read, example, position, token_id."""
        import pandas as pd

        parts = [
            pd.DataFrame(values.index.numpy(), columns=["example", "position", "token_id"]).assign(read=name)
            for name, values in self.values_by_name.items()
        ]
        return pd.concat(parts, ignore_index=True)[["read", "example", "position", "token_id"]]

    def _repr_html_(self) -> str:
        lines = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{tuple(values.vectors.shape)}</td>"
            f"<td>{_dtype(values)}</td><td>{_size(values.vectors.nbytes)}</td></tr>"
            for name, values in self.values_by_name.items()
        )
        head = "<tr><th>read</th><th>shape (vector, width)</th><th>dtype</th><th>size</th></tr>"
        return f"<p>{self.rows} examples, {html.escape(self._place)}</p><table>{head}{lines}</table>"

    def __repr__(self) -> str:
        shown = [
            f"{name!r}: {tuple(values.vectors.shape)} {_dtype(values)}"
            for name, values in list(self.values_by_name.items())[:_SHOWN]
        ]
        more = [f"and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return f"Activations({self.rows} examples; {', '.join(shown + more)}; {self._place})"

    @property
    def _place(self) -> str:
        size = _size(self.nbytes)
        if self.folder is None:
            return f"{size} in memory"
        if self.temporary:
            return f"{size} memory-mapped in a temporary folder, removed with this object"
        return f"{size} memory-mapped in {self.folder}"


def _dtype(values: SiteVectors) -> str:
    return str(values.vectors.dtype).removeprefix("torch.")


def _size(count: Any) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
