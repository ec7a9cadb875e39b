"""What a bound model does in a forward pass, in words and as a table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftlab.errors import RunError
from reftlab.graph import BASE
from reftlab.runtime.build import gate_keys
from reftlab.runtime.cone.plan import ConePlan, cone_plan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime.model import BoundModel
    from reftlab.runtime.places import BoundEdit, BoundRead

__all__ = ["Plan", "PlanStep", "plan_of"]


@dataclass(frozen=True)
class PlanStep:
    """One thing that happens in a run.

    Attributes:
        run: the run.
        what: `edit` or `read`.
        name: name of the edit or the read.
        site: raw path of the site.
        positions: which tokens, and the phase where it is not the prompt's.
        width: number of features.
        does: the intervention and where its source comes from, in words.
        parameters: number of trainable numbers; those that several edits share stand at the first.
    """

    run: str
    what: str
    name: str
    site: str
    positions: str
    width: int
    does: str
    parameters: int


@dataclass(frozen=True)
class Plan:
    """The steps of every run, in the order in which they happen.

    Attributes:
        model: class name of the model.
        runs: the runs in order; `base` is last.
        steps: the steps.
        base_parameters: number of numbers in the bare model.
        cone: what of a batch must be computed, where the plan is that of a batch.
    """

    model: str
    runs: tuple[str, ...]
    steps: tuple[PlanStep, ...]
    base_parameters: int
    cone: ConePlan | None = None

    @property
    def parameters(self) -> int:
        """Number of trainable numbers in all edits."""
        return sum(step.parameters for step in self.steps)

    def to_frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([vars(step) for step in self.steps])

    def __str__(self) -> str:
        share = self.parameters / max(1, self.base_parameters)
        lines = [
            f"{self.model}: {len(self.steps)} step{'s' * (len(self.steps) != 1)}, "
            f"{self.parameters:,} trainable numbers ({share:.4%} of the model's {self.base_parameters:,})"
        ]
        for run in self.runs:
            lines.append(f"run {run}:")
            steps = [step for step in self.steps if step.run == run]
            lines += [f"  {number}. {_sentence(step)}" for number, step in enumerate(steps, 1)]
            lines += [] if steps else ["  as the bare model"]
        if self.cone is not None:
            lines.append(str(self.cone))
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, row: int = 0) -> Figure:
        """What of a batch's row is computed, cached and skipped, blocks × tokens.

        Raises:
            RunError: the plan was made without a batch.
        """
        if self.cone is None:
            raise RunError("this plan is of no batch; give one, as in reft.plan(batch).plot()")
        return self.cone.plot(row)

    def _repr_html_(self) -> str:
        head = html.escape(str(self).splitlines()[0])
        columns = ("run", "what", "name", "site", "positions", "width", "does", "parameters")
        titles = "".join(f"<th style='text-align:left'>{column}</th>" for column in columns)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:left'>{html.escape(str(getattr(step, column)))}</td>"
                for column in columns
            )
            + "</tr>"
            for step in self.steps
        )
        cone = "" if self.cone is None else self.cone._repr_html_()
        return f"<div><p>{head}</p><table><tr>{titles}</tr>{body}</table>{cone}</div>"


def plan_of(bound: BoundModel, batch: Mapping[str, Any] | None = None, **of_batch: bool) -> Plan:
    """Work out the plan of a bound model, and of a batch of inputs where one is given."""
    counted: set[int] = set()
    steps = [(edit.edit.run, edit.order, 1, _edit_step(bound, edit, counted)) for edit in bound.edits]
    fed = [read for edit in bound.edits for read in edit.reads]
    steps += [(read.run, read.order, 0, _read_step(read)) for read in fed]
    steps += [(read.run, read.order, 2, _read_step(read)) for read in bound._bound_reads]
    runs = bound.graph.run_order
    steps.sort(key=lambda step: (runs.index(step[0]), step[1], step[2]))
    return Plan(
        type(bound.model).__name__,
        runs,
        tuple(step[3] for step in steps),
        sum(parameter.numel() for parameter in bound.model.parameters()),
        None if batch is None else cone_plan(bound, batch, **of_batch),
    )


def _edit_step(bound: BoundModel, place: BoundEdit, counted: set[int]) -> PlanStep:
    """An edit's step; numbers that several edits share are counted with the first of them."""
    edit = place.edit
    parts = [bound.interventions[name] for name in (place.module, *gate_keys(place))]
    own = [p for part in parts for p in part.parameters() if p.requires_grad and id(p) not in counted]
    counted.update(map(id, own))
    does = edit.intervention.describe()
    if edit.strength != 1.0:
        does += f" at strength {edit.strength:g}"
    if place.source is not None:
        does += f", source {place.source.site} @ {place.source.positions} of run {place.source.run}"
    if edit.subspace is not None:
        does += f" in directions {', '.join(map(str, edit.subspace))}"
    if edit.share is not None:
        does += f", shared as {edit.share}"
    if edit.tasks:
        does += f", tasks {', '.join(edit.task_names)}"
    if edit.when is not None:
        does += f", when {edit.when!r}"
    if edit.name in bound._disabled:
        does += " (disabled)"
    if edit.name in bound._folds.names:
        does += " (folded into the weights)"
    return PlanStep(
        edit.run,
        "edit",
        place.key,
        f"{place.site}{edit.view.suffix}",
        str(edit.positions) + ("" if edit.phase == "prompt" else f", phase {edit.phase}"),
        place.width,
        does,
        sum(parameter.numel() for parameter in own),
    )


def _read_step(read: BoundRead) -> PlanStep:
    does = "read" if read.run == BASE else "read, then stop"
    return PlanStep(read.run, "read", read.label, str(read.site), str(read.positions), read.width, does, 0)


def _sentence(step: PlanStep) -> str:
    where = f"{step.site} @ {step.positions} (width {step.width})"
    if step.what == "read":
        return f"read {step.name} at {where}"
    count = f", {step.parameters:,} trainable numbers" if step.parameters else ""
    return f"edit {step.name} at {where}: {step.does}{count}"
