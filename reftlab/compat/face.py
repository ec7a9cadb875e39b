"""What an `IntervenableModel` tells and changes of its parameters."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from reftlab.compat.bases import Intervention
from reftlab.errors import RunError
from reftlab.runtime import BoundModel

__all__ = ["Face"]


class Face(nn.Module):
    """pyvene's functions for parameters and devices, over a bound model.

    Attributes:
        reft: the bound model.
    """

    reft: BoundModel

    @property
    def model(self) -> Any:
        """The bare model."""
        return self.reft.model

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The interventions by pyvene's keys."""
        raise NotImplementedError

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser is given; natively `reft.interventions.parameters()`."""
        return [p for p in self.reft.parameters() if p.requires_grad]

    def count_parameters(self, include_model: bool = False) -> int:
        """Number of trainable numbers, those of linked interventions once."""
        count = sum(p.numel() for p in self.reft.interventions.parameters() if p.requires_grad)
        model = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return count + (model if include_model else 0)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers learn; natively `reft.plan()`."""
        own, whole = self.count_parameters(), sum(p.numel() for p in self.model.parameters())
        model = self.count_parameters(include_model=True) - own
        print(
            f"trainable intervention params: {own:,d} || trainable model params: {model:,d}\n"
            f"model params: {whole:,d} || trainable%: {100 * (own + model) / whole}"
        )

    def set_device(self, device: Any, set_model: bool = True) -> None:
        """Move interventions and model; natively `reft.to(device)`."""
        (self.reft if set_model else self.reft.interventions).to(device)

    def get_device(self) -> torch.device:
        """The model's device; natively `reft.device`."""
        return self.reft.device

    def enable_model_gradients(self) -> None:
        """Let the model learn; natively `model.requires_grad_(True)`."""
        self.model.train().requires_grad_(True)

    def disable_model_gradients(self) -> None:
        """Freeze the model; natively `rl.train` does it while it trains."""
        self.model.eval().requires_grad_(False)

    def set_zero_grad(self) -> None:
        """Forget the interventions' gradients; natively `reft.interventions.zero_grad()`."""
        self.reft.interventions.zero_grad()

    def set_temperature(self, temp: Any) -> None:
        """Set the temperature of every intervention that has one; natively `rl.train` does it."""
        for own in self.interventions.values():
            setter = getattr(own, "set_temperature", None)
            if setter is not None:
                setter(temp)

    def get_cached_activations(self) -> NoReturn:
        """Not supported; natively `reft.read("blocks[5].output @ last", **base)`."""
        raise RunError(
            "get_cached_activations is not supported; the native way is reft.read('blocks[5].output', **base)"
        )

    def get_cached_hot_activations(self) -> NoReturn:
        """Not supported; natively `reft.watching(see)`, which is shown what every edit does."""
        raise RunError(
            "get_cached_hot_activations is not supported; the native way is "
            "`with reft.watching(see):`, where see is shown what every edit does"
        )

    def disable_intervention_gradients(self) -> NoReturn:
        """Not supported; natively `reft.interventions.requires_grad_(False)`."""
        raise RunError(
            "disable_intervention_gradients is not supported; the native way is "
            "reft.interventions.requires_grad_(False)"
        )

    def train_alignment(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported; natively a loop over `reft(**base, sources=...)`, or `rl.train` for answers."""
        raise RunError(
            "train_alignment is not supported; the native way is a loop of your own with "
            "torch.optim.Adam(reft.interventions.parameters()), or rl.train for prompts with answers"
        )

    def eval_alignment(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported; natively a loop over `reft(**base, sources=...)`."""
        raise RunError(
            "eval_alignment is not supported; the native way is a loop over reft(**base, sources=...)"
        )
