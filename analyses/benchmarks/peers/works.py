"""The works, the same for every environment: their inputs, their timing, and the formula by hand.

Imports torch alone, since each peer's script reads it in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL = str(Path(__file__).resolve().parents[3] / "out" / "bench" / "model")
THREADS = 2
ROWS = 8  # of the training batches and of the passes over 128 tokens
BLOCKS, BLOCK, WIDTH, RANK = 30, 15, 576, 4
READ_BLOCK = 5
LEARNING_RATE = 4e-3

SHORT, LONG, WIDE = "step 68+8", "step 250+2", "step last(7), all blocks, 250+8"
MAP, READING, FORWARD, TASKS = (
    "patching map",
    "reading block 5",
    "forward with one edit",
    "8 tasks, 32 tokens",
)
EPOCH, EQUAL, MEMORY = (
    "first epoch 68+8",
    "loss and gradients against the plain run",
    "peak memory of a step 68+8",
)
WORKS = (SHORT, EPOCH, LONG, WIDE, MAP, READING, FORWARD, TASKS, EQUAL)

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When John and Mary went to the store, Mary gave a drink to"
ANSWERS = (" Mary", " John")
MAP_BATCH = 70  # cells in one pass, where a way puts several in one: about a thousand tokens
GREEDY = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 2}
CELLS_TIMED = tuple((block, (block * 5) % 14) for block in range(0, BLOCKS))  # of one pass per cell


@dataclass(frozen=True)
class Batch:
    """Random tokens of one training batch; only the answer carries labels."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    prompt: int
    answer: int

    @property
    def last(self) -> int:
        """The last prompt token."""
        return self.prompt - 1

    @property
    def kept(self) -> int:
        """Logits needed, from the end: those that predict the answer, and the last, which nothing reads."""
        return self.answer + 1


TRAINING = {SHORT: (68, 8), LONG: (250, 2), WIDE: (250, 8)}


