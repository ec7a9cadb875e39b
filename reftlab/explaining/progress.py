"""Progress bars that say what was done last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

__all__ = ["ticking"]


@contextlib.contextmanager
def ticking(name: str, unit: str, shown: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar inside a `with` block, as a function to call with a few words after each step.

    >>> with ticking("shapley", "sets", shown=False) as tick:
    ...     tick("2 of 4 parts")
    """
    with tqdm(disable=not shown, desc=name, unit=f" {unit}") as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield tick
