"""One shape-only pass: how wide each site is and in which order the sites are reached."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reftlab.address import ATTENTION_SIDES, Site
from reftlab.errors import BindError, ReftlabError
from reftlab.runtime.attention import SoftmaxWatch, attending
from reftlab.runtime.axes import ATTENTION, Axes, Stream, axes_of, stream_of
from reftlab.runtime.leaf import get_input, get_output
from reftlab.runtime.modes import evaluating
from reftlab.runtime.wrapped import device_of, eagerly, forget_wrapping, hidden_memo

__all__ = ["SiteFacts", "example_inputs", "moved", "scan", "sizes_of", "skeleton"]

_ROWS, _TOKENS, _DECODER_TOKENS = 2, 11, 7


@dataclass(frozen=True)
class SiteFacts:
    """What the pass saw at a site.

    Attributes:
        order: place in the order of execution, from 0; sites reached earlier have smaller numbers.
        shape: shape of the site's tensor for the example inputs.
        dtype: its dtype.
        calls: how often the module ran in one forward pass.
        axes: what its axes are, or None where they make no sense as tokens of features.
        stream: whose tokens its token axis holds.
    """

    order: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: int
    axes: Axes | None = None
    stream: Stream = "row"

    @property
    def width(self) -> int:
        """Number of features of each token."""
        return self.shape[-1] if self.axes is None else self.axes.width(self.shape)


def scan(model: nn.Module, sites: Iterable[Site], example: Any = None) -> dict[Site, SiteFacts]:
    """Run the model once on shapes alone and note what happens at each site.

    The pass runs on a copy whose tensors are on torch's meta device, so it costs no memory, does
    no arithmetic, and calls none of the user's hooks. Where a model cannot run without values, it
    runs once for real on the example, in eval mode and without gradients.

    Args:
        model: the model.
        sites: the places of interest.
        example: inputs for the pass, a mapping of arguments, a tuple or a tensor; made up for
            Hugging Face models of text, images and speech.

    Raises:
        BindError: no example is known, the model cannot run on it, or a site is never reached.
    """
    wanted = list(dict.fromkeys(sites))
    if not wanted:
        return {}
    args, kwargs = example_inputs(model, example)
    try:
        shapes = skeleton(model)
        facts = _watch(shapes, wanted, *moved((args, kwargs), torch.device("meta")))
    except ReftlabError:
        raise
    except Exception as no_shapes:  # any failure here means that this model needs values to run
        facts = _watch_for_real(model, wanted, args, kwargs, no_shapes)
    rows, tokens = sizes_of(args, kwargs)
    for site, fact in facts.items():
        found: tuple[Axes, Stream] | None
        if site.side in ATTENTION_SIDES and len(fact.shape) == 4:
            found = ATTENTION, stream_of(fact.shape[2], tokens, site.module)
        else:
            module = model.get_submodule(site.module)
            found = axes_of(fact.shape, module, rows, tokens, fact.calls, site.module)
        if found is not None:
            facts[site] = replace(fact, axes=found[0], stream=found[1])
    for site in wanted:
        if site not in facts:
            raise BindError(
                f"{site}: that module is never called in a forward pass, so nothing can be read or "
                "edited there"
            )
    return facts


def example_inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn the caller's example into a call's arguments, or make some up for a Hugging Face model.

    Raises:
        BindError: none was given, and reftlab does not know what the model takes.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    if example is not None:
        return (example if isinstance(example, tuple) else (example,)), {}
    made_up = _made_up(model)
    if made_up:
        return (), made_up
    takes = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    raise BindError(
        f"{type(model).__name__}: reftlab cannot make up inputs for it, whose forward takes "
        f"{', '.join(takes[:6]) or 'what it is given'}; give some, as in graph.bind(model, "
        f"example={{{takes[0] if takes else 'x'!r}: torch.zeros(2, ...)}})"
    )


def _made_up(model: nn.Module) -> dict[str, Tensor]:
    """Inputs for a Hugging Face model, with different numbers of rows, tokens and decoder tokens."""
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None) if config is not None else None
    text = getattr(config, "text_config", config)
    longest = getattr(text, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else _TOKENS
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs["input_ids"] = torch.zeros(_ROWS, min(_TOKENS, longest), dtype=torch.long)
    images = getattr(config, "vision_config", config)
    if main == "pixel_values" or (main == "input_ids" and hasattr(model, "vision_model")):
        size, channels = getattr(images, "image_size", 64), getattr(images, "num_channels", 3)
        height, width = size if isinstance(size, tuple | list) else (size, size)
        inputs["pixel_values"] = torch.zeros(_ROWS, channels, height, width)
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.zeros(_ROWS, config.num_mel_bins, frames)
    if inputs and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(_ROWS, _DECODER_TOKENS, dtype=torch.long)
    return inputs


def sizes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, dict[Stream, int]]:
    """The example's number of rows, and of tokens by stream."""
    streams = {
        "tokens": ("input_ids", "inputs_embeds"),
        "decoder": ("decoder_input_ids", "decoder_inputs_embeds"),
    }
    tokens: dict[Stream, int] = {}
    for stream, names in streams.items():
        found = [kwargs[n] for n in names if isinstance(kwargs.get(n), Tensor) and kwargs[n].dim() > 1]
        if found:
            tokens[stream] = found[0].shape[1]
    values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
    first = next(values, None)
    return (None if first is None else first.shape[0]), tokens


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the module tree without values and without hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = hidden_memo(model)
    for tensor in tensors:
        shape = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shape, False) if isinstance(tensor, nn.Parameter) else shape
    shapes = copy.deepcopy(model, memo)
    forget_wrapping(shapes)
    for module in shapes.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
    config: Any = getattr(shapes, "config", None)
    if getattr(config, "pad_token_id", None) is not None:
        # GPT-2 and others look for padding among the ids to warn of it, and here ids have no values.
        config.pad_token_id = None
    return shapes


