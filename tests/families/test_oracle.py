"""Every family, every site, either side of padding: reads and edits equal one plain torch hook."""

from __future__ import annotations

import pytest

import reftlab as rl
from tests.families import cells
from tests.families.table import BLOCK, GENERATES, TABLE
from tests.models import batch_of

CELLS = [(name, site) for name, sites in TABLE.items() for site in sites]
every_cell = pytest.mark.parametrize(("name", "site"), CELLS)
every_generating_cell = pytest.mark.parametrize(("name", "site"), [c for c in CELLS if c[0] in GENERATES])


@every_cell
def test_a_read_is_what_a_plain_hook_sees(name: str, site: str) -> None:
    for side in ("left", "right"):
        cells.check_read(name, site, side)


@every_cell
@pytest.mark.parametrize("kind", [cells.ADD, cells.LOREFT])
def test_an_edit_of_a_forward_pass_is_a_plain_hooks_edit(name: str, site: str, kind: str) -> None:
    for side in ("left", "right"):
        cells.check_edit(name, site, side, kind)


@every_generating_cell
@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_a_generation_is_a_plain_hooks_edit(name: str, site: str) -> None:
    for side in cells.generation_sides(site):
        cells.check_generation(name, site, side, cells.LOREFT)


@pytest.mark.parametrize("name", GENERATES)
@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_generated_tokens_is_a_plain_hooks_edit(name: str) -> None:
    stack = "decoder." if "decoder.embed.output" in TABLE[name] else ""
    for side in ("left", "right"):
        cells.check_decoding(name, f"{stack}blocks[{BLOCK}].output", side)


@pytest.mark.filterwarnings("ignore")
def test_xlnets_generation_is_refused_because_its_passes_cover_no_window() -> None:
    # Each pass takes the last two tokens again and a dummy, so that columns mean something else in it.
    edit = rl.Edit("zero", at="blocks[1].output", positions="first", intervention=rl.Zero())
    with pytest.raises(rl.RunError, match="XLNet"):
        cells.bind("xlnet", edit).generate(**batch_of((5, 5)), max_new_tokens=3)
