"""Print the oracle matrix, family × site × result: `python -m tests.families.matrix [family ...]`."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

import torch
import transformers

from tests.families import cells
from tests.families import test_meaning as meaning
from tests.families.table import BLOCK, GENERATES, MISSING, NO_GENERATION, STACKS, TABLE

_SIDES = ("left", "right")
_BLOCK = f"blocks[{BLOCK}]."
COLUMNS = {
    "embed": "embed.output", "in": f"{_BLOCK}input", "out": f"{_BLOCK}output",
    "attn": f"{_BLOCK}attn.output", "heads": f"{_BLOCK}attn.heads", "q": f"{_BLOCK}attn.q",
    "k": f"{_BLOCK}attn.k", "v": f"{_BLOCK}attn.v", "pattern": "", "mlp": f"{_BLOCK}mlp.output",
    "norm": "final_norm.output", "unembed": "unembed",
}  # fmt: skip
LEGEND = (
    "R: a read equals what a plain hook sees; F: an added vector and a LoReFT equal a plain hook's edit of a "
    "forward pass; G: a LoReFT equals a plain hook's edit of a generation, in column out also one of every "
    "generated token; each with padding left and right. "
    "pattern: R equals the model's own attentions (its scores' softmax too), F: a row of zeros takes the head's "
    "result away; its generation is compared in tests/runtime/test_attention.py, for Llama, and not here. "
    "lower case: fails; ·: cannot be; –: the model has no such place. An encoder has no vocabulary, so no unembed; "
    "rows cross are a decoder's attention to its encoder, which has the places of attention alone."
)


class Matrix:
    """The table, and why cells fail."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def tried(self, letter: str, what: str, *checks: Callable[[], None]) -> str:
        """The letter where every check passes, in lower case where one fails."""
        for check in checks:
            try:
                check()
            except Exception as error:
                line = (str(error).strip().splitlines() or ["not equal"])[0]
                self.failures.append(f"{what} {letter}: {type(error).__name__}: {line}")
                return letter.lower()
        return letter

    def cell(self, name: str, site: str) -> str:
        """Three letters for one site of one model."""
        if site not in TABLE[name]:
            return "–"
        what = f"{name} {site}"
        read = [lambda side=side: cells.check_read(name, site, side) for side in _SIDES]
        edits = [
            lambda side=side, kind=kind: cells.check_edit(name, site, side, kind)
            for side in _SIDES
            for kind in (cells.ADD, cells.LOREFT)
        ]
        letters = self.tried("R", what, *read) + self.tried("F", what, *edits)
        if name not in GENERATES:
            return letters + "·"
        sides = cells.generation_sides(site)
        made = [lambda side=side: cells.check_generation(name, site, side, cells.LOREFT) for side in sides]
        if site in (COLUMNS["out"], f"decoder.{COLUMNS['out']}"):
            made += [lambda side=side: cells.check_decoding(name, site, side) for side in _SIDES]
        return letters + self.tried("G", what, *made)

    def pattern(self, name: str, stack: str) -> str:
        """Two letters for attention scores and patterns."""
        if (name, stack) not in meaning.ATTENDING:
            return "–"
        what = f"{name} {stack} pattern"
        letters = self.tried(
            "R", what, lambda: meaning.test_a_pattern_is_what_the_model_itself_hands_out(name, stack)
        )
        if (name, stack) not in meaning.PROJECTING:
            return letters + "·"
        silence = meaning.test_a_pattern_of_zeros_takes_a_heads_result_away
        return letters + self.tried(
            "F", what, *(lambda side=side: silence(name, stack, side) for side in _SIDES)
        )

    def rows(self, name: str) -> list[list[str]]:
        """The table's rows for one model."""
        rows = []
        for stack in STACKS[name]:
            row = [f"{name} {stack}".strip()]
            for column, site in COLUMNS.items():
                # The unembedding belongs to no stack; it stands in the decoder's row.
                own = site if column == "unembed" and stack in ("", "decoder") else meaning.named(stack, site)
                row.append(self.pattern(name, stack) if column == "pattern" else self.cell(name, own))
            rows.append(row)
            if stack == "decoder":
                cross = [
                    meaning.named(stack, site.replace("attn", "cross_attn")) for site in COLUMNS.values()
                ]
                rows.append(
                    [f"{name} cross", *(self.cell(name, s) if "cross_attn" in s else "" for s in cross)]
                )
        return rows


def main(names: list[str]) -> int:
    """Print the matrix of these models, of all without any; 1 where a cell fails."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    matrix = Matrix()
    print("| family |", " | ".join(COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for name in names or [name for name in TABLE if name not in ("gru", "mlp")]:
        for row in matrix.rows(name):
            print("|", " | ".join(row), "|", flush=True)
    if not names:
        for name in ("gru", "mlp"):
            print(
                f"| {name} |",
                ", ".join(f"{s}: {matrix.cell(name, s)}" for s in TABLE[name]),
                "|" * len(COLUMNS),
            )
    print(f"\n{LEGEND}\n")
    for title, reasons in (("No such place", MISSING), ("No generation", NO_GENERATION)):
        print(f"{title}: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    print(f"\n{len(matrix.failures)} failures", *matrix.failures, sep="\n  ")
    return bool(matrix.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
