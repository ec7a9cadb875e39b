"""Heads and features of a site's last axis."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from reftlab import AddressError
from reftlab.address import View, head_size
from tests.models import HEAD_SIZE, WIDTH


def chosen(width: int, size: int | None = None, **view: Any) -> list[int] | None:
    index = View.of(**view).index(width, "a.site", size)
    return None if index is None else index.tolist()


def test_heads_are_runs_of_features() -> None:
    assert chosen(12, 3, heads=[2, 0]) == [6, 7, 8, 0, 1, 2]
    assert chosen(12, 3, heads=1) == [3, 4, 5]
    assert chosen(12, 3, heads=-1) == [9, 10, 11]


def test_features_are_a_slice_numbers_or_everything() -> None:
    assert chosen(10, features=slice(2, 8, 3)) == [2, 5]
    assert chosen(10, features=slice(-2, None)) == [8, 9]
    assert chosen(10, features=[7, 1]) == [7, 1]
    assert chosen(10, features=range(3)) == [0, 1, 2]
    assert chosen(10, features=4) == [4]
    assert chosen(10) is None


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"heads": [0], "features": [0]}, "not both"),
        ({"heads": []}, "heads must be different whole numbers"),
        ({"heads": [1, 1]}, "heads must be different whole numbers"),
        ({"heads": True}, "heads must be"),
        ({"features": [0.5]}, "features must be"),
        ({"features": slice(0, 4, 0)}, "step other than 0"),
        ({"features": slice("a", None)}, "expected whole numbers"),
    ],
)
def test_a_view_that_makes_no_sense_is_refused(view: dict[str, Any], message: str) -> None:
    with pytest.raises(AddressError, match=message):
        View.of(**view)


@pytest.mark.parametrize(
    ("view", "size", "message"),
    [
        ({"heads": [4]}, 3, "there are 4, numbered 0 to 3; 4 is outside"),
        ({"heads": [0, -4]}, 3, "names one of the 4 twice"),
        ({"heads": [0]}, 5, "its width 12 is not a whole number of heads of 5"),
        ({"heads": [0]}, None, "no attention module with a head size"),
        ({"features": [12]}, None, "12 is outside"),
        ({"features": [-13]}, None, "-13 is outside"),
        ({"features": slice(12, 20)}, None, "chooses nothing at a.site, which is 12 wide"),
    ],
)
def test_a_view_that_the_site_does_not_have_is_refused(view: Any, size: Any, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        chosen(12, size, **view)


def test_the_head_size_is_read_from_the_attention_module(any_model: Any) -> None:
    size = WIDTH // 4 if any_model.config.model_type in ("gpt2", "bert") else HEAD_SIZE
    sites = {
        "gpt2": "transformer.h.0.attn.c_proj",
        "bert": "bert.encoder.layer.0.attention.output.dense",
    }
    assert (
        head_size(any_model, sites.get(any_model.config.model_type, "model.layers.0.self_attn.o_proj"))
        == size
    )


def test_an_mlp_has_no_heads(any_model: Any) -> None:
    sites = {"gpt2": "transformer.h.0.mlp", "bert": "bert.encoder.layer.0.output.dense"}
    assert head_size(any_model, sites.get(any_model.config.model_type, "model.layers.0.mlp")) is None


def test_torch_attention_has_heads() -> None:
    model = nn.Sequential(nn.MultiheadAttention(12, 4))
    assert head_size(model, "0.out_proj") == 3


def test_views_read_well() -> None:
    assert str(View.of(heads=[2, 5])) == "heads 2, 5"
    assert str(View.of(features=slice(0, 64))) == "features 0:64"
    assert str(View.of(features=slice(None, 8, 2))) == "features :8:2"
    many = str(View.of(features=range(9)))
    assert many.startswith("features 0, 1, 2, 3, 4, 5 … 9 in all, ")
    assert many != str(View.of(features=[*range(8), 20]))
    assert str(View()) == "all features"
