"""reftlab, and plain torch hooks by hand, in one process and in turn.

python analyses/benchmarks/peers/reftlab_works.py [--works WORK ...] [--least] [--to FILE]
python analyses/benchmarks/peers/reftlab_works.py --memory {plain hook,cone}
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from works import (
    ANSWERS,
    BLOCK,
    BLOCKS,
    CELLS_TIMED,
    CLEAN,
    CORRUPT,
    EPOCH,
    EQUAL,
    FORWARD,
    GREEDY,
    LONG,
    MAP,
    MEMORY,
    RANK,
    READ_BLOCK,
    READING,
    SHORT,
    TASKS,
    WIDE,
    Batch,
    Bench,
    LoReFT,
    batch,
    blocks_of,
    cell_batches,
    ioi,
    labels_of,
    load,
    logit_difference,
    on_positions,
    positions_of,
    prompts,
    rows_by_block,
    stepper,
    tokens_to_read,
)

import reftlab as rl
from reftlab.runtime.cone import ConeRunner

model, tokenizer = load()


@contextlib.contextmanager
def hooked(hooks: dict[int, Callable[..., Any]], on: nn.Module = model) -> Iterator[None]:
    handles = [on.model.layers[block].register_forward_hook(hook) for block, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_loss(work: str, data: Batch, few_logits: bool) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    edits = {block: LoReFT() for block in blocks_of(work)}
    hooks = {block: on_positions(edit, positions_of(work, data)) for block, edit in edits.items()}
    inputs: dict[str, Any] = {"input_ids": data.ids, "attention_mask": data.mask, "use_cache": False}
    inputs |= labels_of(data, few_logits)

    def loss() -> Tensor:
        with hooked(hooks):
            return model(**inputs).loss

    return loss, [p for edit in edits.values() for p in edit.parameters()]


def bound(work: str, on: nn.Module = model) -> Any:
    at, positions = ("blocks[*].output", "last(7)") if work == WIDE else (f"blocks[{BLOCK}].output", "last")
    edit = rl.Edit("edit", at=at, positions=positions, intervention=rl.LoReFT(rank=RANK))
    return rl.InterventionGraph(edit).bind(on, tokenizer)


def collated(data: Batch) -> dict[str, Tensor]:
    """What `Collator` makes of the same tokens."""
    positions = torch.arange(data.ids.shape[1]).expand_as(data.ids).contiguous()
    return {
        "input_ids": data.ids,
        "attention_mask": data.mask,
        "position_ids": positions,
        "labels": data.labels,
    }


def cone_loss(reft: Any, inputs: dict[str, Tensor], runner: ConeRunner) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        value = runner.loss(inputs)
        if value is None:
            raise RuntimeError(f"the cone was not taken: {runner.why_plain or runner.why}")
        return value

    return loss


def training(work: str, repeats: int) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        data = batch(work)
        reft = bound(work).train(False)
        inputs = collated(data)
        cone = stepper(cone_loss(reft, inputs, ConeRunner(reft)), reft.interventions.parameters())
        ways = {
            "plain hook": stepper(*plain_loss(work, data, few_logits=False)),
            "plain hook, logits only where labelled": stepper(*plain_loss(work, data, few_logits=True)),
            "reftlab": cone,
        }
        if work == SHORT:
            again = bound(work)
            parameters = again.interventions.parameters()
            ways["reftlab, cone=False"] = stepper(lambda: again(**inputs).loss, parameters)
            ways["reftlab, cone=False"]()
        hand = {way: call for way, call in ways.items() if way.startswith("plain")}
        bench.check_losses(work, hand)
        cone()  # the first epoch fills the store
        cone()
        bench.time(work, ways, repeats, warm=0)
        bench.time(work, {"reftlab": cone}, 2 * repeats, warm=0)

    return do


def epoch(bench: Bench) -> None:
    """A first epoch of four batches, from an empty store; time per batch."""
    count = 4
    data = batch(SHORT)
    shuffled = [
        torch.randperm(data.ids.shape[1], generator=torch.Generator().manual_seed(n)) for n in range(count)
    ]
    several = [Batch(data.ids[:, order], data.mask, data.ids[:, order].where(data.labels >= 0, -100), 68, 8)
               for order in shuffled]  # fmt: skip
    steps = [stepper(*plain_loss(SHORT, one, few_logits=False)) for one in several]
    reft = bound(SHORT)
    inputs = [collated(one) for one in several]

    def first() -> None:
        runner = ConeRunner(reft)
        runner.fill(inputs)
        for one in inputs:
            stepper(cone_loss(reft, one, runner), reft.interventions.parameters())()

    ways = {"plain hook": lambda: [step() for step in steps], "reftlab": first}
    bench.time(EPOCH, ways, repeats=1, times=1 / count, warm=0)


def equality(bench: Bench) -> None:
    """The cone against the plain run with the same edits, and each of them against more exact numbers."""
    exact = copy.deepcopy(model).to(torch.float64)
    for work in (SHORT, LONG, WIDE):
        inputs, reft = collated(batch(work)), bound(work)
        _moved(reft)
        plain, cone = _both(reft, inputs)
        bench.write(work=EQUAL, way=f"{work}: float32, cone against plain", errors=_errors(cone, plain))
        wide = _same_edits(work, exact, reft)
        best = _loss_and_gradients(wide, lambda wide=wide, inputs=inputs: wide(**inputs).loss)
        bench.write(work=EQUAL, way=f"{work}: plain, float32 against float64", errors=_errors(plain, best))
        bench.write(work=EQUAL, way=f"{work}: cone, float32 against float64", errors=_errors(cone, best))
        if work == SHORT:
            rough = _both(_same_edits(work, copy.deepcopy(model).to(torch.bfloat16), reft), inputs)
            for name, found in zip(("plain", "cone"), rough, strict=True):
                line = f"{work}: {name}, bfloat16 against float32"
                bench.write(work=EQUAL, way=line, errors=_errors(found, plain))


def _same_edits(work: str, on: nn.Module, other: Any) -> Any:
    reft = bound(work, on)
    reft.interventions.load_state_dict(other.interventions.state_dict())
    return reft


def _both(reft: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of the plain run and of the cone."""
    plain = _loss_and_gradients(reft, lambda: reft(**inputs).loss)
    return plain, _loss_and_gradients(reft, cone_loss(reft, inputs, ConeRunner(reft)))


