"""A sweep that takes its time, for a test that kills it: `python -m tests.sweeping.interrupted FOLDER`."""

import sys
import time

import torch

import reftlab as rl
from tests.models import build
from tests.sweeping.by_hand import difference, prompts


def slowly(seconds):
    """A metric of the same name however long it takes."""

    def metric(logits):
        if len(logits) > 1:
            time.sleep(seconds)
        return difference(logits)

    metric.key = "difference"
    return metric


def run(folder, seconds=0.0):
    clean, corrupt = prompts(rows=2)
    return rl.sweep(
        build("llama"), clean, corrupt, metric=slowly(seconds), batch_size=3, folder=folder, progress=False
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], seconds=0.3)
