"""What training returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from reftlab.plotting import loss_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["TrainResult", "TrainStep"]


@dataclass(frozen=True)
class TrainStep:
    """What was noted after one optimiser step.

    Attributes:
        step: its number, from 1.
        epoch: passes over the data so far.
        loss: answer loss of the step's batch before the step, nats a token.
        learning_rate: that the step was made with.
        gradient_norm: norm of the gradient of all trainable numbers, before clipping.
        evaluation_loss: answer loss on the evaluation examples, nats a token, where it was measured.
        penalty: mean of the penalties of the steps since the last note, where interventions have some.
    """

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    evaluation_loss: float | None = None
    penalty: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a training went.

    Attributes:
        history: one entry for each logged step.
        steps: optimiser steps in all.
        seconds: wall-clock time of this call; a resumed training counts from its resumption.
        resumed_from: step at which an earlier, interrupted training was taken up, or None.
        on_cone: batches of this call for which only the causal cone of the edits ran.
        why_plain: why everything had to run for the others; see `reft.plan`.
    """

    history: tuple[TrainStep, ...]
    steps: int
    seconds: float
    resumed_from: int | None = None
    on_cone: int = 0
    why_plain: tuple[str, ...] = ()

    @property
    def loss(self) -> float | None:
        """The last logged training loss, nats a token; None where none was logged."""
        return next((entry.loss for entry in reversed(self.history) if entry.loss is not None), None)

    @property
    def evaluation_loss(self) -> float | None:
        """The last evaluation loss, nats a token; None where none was measured."""
        losses = (entry.evaluation_loss for entry in reversed(self.history))
        return next((loss for loss in losses if loss is not None), None)

    def to_frame(self) -> pd.DataFrame:
        """One line a logged step, with the fields of `TrainStep`."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(entry) for entry in self.history], columns=list(TrainStep.__annotations__)
        )

    def plot(self) -> Figure:
        """Loss against step, on a logarithmic axis."""
        frame = self.to_frame()
        training = frame.dropna(subset=["loss"])
        evaluation = frame.dropna(subset=["evaluation_loss"])
        return loss_figure(
            training["step"].tolist(),
            training["loss"].tolist(),
            evaluation["step"].tolist(),
            evaluation["evaluation_loss"].tolist(),
        )

    def __repr__(self) -> str:
        parts = [f"{self.steps} steps", f"{self.seconds:.1f} s"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.evaluation_loss is not None:
            parts.append(f"evaluation loss {self.evaluation_loss:.4g}")
        if self.resumed_from is not None:
            parts.append(f"resumed at step {self.resumed_from}")
        if self.on_cone:
            parts.append("on the cone")
        return f"TrainResult({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>" + self.to_frame().tail(5).to_html(index=False)
