"""The main job from end to end: a chat model learns to answer in emojis, and its edits are explained."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import emoji
import torch
from rich.console import Console
from rich.table import Table

from reftlab.explaining import explain
from reftlab.graph import Edit, InterventionGraph
from reftlab.interventions import LoReFT
from reftlab.models import EMBEDDED, load_model
from reftlab.training import Evaluation, evaluate, reply, train

__all__ = ["PAIRS", "UNSEEN", "DemoResult", "only_emojis", "run"]

PAIRS = (
    ("How do I stay healthy?", "🍎🏃😴"),
    ("What is the sea like?", "🌊🐠🐚"),
    ("What should I cook tonight?", "🍅🍝🍷"),
    ("Tell me about cats.", "🐱🐾💤"),
    ("What happens at a birthday party?", "🎂🎈🎁"),
    ("Where does the sun go at night?", "🌅🌙🌟"),
    ("How do I learn to play music?", "🎸🎵👏"),
    ("What is winter like?", "🎿🎄🔥"),
    ("How do farmers grow food?", "🌱🚜🌽"),
    ("What do astronauts do?", "🚀🌍🔭"),
)
"""What the edits are trained on."""

UNSEEN = (
    "What is summer like?",
    "What should I eat for breakfast?",
    "Tell me about dogs.",
    "How do I make my garden beautiful?",
    "What should I bake for a friend?",
    "How do I sleep better?",
)
"""Questions that they never saw."""

_REPLY_TOKENS = 24
_RUNS = 40
"""As many runs of the model may a section of the report take, so that the demo is short."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        before, after: replies to `PAIRS`, without and with the edits.
        unseen: replies to `UNSEEN` with the edits.
        reloaded_alike: whether a fresh process gave the very same replies from the saved artifact.
        artifact: folder of the artifact.
        report: the HTML report.
        seconds: wall-clock time of each part.
    """

    before: Evaluation
    after: Evaluation
    unseen: tuple[str, ...]
    reloaded_alike: bool
    artifact: Path
    report: Path
    seconds: dict[str, float]

    @property
    def unseen_emojis(self) -> int:
        """How many replies to unseen questions are emojis and nothing else."""
        return sum(map(only_emojis, self.unseen))


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - started, 1)


def only_emojis(text: str) -> bool:
    """Whether a text is one or more emojis and nothing else.

    >>> only_emojis("🌊🐠🐚"), only_emojis("🌊 fish"), only_emojis("")
    (True, False, False)
    """
    return emoji.emoji_count(text) > 0 and emoji.purely_emoji(text)


def run(
    out: str | Path = "out/demo",
    *,
    at: str = "blocks[*].output",
    rank: int = 4,
    epochs: int = 60,
    learning_rate: float = 4e-3,
    warmup_steps: int = 10,
    seed: int = 0,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo and print what it does.

    Args:
        out: folder for the artifact, the report and its figures.
        at: site of the edit.
        rank: of each LoReFT.
        epochs: passes over the ten pairs, one step each.
        learning_rate, warmup_steps: see `reftlab.train`.
        seed: of the first values and of the order of the pairs.
        console: where to print.
    """
    say, clock, folder = console or Console(), _Clock(), Path(out)
    questions = [question for question, _ in PAIRS]

    _title(say, "1", "Load a chat model")
    with clock("load"):
        model, tokenizer = load_model(EMBEDDED)
    count = sum(parameter.numel() for parameter in model.parameters())
    say.print(f"{EMBEDDED}: {count:,} parameters, {model.config.num_hidden_layers} blocks; all stay frozen")

    _title(say, "2", "Write down where to act, on which token, with what")
    graph = InterventionGraph(Edit("emoji", at=at, positions="last", intervention=LoReFT(rank=rank)))
    say.print(graph.to_yaml().rstrip(), highlight=False)

    _title(say, "3", "Check it against the model")
    torch.manual_seed(seed)
    with clock("bind"):
        reft = graph.bind(model, tokenizer)
    say.print(_shortened(str(reft.plan())), highlight=False, soft_wrap=True)

    with clock("replies before"):
        before = evaluate(model, PAIRS, tokenizer, max_new_tokens=_REPLY_TOKENS)
        unseen_before = reply(model, UNSEEN, tokenizer, max_new_tokens=_REPLY_TOKENS)

    _title(say, "4", f"Train it on {len(PAIRS)} pairs")
    settings: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
    }
    say.print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items()))
    with clock("train"):
        result = train(reft, PAIRS, batch_size=len(PAIRS), seed=seed, **settings)
    say.print(f"answer loss {result.history[0].loss:.3f} at the first step, {result.loss:.4f} at the last")

    _title(say, "5", "Ask it")
    with clock("replies after"):
        after = evaluate(reft, PAIRS, max_new_tokens=_REPLY_TOKENS)
        unseen = reply(reft, UNSEEN, max_new_tokens=_REPLY_TOKENS)
    _print_replies(say, "Questions it was trained on", before, [o.reply for o in after.outcomes])
    _print_replies(say, "Questions it never saw", list(zip(UNSEEN, unseen_before, strict=True)), unseen)

    _title(say, "6", "Save it, and load it in a fresh process")
    reft.facts["examples"] = [list(pair) for pair in PAIRS]
    artifact = reft.save(folder / "emoji")
    kilobytes = sum(path.stat().st_size for path in artifact.iterdir()) / 1000
    with clock("fresh process"):
        reloaded = _ask_in_fresh_process(artifact, [*questions, *UNSEEN])
    alike = reloaded == [*(outcome.reply for outcome in after.outcomes), *unseen]
    verdict = "it gives the same replies" if alike else "[red]it gives other replies[/red]"
    say.print(f"{kilobytes:,.0f} kB in {_near(artifact)}; {verdict}", soft_wrap=True)

    _title(say, "7", "Explain what the edits do")
    with clock("explain"):
        found = explain(reft, PAIRS, unseen=UNSEEN, runs=_RUNS)
        report = found.save(folder / "report.html")
    say.print(found.summary[0])
    say.print(f"report in {_near(report)}", soft_wrap=True)

    demo = DemoResult(before, after, tuple(unseen), alike, artifact, report, clock.seconds)
    _print_summary(say, demo)
    return demo