def batch(work: str) -> Batch:
    """The batch of a training work: random tokens, an answer of which each token has a label."""
    prompt, answer = TRAINING[work]
    generator = torch.Generator().manual_seed(1000 * prompt + answer)
    ids = torch.randint(100, 40_000, (ROWS, prompt + answer), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return Batch(ids, torch.ones_like(ids), labels, prompt, answer)


def blocks_of(work: str) -> list[int]:
    """The blocks that a training work edits."""
    return list(range(BLOCKS)) if work == WIDE else [BLOCK]


def positions_of(work: str, data: Batch) -> slice:
    """The tokens that a training work edits."""
    return slice(data.prompt - 7 if work == WIDE else data.last, data.prompt)


def labels_of(data: Batch, few_logits: bool) -> dict[str, Any]:
    """A Hugging Face model's arguments for the loss, from all logits or from the last ones alone."""
    if not few_logits:
        return {"labels": data.labels}
    return {"labels": data.labels[:, -data.kept :], "logits_to_keep": data.kept}


def tokens_to_read() -> Tensor:
    return torch.randint(100, 40_000, (ROWS, 128), generator=torch.Generator().manual_seed(4))


def prompts() -> Tensor:
    """Sixteen prompts of 24 tokens, two for each of eight tasks."""
    return torch.randint(100, 40_000, (16, 24), generator=torch.Generator().manual_seed(6))


class LoReFT(nn.Module):
    """h + R(W h + b − Rᵀh) by hand, R (width, rank) orthonormal; for those who bring no LoReFT."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis = nn.Module()
        basis.weight = nn.Parameter(torch.randn(WIDTH, RANK, generator=generator))
        self.basis = nn.utils.parametrizations.orthogonal(basis)
        self.source = nn.Linear(WIDTH, RANK)
        with torch.no_grad():
            self.source.weight.copy_(torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5)
            self.source.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        basis = self.basis.weight
        return h + (self.source(h) - h @ basis) @ basis.T


def on_positions(edit: nn.Module, positions: slice) -> Callable[..., Any]:
    """A forward hook that edits some tokens of a block's output, whether that is a tensor or a tuple."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        new = hidden.clone()
        new[:, positions] = edit(hidden[:, positions])
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return hook


def stepper(loss: Callable[[], Tensor], parameters: Any) -> Callable[[], float]:
    """One training step: forward, loss, backward, AdamW."""
    optimiser = torch.optim.AdamW(list(parameters), lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> float:
        value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def logit_difference(last: Tensor, answers: tuple[int, int]) -> Tensor:
    """The metric of the map, from logits at the last token, `(row, vocabulary)`."""
    return last[:, answers[0]] - last[:, answers[1]]


def cells() -> list[tuple[int, int]]:
    """(block, token) of every cell of the map."""
    return [(block, token) for block in range(BLOCKS) for token in range(14)]


def cell_batches() -> list[list[tuple[int, int]]]:
    every = cells()
    return [every[start : start + MAP_BATCH] for start in range(0, len(every), MAP_BATCH)]


def rows_by_block(some: list[tuple[int, int]]) -> dict[int, tuple[list[int], list[int]]]:
    """For each block the rows that are patched there, a row for each cell, and the token of each."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row, (block, token) in enumerate(some):
        rows, tokens = found.setdefault(block, ([], []))
        rows.append(row)
        tokens.append(token)
    return found


def lens_site(block: int) -> str:
    """TransformerLens's name, in both versions, for what leaves a block."""
    return f"blocks.{block}.hook_resid_post"


def lens_hooks(some: list[tuple[int, int]], cache: Any) -> list[tuple[str, Callable[..., Tensor]]]:
    """TransformerLens's hooks that patch cells, a row for each, from a cache of the clean prompt."""

    def patch(rows: list[int], tokens: list[int], values: Tensor) -> Callable[..., Tensor]:
        def change(hidden: Tensor, hook: Any) -> Tensor:
            hidden[rows, tokens] = values[0, tokens]
            return hidden

        return change

    places = rows_by_block(some).items()
    return [(lens_site(block), patch(*where, cache[lens_site(block)])) for block, where in places]


@dataclass
class Bench:
    """Times ways of doing works in turn and writes one JSON line for each timing to a file.

    Attributes:
        peer: whose environment this is.
        only: the works to do.
        to: the file; standard output unless given.
        least: time everything once, with two rows, on one thread and without warming up, to see
            that it works.
    """

    peer: str
    only: tuple[str, ...]
    to: Path | None
    least: bool
    failed: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, peer: str) -> Bench:
        parser = argparse.ArgumentParser()
        parser.add_argument("--works", nargs="*", default=list(WORKS), choices=WORKS)
        parser.add_argument("--to", type=Path)
        parser.add_argument("--least", action="store_true", help="one timing of everything")
        options = parser.parse_args()
        if options.least:
            global ROWS
            ROWS = 2
        torch.set_num_threads(1 if options.least else THREADS)
        torch.manual_seed(0)
        return cls(peer, tuple(options.works), options.to, options.least)

    def write(self, **line: Any) -> None:
        text = json.dumps({"peer": self.peer, **line}, ensure_ascii=False)
        if self.to is None:
            print(text, flush=True)
        else:
            with self.to.open("a") as file:
                file.write(text + "\n")

    def time(
        self,
        work: str,
        ways: Mapping[str, Callable[[], Any]],
        repeats: int,
        *,
        times: float = 1.0,
        warm: int = 1,
    ) -> dict[str, Any]:
        """Times each way `repeats` times, in turn and in alternating order, after warm-up calls.

        Args:
            times: what the time is multiplied by, where only a part of the work is done.

        Returns:
            What each way's last call returned.
        """
        for _ in range(0 if self.least else warm):
            for call in ways.values():
                call()
        last = {}
        for number in range(1 if self.least else repeats):
            order = list(ways.items())
            for way, call in order if number % 2 else reversed(order):
                gc.collect()
                started = time.perf_counter()
                last[way] = call()
                seconds = time.perf_counter() - started
                self.write(work=work, way=way, ms=seconds * 1e3 * times, of=round(1 / times, 4))
        return last

    def time_map(
        self, single: Mapping[str, Callable[[], Any]], batched: Mapping[str, Callable[[], Any]]
    ) -> None:
        """Times ways of the patching map: those of one pass per cell on some cells, the others on all."""
        self.time(MAP, single, repeats=1, times=len(cells()) / len(CELLS_TIMED), warm=0)
        for way, found in self.time(MAP, batched, repeats=1, warm=0).items():
            self.check(MAP, way, found)

    def time_reading(self, whole: Callable[[], Any], way: str, read: Callable[[], Tensor]) -> None:
        """Times reading beside a whole forward pass, and checks what was read."""
        self.check(READING, "read", read()[:, -1, :4])
        self.time(READING, {"full forward": whole, way: read}, repeats=3)

    def check_losses(self, work: str, ways: Mapping[str, Callable[[], float]]) -> None:
        """The first step's loss of each way that starts from `LoReFT()`; it warms up, too."""
        for way, step in ways.items():
            self.check(work, way, step())

    def check(self, work: str, way: str, values: Any) -> None:
        """Numbers that must be the same in every environment."""
        flat = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
        self.write(work=work, way=way, check=flat)

    def cannot(self, work: str, reason: str, attempt: Callable[[], Any] | None = None, way: str = "") -> None:
        """Says that a peer cannot do a work; an attempt is made, and must raise."""
        said = ""
        if attempt is not None:
            try:
                attempt()
            except Exception as error:
                first = (str(error).strip() or "no message").splitlines()[0]
                said = f" ({type(error).__name__}: {first[:160]})"
            else:
                raise RuntimeError(f"{self.peer} can now do {work!r} {way}: time it")
        self.write(work=work, way=way, cannot=reason + said)

    def lacks(self, works: Iterable[str], reason: str) -> None:
        """Says of those works that were asked for that a peer has no means for them."""
        for work in works:
            if work in self.only:
                self.cannot(work, reason)

    @contextlib.contextmanager
    def work(self, name: str) -> Iterator[bool]:
        """Guards one work: a failure is written down and ends this work, not the others."""
        try:
            yield name in self.only
        except Exception as error:
            self.failed.append(name)
            self.write(work=name, failed=f"{type(error).__name__}: {error}", trace=traceback.format_exc())

    def run(self, works: Mapping[str, Callable[[Bench], None]]) -> None:
        """Does the works that were asked for, in order; the exit status tells whether one failed."""
        for name, do in works.items():
            with self.work(name) as wanted:
                if wanted:
                    do(self)
        if self.failed:
            raise SystemExit(f"{self.peer}: failed in {', '.join(self.failed)}")


Step = Callable[[], float]
StepsOf = Callable[[str, Batch], Callable[[bool], Step]]
"""From a work and its batch, what makes a step with few logits or with all."""


def trainings(
    steps_of: StepsOf, whole: str = "labels given", checked: bool = True
) -> dict[str, Callable[[Bench], None]]:
    """The training works of a peer.

    Args:
        steps_of: makes steps.
        whole: what a step with all logits is called.
        checked: whether the first step's loss is that of `LoReFT()`, which every such peer must have.
    """

    def training(work: str, repeats: int) -> Callable[[Bench], None]:
        def do(bench: Bench) -> None:
            step = steps_of(work, batch(work))
            ways = {"logits only where labelled": step(True)}
            if work == SHORT:
                ways[whole] = step(False)
            if checked:
                bench.check_losses(work, ways)
            bench.time(work, ways, repeats, warm=0 if checked else 1)

        return do

    return {SHORT: training(SHORT, 3), LONG: training(LONG, 1), WIDE: training(WIDE, 1)}


def model_step(model: nn.Module, data: Batch, few_logits: bool) -> Step:
    """A step of a Hugging Face model that holds its own trainable parameters."""
    more = labels_of(data, few_logits)

    def loss() -> Tensor:
        return model(input_ids=data.ids, attention_mask=data.mask, use_cache=False, **more).loss

    return stepper(loss, [p for p in model.parameters() if p.requires_grad])


def compare_forward(bench: Bench, model: nn.Module) -> None:
    """A Hugging Face model that holds its own edit beside the bare one."""
    ids = tokens_to_read()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    bare, _ = load()
    with torch.inference_mode():
        ways = {"bare": lambda: bare(**inputs), "one edit": lambda: model(**inputs)}
        bench.time(FORWARD, ways, repeats=3)


def load(**kwargs: Any) -> tuple[Any, Any]:
    """The embedded model from its folder: float32, sdpa, evaluation mode, frozen; and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="sdpa", **kwargs)
    model.eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(MODEL)


def ioi(tokenizer: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Clean and corrupted prompt, `(1, 14)` each, and the ids of both answers."""
    clean, corrupt = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (CLEAN, CORRUPT))
    assert clean.shape == corrupt.shape == (1, 14), (clean.shape, corrupt.shape)
    first, second = (tokenizer(text)["input_ids"] for text in ANSWERS)
    assert len(first) == len(second) == 1
    return clean, corrupt, (first[0], second[0])
