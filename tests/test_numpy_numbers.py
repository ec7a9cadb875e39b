"""Whole numbers of numpy are whole numbers."""

import numpy as np
import pytest

import reftlab as rl


@pytest.mark.parametrize("kind", ["LoReFT", "NoReFT", "DiReFT", "ConsReFT", "LobiReFT", "NodiReFT"])
def test_a_rank_of_numpy_binds_and_is_written_down_as_any_other(llama, kind, users_call):
    graph, plain = (
        rl.InterventionGraph(rl.Edit("a", at="blocks[1].output", intervention=getattr(rl, kind)(rank=rank)))
        for rank in (np.int64(2), 2)
    )
    graph.bind(llama)
    assert graph.to_yaml() == plain.to_yaml()


def test_heads_of_numpy_are_heads(users_call):
    read = rl.Read("blocks[1].attn.heads @ last", heads=np.int64(1))
    assert read.heads == (1,)
    assert read.label == rl.Read("blocks[1].attn.heads @ last", heads=1).label
    assert rl.Edit("z", at="blocks[1].attn.heads", heads=np.arange(2), intervention=rl.Zero()).heads == (0, 1)
