"""Rows of Hugging Face datasets: by name, from a folder, or from an object of the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reftlab.errors import DataError, did_you_mean

__all__ = ["dataset_rows", "held_out_split", "is_dataset"]

_HELD_OUT = ("validation", "valid", "val", "dev", "test")
_SAVED = ("dataset_dict.json", "state.json")


def is_dataset(source: Any) -> bool:
    """Whether an object is a dataset of the package `datasets`, or a dictionary of its splits."""
    # Asked by module, so that nobody waits for an import who has no dataset.
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(source).__mro__)


def dataset_rows(source: Any, subset: str | None = None, split: str | None = None) -> Iterable[Any]:
    """Rows of one split of a dataset.

    Args:
        source: a dataset, a dictionary of splits, a folder, or the name of one on the Hugging Face hub.
        subset: for a name, which of its subsets (`datasets` calls it a configuration).
        split: which split; `train`, or the only one, unless given.

    Raises:
        DataError: the dataset cannot be loaded, or has no such subset or split.
    """
    loaded = _loaded(source, subset, split)
    if not isinstance(loaded, Mapping):
        if split is not None and (not isinstance(source, str | Path) or _is_saved(source)):
            raise DataError(f"split={split!r}: this dataset is one split already; leave split out")
        return loaded
    names = list(loaded)
    if split is None and len(names) > 1 and "train" not in names:
        raise DataError(f"the dataset has the splits {', '.join(names)}; say which one, split={names[0]!r}")
    wanted = split or ("train" if "train" in names else names[0])
    if wanted not in loaded:
        raise DataError(
            f"split={split!r}: there is no such split; there is {', '.join(names)}."
            + did_you_mean(wanted, names)
        )
    return loaded[wanted]


def held_out_split(source: Any, subset: str | None = None) -> str | None:
    """The split of a dataset that is kept for evaluation, `validation` before `test`, if it has one."""
    loaded = _loaded(source, subset, None)
    return next((name for name in _HELD_OUT if isinstance(loaded, Mapping) and name in loaded), None)


def _is_saved(source: str | Path) -> bool:
    """Whether a folder is one that `save_to_disk` of the package `datasets` wrote."""
    return any((Path(source).expanduser() / name).is_file() for name in _SAVED)


def _loaded(source: Any, subset: str | None, split: str | None) -> Any:
    if not isinstance(source, str | Path):
        if subset is not None:
            raise DataError(f"subset={subset!r}: this dataset is loaded already; leave subset out")
        return source
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"the dataset {str(source)!r} needs the package datasets: pip install datasets"
        ) from error
    folder, saved = Path(source).expanduser(), _is_saved(source)
    if saved and subset is not None:
        raise DataError(f"subset={subset!r}: {str(source)!r} was saved without subsets; leave subset out")
    # Slices such as 'train[:100]' are understood by load_dataset alone.
    sliced = split if split is not None and not split.isidentifier() else None
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if saved:
            return datasets.load_from_disk(str(folder))
        where = str(folder) if folder.is_dir() else str(source)
        return datasets.load_dataset(where, subset, split=sliced)
    # A failing builder wraps whatever went wrong in an error of its own.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(" ".join((str(error).strip() or type(error).__name__).splitlines()[:2]).split())
        if folder.is_dir():
            raise DataError(f"the folder {str(source)!r} cannot be read as a dataset: {reason}") from error
        hint = "; there is no such file or folder either" if isinstance(error, OSError) else ""
        raise DataError(f"the dataset {str(source)!r} cannot be loaded: {reason}{hint}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
