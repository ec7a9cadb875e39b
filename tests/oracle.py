"""An oracle that shares nothing with reftlab's runtime: plain hooks, loops and formulas by hand."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import reftlab as rl
from tests.models import WIDTH

Columns = list[list[int]]
Change = Callable[[Tensor, Tensor | None, list[int]], Tensor]


def raw_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of blocks, by its own names."""
    kind = model.config.model_type
    if kind == "gpt2":
        return model.transformer.h
    return model.bert.encoder.layer if kind == "bert" else model.model.layers


def columns_by_hand(mask: Tensor, choose: Callable[[list[int]], list[int]]) -> Columns:
    """For each row the columns that `choose` takes from its real ones, ascending."""
    rows = [[column for column, real in enumerate(row) if real] for row in mask.tolist()]
    return [sorted(set(choose(real))) for real in rows]


def numbers_by_hand(mask: Tensor, columns: Columns) -> Columns:
    """The same tokens counted among the real tokens of their rows."""
    return [
        [sum(row[:column]) for column in chosen] for row, chosen in zip(mask.tolist(), columns, strict=True)
    ]


@contextlib.contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output, or the first entry of it, by what `change` makes of a copy in every call."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output.clone())
        return (change(output[0].clone()), *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def plain_edit(
    module: nn.Module,
    mask: Tensor,
    columns: Columns,
    change: Change,
    source: Tensor | None = None,
    *,
    decode: bool = False,
    cached: bool = True,
) -> Iterator[None]:
    """Edit a module's output with one hook.

    Args:
        module: whose output, or the first entry of it.
        mask: attention mask of the prompt.
        columns: for each row of the prompt the columns to edit.
        change: `(base, source, token numbers) -> new`.
        source: the source's vectors, row after row.
        decode: also edit every column behind the prompt.
        cached: whether each call continues where the one before ended.
    """
    seen = 0

    def act(hidden: Tensor) -> Tensor:
        nonlocal seen
        start = seen if cached else 0
        stop = start + hidden.shape[1]
        seen = stop
        group = hidden.shape[0] // len(columns)
        places, numbers, order = [], [], []
        before = 0
        for prompt_row, chosen in enumerate(columns):
            real = int(mask[prompt_row].sum())
            for copy in range(group):
                row = prompt_row * group + copy
                for number, column in enumerate(chosen):
                    if start <= column < stop:
                        places.append((row, column - start))
                        numbers.append(int(mask[prompt_row, :column].sum()))
                        order.append(before + number)
                if decode:
                    for column in range(max(start, mask.shape[1]), stop):
                        places.append((row, column - start))
                        numbers.append(real + column - mask.shape[1])
            before += len(chosen)
        if not places:
            return hidden
        base = torch.stack([hidden[row, column] for row, column in places]).float()
        values = change(base, None if source is None else source[order].float(), numbers)
        for (row, column), value in zip(places, values, strict=True):
            hidden[row, column] = value.to(hidden.dtype)
        return hidden

    with hooked(module, act):
        yield


def plain_read(model: nn.Module, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A module's output `(row, token, width)` in a bare forward pass."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda module, args, output: kept.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    return kept[0]


def gathered(hidden: Tensor, columns: Columns) -> Tensor:
    """The chosen vectors, row after row, `(n, width)`."""
    return torch.stack([hidden[row, column] for row, chosen in enumerate(columns) for column in chosen])


def orthonormal(weight: Tensor) -> Tensor:
    """Gram and Schmidt's columns, in float64: the QR factor with a positive diagonal in R."""
    columns: list[Tensor] = []
    for column in weight.detach().double().T:
        for earlier in columns:
            column = column - (column @ earlier) * earlier
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1).float()


def loreft(built: Any, h: Tensor, keep: list[int] | None = None) -> Tensor:
    """`h + Rᵀ(W h + b − R h)`, in the directions `keep` alone where they are given."""
    r = orthonormal(built.basis.weight)
    amounts = h @ built.linear.weight.T + built.linear.bias - h @ r
    if keep is not None:
        amounts = torch.stack([amounts[:, n] * (n in keep) for n in range(amounts.shape[1])], dim=1)
    return h + amounts @ r.T


Formula = Callable[[nn.Module, Tensor, Tensor | None, list[int]], Tensor]


@dataclass(frozen=True)
class Case:
    """One intervention and its formula, written out by hand.

    Attributes:
        name: for the test's id.
        make: makes the intervention.
        formula: `(built intervention, base, source, token numbers) -> new`; it takes only parameters
            from the built one.
        source: whether it takes a source.
    """

    name: str
    make: Callable[[], rl.Intervention]
    formula: Formula
    source: bool = False


def _loreft_dressed(built: Any, h: Tensor, source: Any, numbers: Any) -> Tensor:
    r = orthonormal(built.basis.weight)
    return h + 0.5 * (torch.tanh(h @ built.linear.weight.T) - h @ r) @ r.T


def _noreft(built: Any, h: Tensor, source: Any, numbers: Any) -> Tensor:
    w1, b, w2 = built.linear.weight, built.linear.bias, built.projection.weight
    return h + (h @ w1.T + b - h @ w2.T) @ w2


def _direft(built: Any, h: Tensor, source: Any, numbers: Any) -> Tensor:
    return h + (h @ built.linear.weight.T + built.linear.bias) @ orthonormal(built.basis.weight).T


def _nodireft(built: Any, h: Tensor, source: Any, numbers: Any) -> Tensor:
    inner = h @ built.linear.weight.T + built.linear.bias
    return h + 2.0 * (inner * (inner > 0)) @ built.projection.weight


def _consreft(built: Any, h: Tensor, source: Any, numbers: Any) -> Tensor:
    r = orthonormal(built.basis.weight)
    return h + (built.target - h @ r) @ r.T


def _lobireft(built: Any, h: Tensor, source: Any, numbers: Any) -> Tensor:
    return h + orthonormal(built.basis.weight) @ built.target


def _mean_of_rows(built: Any, h: Tensor, source: Tensor, numbers: list[int]) -> Tensor:
    # Token numbers ascend inside a row, so a new row begins where they do not.
    starts = [k for k, n in enumerate(numbers) if k == 0 or n <= numbers[k - 1]]
    rows = zip(starts, [*starts[1:], len(numbers)], strict=True)
    return torch.cat([source[a:b].mean(0).repeat(b - a, 1) for a, b in rows])


def _noise(built: Any, h: Tensor, source: Any, numbers: list[int]) -> Tensor:
    rows = []
    for number in numbers:
        digest = hashlib.sha256(f"{built.seed}/{number}".encode()).digest()
        seed = int.from_bytes(digest[:7], "big")
        rows.append(torch.randn(h.shape[1], generator=torch.Generator().manual_seed(seed)))
    return h + 0.7 * torch.stack(rows)


VECTOR = torch.linspace(-2.0, 2.0, WIDTH)
LADDER = [0.1 * (number % 7) for number in range(WIDTH)]

CASES = [
    Case("LoReFT", lambda: rl.LoReFT(rank=3), lambda m, h, s, n: loreft(m, h)),
    Case("LoReFT-tanh-no-bias-scaled", lambda: rl.LoReFT(2, activation="tanh", bias=False, scale=0.5), _loreft_dressed),
    Case("NoReFT", lambda: rl.NoReFT(rank=3), _noreft),
    Case("DiReFT", lambda: rl.DiReFT(rank=3), _direft),
    Case("NodiReFT-relu-scaled", lambda: rl.NodiReFT(rank=3, activation="relu", scale=2.0), _nodireft),
    Case("ConsReFT", lambda: rl.ConsReFT(rank=3), _consreft),
    Case("LobiReFT", lambda: rl.LobiReFT(rank=3), _lobireft),
    Case("Swap", lambda: rl.Swap(), lambda m, h, s, n: s, source=True),
    Case("Add-value", lambda: rl.Add(VECTOR), lambda m, h, s, n: h + VECTOR),
    Case("Add-source", lambda: rl.Add(), lambda m, h, s, n: h + s, source=True),
    Case("Subtract-value", lambda: rl.Subtract(LADDER), lambda m, h, s, n: h - torch.tensor(LADDER)),
    Case("Subtract-source", lambda: rl.Subtract(), lambda m, h, s, n: h - s, source=True),
    Case("Scale", lambda: rl.Scale(-2.0), lambda m, h, s, n: -2.0 * h),
    Case("Zero", lambda: rl.Zero(), lambda m, h, s, n: 0.0 * h),
    Case("Mean-value", lambda: rl.Mean(VECTOR), lambda m, h, s, n: VECTOR.repeat(len(h), 1)),
    Case("Mean-source", lambda: rl.Mean(), _mean_of_rows, source=True),
    Case("Noise", lambda: rl.Noise(std=0.7, seed=3), _noise),
    Case("Clamp", lambda: rl.Clamp(-0.2, 0.3), lambda m, h, s, n: h.where(h > -0.2, -0.2).where(h < 0.3, 0.3)),
    Case("Function", lambda: rl.Function(torch.sin), lambda m, h, s, n: h.sin()),
    Case("Function-source", lambda: rl.Function(torch.maximum), lambda m, h, s, n: h.where(h > s, s), source=True),
]  # fmt: skip


def randomise(reft: nn.Module) -> None:
    """Give every trained parameter numbers large enough to show."""
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance`, absolute and relative."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
