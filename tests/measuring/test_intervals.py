"""What counts as rounding, and what as an effect."""

import pytest
import torch
from torch import nn

from reftlab.measuring import change_of, rounding_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_told_from_a_small_effect_in_every_precision(dtype):
    layer = nn.Linear(64, 64).to(dtype)
    torch.manual_seed(0)
    inputs = torch.randn(20, 64, dtype=torch.float64)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    exact = nn.functional.linear(inputs, weight, bias).abs().sum(1)
    rounded = layer(inputs.to(dtype)).detach().double().abs().sum(1)
    step, ones = rounding_in(layer), torch.ones(20)
    apart = (rounded - exact).float()
    assert float(apart.abs().max()) > 0 or dtype == torch.float64
    nothing = change_of(apart, ones, torch.stack([rounded, exact]).float(), step=step)
    assert nothing.value == nothing.low == nothing.high == 0
    # A change by a tenth is an effect in each of them.
    tenth = (0.1 * exact).float()
    found = change_of(tenth, ones, torch.stack([1.1 * exact, exact]).float(), step=step)
    assert found.low > 0