def _loss_and_gradients(reft: Any, loss: Callable[[], Tensor]) -> list[Tensor]:
    reft.zero_grad()
    value = loss()
    value.backward()
    return [value.detach()[None].double(), *[p.grad.double() for p in reft.interventions.parameters()]]


def _errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative errors: of the loss, of all gradients as one vector, and the worst of any parameter's."""
    each = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    a, b = (torch.cat([gradient.flatten() for gradient in part[1:]]) for part in (found, wanted))
    return [each[0], float((a - b).norm() / b.norm()), max(each[1:])]


def _moved(reft: Any) -> None:
    """Edits that change something, as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


class Map:
    def __init__(self) -> None:
        self.clean, self.corrupt, self.answers = ioi(tokenizer)
        # Bound once, as other libraries wrap their model once.
        self.bound = rl.InterventionGraph().bind(model, tokenizer)

    def values(self) -> list[Tensor]:
        found: list[Tensor] = []
        keep = lambda module, inputs, output: found.append(output)  # noqa: E731
        with hooked(dict.fromkeys(range(BLOCKS), keep)):
            model(self.clean, use_cache=False, logits_to_keep=1)
        return found

    def run(self, values: list[Tensor], some: list[tuple[int, int]], logits_to_keep: int = 1) -> Tensor:
        """Cells as the rows of one whole pass; `logits_to_keep=0` keeps all, as by default."""

        def patch(rows: list[int], tokens: list[int], value: Tensor) -> Callable[..., Tensor]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                output = output.clone()
                output[rows, tokens] = value[0, tokens]
                return output

            return hook

        hooks = {block: patch(*where, values[block]) for block, where in rows_by_block(some).items()}
        with hooked(hooks):
            ids = self.corrupt.expand(len(some), -1)
            logits = model(ids, use_cache=False, logits_to_keep=logits_to_keep).logits
        return logit_difference(logits[:, -1], self.answers)

    def batched(self) -> Tensor:
        values = self.values()
        return torch.cat([self.run(values, some) for some in cell_batches()])

    def sweep(self, cone: bool = True) -> Any:
        return rl.sweep(
            self.bound,
            CLEAN,
            CORRUPT,
            sites="blocks[*].output",
            positions="all",
            metric=rl.logit_diff(*ANSWERS),
            cone=cone,
            progress=False,
        )


def patching(bench: Bench) -> None:
    with torch.inference_mode():
        grid = Map()
        values = grid.values()
        ways = {
            "plain hooks, one forward per cell": lambda: [
                grid.run(values, [cell], 0) for cell in CELLS_TIMED
            ],
            "plain hooks, one forward per cell, last logits only": lambda: [
                grid.run(values, [cell]) for cell in CELLS_TIMED
            ],
        }
        bench.time(MAP, ways, repeats=1, times=14, warm=0)
    found = grid.sweep()
    if found.why:
        raise RuntimeError(f"the sweep did not take the cone: {found.why}")
    bench.check(MAP, "reftlab", torch.from_numpy(found.values).flatten())

    def batched() -> Tensor:
        with torch.inference_mode():
            return grid.batched()

    last = bench.time(MAP, {"plain hooks, batched": batched, "reftlab": grid.sweep}, repeats=1, warm=0)
    bench.check(MAP, "plain hooks, batched", last["plain hooks, batched"])
    bench.time(MAP, {"reftlab, cone=False": lambda: grid.sweep(cone=False)}, repeats=1, warm=0)
    bench.time(MAP, {"reftlab": grid.sweep}, repeats=2, warm=0)


def reading(bench: Bench) -> None:
    ids = tokens_to_read()
    reft = rl.InterventionGraph().bind(model, tokenizer)
    name = f"blocks[{READ_BLOCK}].output @ all"
    read = lambda: reft.read(name, input_ids=ids)[name]  # noqa: E731
    with torch.inference_mode():
        bench.time_reading(lambda: model(ids, use_cache=False), "reftlab", read)


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    reft = bound(FORWARD)
    hook = on_positions(LoReFT(), slice(-1, None))

    def by_hand() -> None:
        with hooked({BLOCK: hook}):
            model(**inputs)

    with torch.inference_mode():
        ways = {"bare": lambda: model(**inputs), "plain hook": by_hand, "reftlab": lambda: reft(**inputs)}
        bench.time(FORWARD, ways, repeats=6)


def tasks(bench: Bench) -> None:
    ids = prompts()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [f"task{number}" for number in range(8)]
    of_row = [names[row // 2] for row in range(16)]

    def with_tasks(at: str, **where: Any) -> Any:
        edits = [rl.Edit(name, at=at, intervention=rl.LoReFT(rank=RANK), **where) for name in names]
        reft = rl.InterventionGraph(*edits).bind(model, tokenizer)
        _moved(reft)
        return reft

    def eight(reft: Any) -> list[Tensor]:
        parts = [{key: value[n : n + 2] for key, value in inputs.items()} for n in range(0, 16, 2)]
        pairs = zip(parts, names, strict=True)
        return [reft.generate(**part, **GREEDY, tasks=[name, name]) for part, name in pairs]

    block, blocks = f"blocks[{BLOCK}].output", "blocks[*].output"
    one, every = with_tasks(block, positions="last"), with_tasks(blocks, positions="last")
    always = [with_tasks(at, positions="all", phase="both") for at in (block, blocks)]
    with torch.inference_mode():
        ways = {
            "bare batch": lambda: model.generate(**inputs, **GREEDY),
            "one batch, one block": lambda: one.generate(**inputs, **GREEDY, tasks=of_row),
            "one batch, all blocks": lambda: every.generate(**inputs, **GREEDY, tasks=of_row),
            "one batch, one block, every token": lambda: always[0].generate(**inputs, **GREEDY, tasks=of_row),
            "one batch, all blocks, every token": lambda: always[1].generate(
                **inputs, **GREEDY, tasks=of_row
            ),
        }
        bench.time(TASKS, ways, repeats=2, warm=0)
        bench.time(TASKS, {"eight calls, one block": lambda: eight(one)}, repeats=1, warm=0)


def memory(bench: Bench, way: str) -> None:
    """Peaks of the process over its first and later steps, in MB above what it holds before the first."""
    data = batch(SHORT)
    if way == "cone":
        reft = bound(SHORT)
        runner = ConeRunner(reft)
        loss, parameters = cone_loss(reft, collated(data), runner), list(reft.interventions.parameters())
    else:
        loss, parameters = plain_loss(SHORT, data, few_logits=False)
    step = stepper(loss, parameters)
    with torch.inference_mode():
        model(data.ids[:1], use_cache=False)  # weights are read from disk when they are first touched
    before = _settled()
    step()
    first = _memory("VmHWM") - before
    after = _settled()
    for _ in range(2):
        step()
    bench.write(
        work=MEMORY, way=way, first_step_mb=first, kept_mb=after - before, step_mb=_memory("VmHWM") - before
    )


def _settled() -> float:
    """Memory in use, after giving free pages back and forgetting the peak so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    chosen = sys.argv.pop(sys.argv.index("--memory") + 1) if "--memory" in sys.argv else None
    if chosen is not None:
        sys.argv.remove("--memory")
        memory(Bench.of("reftlab"), chosen)
    else:
        Bench.of("reftlab").run(
            {
                SHORT: training(SHORT, 3),
                EPOCH: epoch,
                LONG: training(LONG, 1),
                WIDE: training(WIDE, 1),
                MAP: patching,
                READING: reading,
                FORWARD: forward,
                TASKS: tasks,
                EQUAL: equality,
            }
        )
