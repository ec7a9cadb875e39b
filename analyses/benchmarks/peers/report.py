"""Tables and figure of a benchmark's lines.

python analyses/benchmarks/peers/report.py        # anew from results.json
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import picture
import works
from works import EPOCH, EQUAL, FORWARD, LONG, MAP, MEMORY, READING, SHORT, TASKS, WIDE

FILES = ("results.json", "README.md", "results.png")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "plain": "plain torch hooks",
    "peft": "PEFT",
    "transformer_lens": "TransformerLens 4",
    "transformer_lens_2": "TransformerLens 2",
}
OURS = {TASKS: "one batch, one block"}
REFERENCE = {READING: "full forward", FORWARD: "bare", TASKS: "bare batch"}
TITLES = {
    SHORT: "Training step, LoReFT of rank 4 at block 15 of 30, last prompt token; 8 × (68 + 8) tokens",
    EPOCH: "First epoch, store empty at its start; four such batches, time per batch",
    LONG: "Training step, the same edit; 8 × (250 + 2) tokens",
    WIDE: "Training step, `last(7)` at all 30 blocks; 8 × (250 + 8) tokens",
    MAP: "Exact patching map, 30 blocks × 14 tokens",
    READING: "Reading block 5 of 30; 8 × 128 tokens",
    FORWARD: "A forward pass with one edit; 8 × 128 tokens",
    TASKS: "Eight tasks in one batch of 16 rows, 24 prompt tokens, generating 32",
}


@dataclass(frozen=True)
class Timing:
    """All timings of one way of doing a work, in ms.

    Attributes:
        owner: the peer, `plain` for hooks by hand in reftlab's environment.
        rounds: the timings of each round.
        part: the share of the work that was run, of which the time is a multiple.
    """

    owner: str
    way: str
    rounds: Mapping[int, tuple[float, ...]]
    part: float

    @property
    def every(self) -> list[float]:
        return sorted(value for values in self.rounds.values() for value in values)

    @property
    def median(self) -> float:
        return statistics.median(self.every)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.every) == 1:
            return self.every[0], self.every[0]
        low, _, high = statistics.quantiles(self.every, n=4, method="inclusive")
        return low, high

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Median, least and largest over the rounds of the ratio of the rounds' medians."""
        shared = self.rounds.keys() & other.rounds.keys()
        ratios = [statistics.median(self.rounds[n]) / statistics.median(other.rounds[n]) for n in shared]
        if not ratios:
            raise LookupError(f"{self.owner} and {other.owner} share no finished round")
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Measured:
    timings: Mapping[str, tuple[Timing, ...]]
    cannot: Mapping[str, Mapping[str, str]]
    checks: Mapping[tuple[str, str, str], list[float]]
    lines: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> Measured:
        found: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        parts: dict[tuple[str, str, str], float] = {}
        cannot: dict[str, dict[str, str]] = defaultdict(dict)
        checks = {}
        for line in lines:
            owner, work, way = line["peer"], line["work"], line.get("way", "")
            if owner == "reftlab" and (way.startswith("plain") or way in REFERENCE.values()):
                owner = "plain"
            place = (work, owner, way)
            if "ms" in line:
                found[place][line["round"]].append(line["ms"])
                parts[place] = line["of"]
            elif "cannot" in line:
                cannot[work][owner] = line["cannot"]
            elif "check" in line:
                checks[place] = line["check"]
        timings: dict[str, tuple[Timing, ...]] = {}
        for (work, owner, way), rounds in found.items():
            kept = {number: tuple(values) for number, values in rounds.items()}
            one = Timing(owner, way, kept, parts[work, owner, way])
            timings[work] = (*timings.get(work, ()), one)
        return cls(timings, cannot, checks, lines)

    def get(self, work: str, owner: str, way: str) -> Timing:
        for timing in self.timings.get(work, ()):
            if (timing.owner, timing.way) == (owner, way):
                return timing
        raise LookupError(f"no timing of {owner!r}, {way!r} in {work!r}")

    def ours(self, work: str) -> Timing:
        return self.get(work, "reftlab", OURS.get(work, "reftlab"))

    def reference(self, work: str, owner: str) -> Timing:
        """What a peer's ratio is taken against in works that have a bare pass: its own process's."""
        own = "plain" if owner == "reftlab" else owner
        return self.get(work, own, REFERENCE[work])

    def fastest(self, work: str, owner: str, *, without: str = "~") -> Timing:
        """A peer's fastest way that does the work, in a forward pass or more."""
        ways = [
            timing
            for timing in self.timings.get(work, ())
            if timing.owner == owner and timing.way != REFERENCE.get(work) and without not in timing.way
        ]
        if not ways:
            raise LookupError(f"no timing of {owner!r} in {work!r}")
        return min(ways, key=lambda timing: timing.median)

    def values(self, work: str, name: str) -> list[Mapping[str, Any]]:
        return [line for line in self.lines if line["work"] == work and name in line]

    def disagreement(self, work: str) -> float:
        """Largest difference between any two environments in numbers that must be the same."""
        found = [check for (of, _, _), check in self.checks.items() if of == work]
        return max(
            (max(abs(a - b) for a, b in zip(found[0], one, strict=True)) for one in found), default=math.nan
        )


