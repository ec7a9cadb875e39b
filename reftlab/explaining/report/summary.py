"""An explanation's findings in a few plain sentences, computed from its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from reftlab.plotting.wording import block_named, number

if TYPE_CHECKING:
    from reftlab.explaining.explanation import Explanation

__all__ = ["in_nats", "summary_of"]

_MOSTLY = 0.5
"""From this share on, the direct effect tells what an edit does."""
_NOTHING = 0.005
_PHASES = {"prompt": "prompt", "decode": "generated", "both": "prompt and generated"}


def summary_of(explanation: Explanation) -> tuple[str, ...]:
    """The findings, one sentence or two an entry."""
    if not explanation.edits:
        return ("No edit was reached, so there is nothing to explain.",)
    return (*_leading(explanation), *_sentences(explanation))


def _leading(explanation: Explanation) -> Iterator[str]:
    """How far the explanation holds, which everything after it depends on."""
    found = next((section for section in explanation.sections if section.name == "faithfulness"), None)
    if found is not None and found.missing is None:
        yield from found.says


def in_nats(value: float) -> str:
    """A loss with as many digits as help: `2.13`, `0.0031`."""
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _sentences(explanation: Explanation) -> Iterator[str]:
    edits, count = explanation.edits, len(explanation.examples)
    verb = "changes" if len(edits) == 1 else "change"
    yield (
        f"{_count(len(edits), 'edit')} {verb} {_where(explanation)} of {explanation.model}; "
        f"what follows was measured on {_count(count, 'example')}."
    )
    yield from _losses(explanation)
    yield from _writes(explanation)
    largest = max(edits, key=lambda edit: edit.sizes.median)
    subject = "the edit" if len(edits) == 1 else f"{largest.edit}, the largest edit by this measure,"
    yield (
        f"Against the vectors that it acts on, {subject} is {largest.sizes.median:.0%} as long in the median."
    )
    asked = [reply for reply in explanation.replies.replies if reply.wanted is not None]
    if asked:
        edited, bare = sum(r.exact for r in asked), sum(r.bare_exact for r in asked)
        yield (
            f"The model gives {edited} of {len(asked)} answers to the letter with the "
            f"edit{'s' * (len(edits) > 1)}, and {bare} without."
        )


def _losses(explanation: Explanation) -> Iterator[str]:
    removal, edits = explanation.removal, explanation.edits
    if removal.missing is not None:
        yield f"The answer loss was not measured: {removal.missing}."
        return
    every = "it" if len(edits) == 1 else "all of them"
    yield (
        f"Without any edit an answer token costs {in_nats(removal.bare_loss)} nats, with {every} "
        f"{in_nats(removal.loss)}."
    )
    if len(edits) == 1:
        return
    first = explanation.importance[0]
    worst = removal.of(first.edit, "edit")[0]
    moves = "raises" if worst.change > 0 else "changes"
    yield (
        f"The edit that the answers need most is {first.edit} at {block_named(first.site)}: taking it away "
        f"{moves} the loss from {in_nats(removal.loss)} to {in_nats(worst.loss)} nats."
    )
    idle = sum(r.change < 0.01 * worst.change for r in removal.removed if r.what == "edit")
    if idle and worst.change > 0:
        together = ", which does not mean that all of them could go together" if idle > 1 else ""
        yield (
            f"{_count(idle, 'edit')} of {len(edits)} can {'each ' * (idle > 1)}be taken away at less than a "
            f"hundredth of that cost{together}."
        )


def _writes(explanation: Explanation) -> Iterator[str]:
    """What the edit that pushes most promotes, unless the push was measured to be a small part of it."""
    readable = [edit for edit in explanation.edits if edit.towards()]
    if not readable:
        return
    # Far from the end the direct effect is weak and says little, so the strongest one speaks.
    push, best = max(((edit.push, edit) for edit in readable), key=lambda pair: pair[0])
    direct = _direct_share(explanation, best.edit)
    if direct is not None and direct[1] < _MOSTLY:
        much = "next to nothing" if direct[1] < _NOTHING else f"{direct[1]:.0%}"
        yield (
            f"Directions read as tokens say little of what {direct[0]} does: {much} of its change of the "
            "logits is direct, and later blocks make the rest."
        )
        return
    share = float(best.directions.share[best.main or 0])
    yield (
        f"The strongest direct push on the next token comes from {best.edit}: {share:.0%} of what it writes "
        f"lies along one direction, which promotes the tokens {' '.join(best.towards(5))} (up to "
        f"{number(push, '+.1f')} logits)."
    )


def _direct_share(explanation: Explanation, key: str) -> tuple[str, float] | None:
    """The edit's name, and which share of its change of the logits is direct, where that was measured."""
    found = next((section.result for section in explanation.sections if section.name == "direct"), None)
    for effect in found.effects if found is not None else ():
        if key in (effect.edit, *(f"{effect.edit}[{rest}" for rest in key.split("[", 1)[1:])):
            share = effect.logit_share.value
            return None if math.isnan(share) else (effect.edit, share)
    return None


def _where(explanation: Explanation) -> str:
    places = sorted({(edit.positions.split(", phase")[0], edit.phase) for edit in explanation.edits})
    where = " and ".join(_tokens(*place) for place in places[:3])
    blocks = sorted({edit.block for edit in explanation.edits if edit.block is not None})
    if not blocks:
        return where
    if len(blocks) > 3 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"{where} in blocks {blocks[0]} to {blocks[-1]}"
    return f"{where} in block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"


def _tokens(positions: str, phase: str) -> str:
    kind = _PHASES[phase]
    if positions in ("first", "last"):
        return f"the {positions} {kind} token{'s' * (phase == 'both')}"
    return f"all {kind} tokens" if positions == "all" else f"the {kind} tokens “{positions}”"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
