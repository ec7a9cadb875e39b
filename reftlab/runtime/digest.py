"""What tells a model, as it is now, from all others: for results that are kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reftlab.runtime.attention import backend_of
from reftlab.runtime.wrapped import value_of

__all__ = ["ADAPTER_SWITCHES", "digest_of", "model_digest", "state_digest"]

ADAPTER_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""What PEFT's layers note of the adapters that act, which changes their outputs and no number."""


def model_digest(model: nn.Module) -> str:
    """A hash of everything that a model's outputs depend on.

    That is its class and its modules', its configuration, the bytes of every parameter and buffer, and
    which of PEFT's adapters act. Hooks of others are not part of it. Every byte is read: about a second
    for each gigabyte.

    Args:
        model: the bare model; weights that accelerate keeps elsewhere are fetched.
    """
    config = getattr(model, "config", None)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((str(config), backend_of(config))).encode())
    for name, module in model.named_modules():
        own = vars(module)
        switches = [str(own.get(switch)) for switch in ADAPTER_SWITCHES if "_active_adapter" in own]
        digest.update(repr((name, type(module).__module__, type(module).__qualname__, switches)).encode())
    for named in (model.named_parameters(), model.named_buffers()):
        for name, _ in named:
            digest.update(f"{name} {digest_of([value_of(model, name)])}".encode())
    return digest.hexdigest()


def state_digest(module: nn.Module) -> str:
    """A hash of every parameter and buffer of a module, by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {digest_of([tensor])}".encode())
    return digest.hexdigest()


def digest_of(tensors: Sequence[Tensor]) -> str:
    """A hash of tensors: their types, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        held = tensor.detach().contiguous().cpu()
        digest.update(f"{held.dtype} {tuple(held.shape)}".encode())
        digest.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