def name_of(owner: str) -> str:
    return NAMES.get(owner, owner)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(found: tuple[float, float, float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in found)
    return middle if low == high else f"{middle} ({low} to {high})"


def table(measured: Measured, work: str) -> list[str]:
    """One work, fastest first; then who cannot do it and why."""
    against = f"against its own {REFERENCE[work]}" if work in REFERENCE else "times reftlab's"
    lines = [f"### {TITLES[work]}", "", f"| who | how | median, ms | middle half, ms | {against} |"]
    lines.append("|---|---|---:|---:|---:|")
    for timing in sorted(measured.timings.get(work, ()), key=lambda timing: timing.median):
        low, high = timing.quartiles
        try:
            if work in REFERENCE:
                ratio = _ratio(timing.over(measured.reference(work, timing.owner)), 3)
            else:
                ratio = _ratio(timing.over(measured.ours(work)), 2)
        except LookupError:
            ratio = "no round shared"
        how = timing.way if timing.way != "reftlab" else ""
        if timing.part < 1:
            how += f" ({len(works.CELLS_TIMED)} of {len(works.cells())} cells timed)"
        who = name_of(timing.owner)
        lines.append(f"| {who} | {how} | {_ms(timing.median)} | {_ms(low)} to {_ms(high)} | {ratio} |")
    refused = measured.cannot.get(work, {})
    lines += [f"| {name_of(owner)} | cannot: {why} | | | |" for owner, why in refused.items()]
    return [*lines, ""]


@dataclass(frozen=True)
class Verdict:
    wanted: str
    found: str
    reached: bool


def goals(measured: Measured) -> list[str]:
    """The figures that were to be reached, as rows of a table."""
    rows: list[str] = []
    one, timing = measured, measured.get

    def add(label: str, make: Callable[[], Verdict]) -> None:
        try:
            verdict = make()
        except LookupError as missing:  # an environment that was left out, or that has failed
            rows.append(f"| {label} | | not measured: {missing} | |")
        else:
            said = "reached" if verdict.reached else "missed"
            rows.append(f"| {label} | {verdict.wanted} | {verdict.found} | {said} |")

    def faster(label: str, work: str, least: float, other: Callable[[], Timing]) -> None:
        add(label, lambda: _at_least(one.ours(work), other(), least))

    plain = ("plain hook", "plain hook, logits only where labelled")
    for work, label, least in (
        (SHORT, "step, 68 + 8", 7),
        (LONG, "step, 250 + 2", 40),
        (WIDE, "step, last(7)", 6),
    ):
        for way in plain:
            faster(label, work, least, lambda work=work, way=way: timing(work, "plain", way))
    for peer in ("pyreft", "adapters", "peft"):
        faster("step, 68 + 8", SHORT, 8, lambda peer=peer: one.fastest(SHORT, peer, without="logits only"))
        faster("step, 68 + 8", SHORT, 8, lambda peer=peer: timing(SHORT, peer, "logits only where labelled"))
    add("first epoch", lambda: _at_most(one.ours(EPOCH), timing(EPOCH, "plain", plain[0]), 1.0))
    add("loss and gradients, float32", lambda: _equal(one))
    cell = "plain hooks, one forward per cell"
    for way, least in ((cell, 15), (f"{cell}, last logits only", 15), ("plain hooks, batched", 3)):
        faster("patching map", MAP, least, lambda way=way: timing(MAP, "plain", way))
    for without in ("begins above", "~"):
        faster("patching map, fastest peer", MAP, 5, lambda without=without: _fastest_peer(one, MAP, without))
    add("patching map, every cell", lambda: _cells(one))
    for work, label, most in ((READING, "reading block 5", 0.25), (FORWARD, "forward, one edit", 1.03)):
        add(label, lambda work=work, most=most: _at_most(one.ours(work), one.reference(work, "plain"), most))
    everywhere = ("one batch, one block, every token", "one batch, all blocks, every token")
    for way in ("one batch, one block", "one batch, all blocks", *everywhere):
        mine = lambda way=way: timing(TASKS, "reftlab", way)  # noqa: E731
        add(f"8 tasks, {way}", lambda mine=mine: _at_most(mine(), one.reference(TASKS, "plain"), 1.10))
    faster("8 tasks", TASKS, 3, lambda: timing(TASKS, "reftlab", "eight calls, one block"))
    add("peak memory of a step", lambda: _memory(one))
    return rows


def _at_least(mine: Timing, other: Timing, least: float) -> Verdict:
    ratio = other.over(mine)
    how = other.way if other.owner == "plain" else f"{name_of(other.owner)}, {other.way}"
    return Verdict(f"≥ {least:g} × {how}", _ratio(ratio, 1), ratio[0] >= least)


def _at_most(mine: Timing, other: Timing, most: float) -> Verdict:
    ratio = mine.over(other)
    return Verdict(f"≤ {most:.2f} of {other.way}", _ratio(ratio, 3), ratio[0] <= most)


def _fastest_peer(measured: Measured, work: str, without: str) -> Timing:
    every = measured.timings.get(work, ())
    peers = [t for t in every if t.owner not in ("plain", "reftlab") and without not in t.way]
    if not peers:
        raise LookupError(f"no peer's timing of {work!r}")
    return min(peers, key=lambda timing: timing.median)


def _equal(measured: Measured) -> Verdict:
    found = [
        line["errors"] for line in measured.values(EQUAL, "errors") if "cone against plain" in line["way"]
    ]
    if not found:
        raise LookupError(EQUAL)
    loss, gradient, parameter = (max(column) for column in zip(*found, strict=True))
    said = f"loss {loss:.1e}, gradient {gradient:.1e} (worst parameter's {parameter:.1e})"
    return Verdict("relative error ≤ 1e-5", said, max(loss, gradient) <= 1e-5)


def _cells(measured: Measured) -> Verdict:
    mine, plain = (
        measured.checks[MAP, owner, way]
        for owner, way in (("reftlab", "reftlab"), ("plain", "plain hooks, batched"))
    )
    worst = max(abs(a - b) for a, b in zip(mine, plain, strict=True))
    return Verdict("within 1e-4 of plain hooks", f"{worst:.1e}", worst <= 1e-4)


def _memory(measured: Measured) -> Verdict:
    found: dict[str, float] = {}
    for way in ("cone", "plain hook"):
        every = [line["step_mb"] for line in measured.values(MEMORY, "step_mb") if line["way"] == way]
        if not every:
            raise LookupError(f"no memory of {way!r}")
        found[way] = statistics.median(every)
    said = f"{found['cone']:.0f} MB against {found['plain hook']:.0f} MB"
    return Verdict("below plain hooks'", said, found["cone"] < found["plain hook"])


def _errors(measured: Measured) -> list[str]:
    rows = {line["way"]: line["errors"] for line in measured.values(EQUAL, "errors")}
    lines = ["### The cone against the plain run, relative errors", ""]
    lines += ["| what | loss | gradient | worst parameter's gradient |", "|---|---:|---:|---:|"]
    lines += [f"| {way} | {' | '.join(f'{error:.1e}' for error in errors)} |" for way, errors in rows.items()]
    return [*lines, ""] if rows else []


def _memories(measured: Measured) -> list[str]:
    found = defaultdict(list)
    for line in measured.values(MEMORY, "step_mb"):
        found[line["way"]].append(line)
    lines = ["### Peak memory of a training step, 8 × (68 + 8) tokens, above the loaded model", ""]
    lines += ["| who | first step, MB | later steps, MB | kept between steps, MB |", "|---|---:|---:|---:|"]
    for way, rows in found.items():
        first, later, kept = (
            statistics.median(row[name] for row in rows) for name in ("first_step_mb", "step_mb", "kept_mb")
        )
        who = "reftlab" if way == "cone" else name_of("plain")
        lines.append(f"| {who} | {first:.0f} | {later:.0f} | {kept:.0f} |")
    return [*lines, ""] if found else []


def text(results: Mapping[str, Any]) -> str:
    """The section of the README that was measured."""
    measured, machine = Measured.of(results["lines"]), results["machine"]
    rounds = len({line["round"] for line in results["lines"]})
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}, {machine['threads']} threads, float32; rounds: "
        f"{rounds}. Times are medians over all rounds with the middle half of them; ratios are medians over "
        "the rounds of the ratio within each, with the least and the largest.",
        "",
        "| environment | versions |",
        "|---|---|",
    ]
    for peer, found in results["versions"].items():
        lines.append(
            f"| {name_of(peer)} | {', '.join(f'{name} {version}' for name, version in found.items())} |"
        )
    lines += ["", "### Goals", "", "| work | goal | measured | |", "|---|---|---|---|"]
    lines += goals(measured)
    lines.append("")
    if results["import"]:
        lines += [f"Import: {results['import']}.", ""]
    for work in TITLES:
        if work in measured.timings:
            lines += table(measured, work)
    lines += [*_errors(measured), *_memories(measured)]
    same = {work: measured.disagreement(work) for work in (SHORT, LONG, WIDE, MAP, READING)}
    said = "; ".join(f"{work}: {value:.1e}" for work, value in same.items() if not math.isnan(value))
    lines += [f"Largest differences between environments in the numbers that must agree: {said}.", ""]
    return "\n".join(lines)


def check(measured: Measured) -> None:
    """Stops where environments did not compute the same thing, whose times would mean nothing."""
    for work, allowed in {SHORT: 1e-3, LONG: 1e-3, WIDE: 1e-3, MAP: 1e-3, READING: 1e-3}.items():
        found = measured.disagreement(work)
        if found > allowed:
            raise SystemExit(f"{work}: environments differ by {found:.2g} in numbers that must agree")


def write(results: Mapping[str, Any], target: Path) -> None:
    """Writes `results.json`, `results.png` and the measured section of `README.md`."""
    measured = Measured.of(results["lines"])
    check(measured)
    lines = ",\n".join(json.dumps(line, ensure_ascii=False) for line in results["lines"])
    head = json.dumps({name: value for name, value in results.items() if name != "lines"}, indent=1)
    (target / "results.json").write_text(f'{head[:-2]},\n "lines": [\n{lines}\n]}}\n')
    readme = target / "README.md"
    before = readme.read_text() if readme.exists() else f"{BEGIN}\n{END}\n"
    section = f"{BEGIN}\n{text(results)}{END}"
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, before, flags=re.DOTALL))
    picture.draw(measured).savefig(target / "results.png")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write(json.loads((here / "results.json").read_text()), here)