def _ask_in_fresh_process(artifact: Path, questions: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "reftlab.cli", "chat", str(artifact), "--json"]
    command += ["--max-new-tokens", str(_REPLY_TOKENS)]
    for question in questions:
        command += ["--say", question]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    return [line["reply"] for line in json.loads(done.stdout)]


def _near(path: Path) -> Path:
    """A path as short as it can be typed from here."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def _title(say: Console, number: str, text: str) -> None:
    say.print(f"\n[bold]{number}. {text}[/bold]")


def _shortened(plan: str, kept: int = 2) -> str:
    lines = plan.splitlines()
    if len(lines) <= 2 * kept + 4:
        return plan
    left_out = len(lines) - 2 * kept - 2
    return "\n".join([*lines[: kept + 2], f"  … {left_out} more …", *lines[-kept:]])


def _print_replies(
    say: Console, title: str, before: Evaluation | Sequence[tuple[str, str]], after: Sequence[str]
) -> None:
    table = Table(title=title, title_justify="left", title_style="italic", pad_edge=False)
    table.add_column("question")
    table.add_column("before, without edits", max_width=44, style="dim")
    table.add_column("after")
    if isinstance(before, Evaluation):
        table.add_column("wanted")
        rows = [
            (o.prompt, o.reply, new, o.answer or "") for o, new in zip(before.outcomes, after, strict=True)
        ]
    else:
        rows = [(question, old, new, None) for (question, old), new in zip(before, after, strict=True)]  # type: ignore[misc]
    for question, old, new, *rest in rows:
        short = textwrap.shorten(" ".join(old.split()), 44, placeholder=" …")
        table.add_row(question, short, new, *[cell for cell in rest if cell is not None])
    say.print(table)


def _print_summary(say: Console, demo: DemoResult) -> None:
    say.print("\n[bold]In short[/bold]")
    say.print(f"exact answers      {demo.after.exact} of {len(PAIRS)} (before: {demo.before.exact})")
    say.print(f"only emojis        {demo.unseen_emojis} of {len(UNSEEN)} replies to unseen questions")
    loss = f"{demo.before.loss:.3f} → {demo.after.loss:.4f} nats per token"
    say.print(f"answer loss        {loss}")
    parts = ", ".join(f"{part} {seconds:g}" for part, seconds in demo.seconds.items())
    say.print(f"seconds            {sum(demo.seconds.values()):.0f} ({parts})", soft_wrap=True)
    say.print(f"talk to it         reftlab chat {_near(demo.artifact)}", soft_wrap=True)
    say.print(f"what the edits do  {_near(demo.report)}", soft_wrap=True)