def _watch_for_real(
    model: nn.Module, sites: list[Site], args: Any, kwargs: Any, cause: Exception
) -> dict[Site, SiteFacts]:
    try:
        with evaluating(model), torch.random.fork_rng():
            return _watch(model, sites, *moved((args, kwargs), device_of(model)))
    except ReftlabError:
        raise
    except Exception as error:
        raise BindError(
            f"{type(model).__name__} could not run on the example inputs: {error}. Give inputs that "
            "it takes, as in graph.bind(model, example={...})"
        ) from cause


def _watch(
    model: nn.Module, sites: list[Site], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Site, SiteFacts]:
    facts: dict[Site, SiteFacts] = {}
    # Heads, parts and differently written paths of one place are reached together.
    orders: dict[tuple[str, str], int] = {}

    def note(site: Site, tensor: Tensor) -> None:
        before = facts.get(site)
        order = orders.setdefault((site.module, site.side), len(orders))
        facts[site] = (
            SiteFacts(order, tuple(tensor.shape), tensor.dtype, 1)
            if before is None
            else SiteFacts(before.order, before.shape, before.dtype, before.calls + 1)
        )

    handles = []
    watch = SoftmaxWatch()
    attended: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.side in ATTENTION_SIDES:
            attended.setdefault(site.module, {})[site.side] = site
    try:
        for name, sides in attended.items():
            handles += _watched(model.get_submodule(name), sides, watch, note)
        for site in sites:
            module = model.get_submodule(site.module)
            if site.side == "output":
                handles.append(module.register_forward_hook(_output_noter(site, note)))
            elif site.side == "input":
                handles.append(module.register_forward_pre_hook(_input_noter(site, note), with_kwargs=True))
        with torch.no_grad(), eagerly(model), attending(model, watch) if attended else nullcontext():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return facts


def _watched(module: nn.Module, sides: Mapping[str, Site], watch: SoftmaxWatch, note: Any) -> list[Any]:
    """Hooks that note the shapes on both sides of an attention module's softmax."""

    def noter(side: str) -> Any:
        def act(tensor: Tensor) -> Tensor:
            if side in sides:
                note(sides[side], tensor)
            return tensor

        return act

    site = str(next(iter(sides.values())))
    begin = module.register_forward_pre_hook(lambda *_: watch.begin(noter("scores"), noter("pattern")))
    return [begin, module.register_forward_hook(lambda *_: watch.end(site))]


def _output_noter(site: Site, note: Any) -> Any:
    return lambda module, args, output: note(site, get_output(output, site.leaf, str(site)))


def _input_noter(site: Site, note: Any) -> Any:
    return lambda module, args, kwargs: note(site, get_input(module, args, kwargs, site.leaf, str(site)))


def moved(value: Any, device: torch.device) -> Any:
    """Inputs on a device; floats of a width that the model does not expect stay the caller's matter."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return value
