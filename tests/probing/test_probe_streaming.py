"""Vectors that do not fit into memory: the same findings, read chunk by chunk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reftlab.probing import probe
from reftlab.probing.cells import cells_of_activations
from reftlab.probing.significance import Shuffles, label_columns, linear_statistics, rotated
from reftlab.probing.streaming import Stream, scaled_chunks
from tests.probing.planted_vectors import along, random_activations

OPTIONS: dict[str, Any] = {"progress": False, "bootstrap": 0, "control": None, "permutations": 39, "folds": 3}


def _stream(found: Any, rows: int) -> Stream:
    return Stream(cells_of_activations(found, None, None).by_place[0, 0], rows, 0)


@pytest.mark.parametrize("rows", [16, 33, 500])
def test_every_epoch_sees_each_vector_once_in_another_order(rows: int) -> None:
    found = random_activations(np.random.default_rng(0), 130, 3, 1)
    stream, vectors = _stream(found, rows), found["blocks[0].output @ last"].numpy()
    orders = []
    for epoch in (0, 1):
        numbers, parts = zip(*stream.shuffled(epoch), strict=True)
        assert max(map(len, numbers)) <= rows
        orders.append(np.concatenate(numbers))
        assert np.array_equal(np.concatenate(parts), vectors[orders[-1]])
        assert sorted(orders[-1]) == list(range(130))
    assert orders[0].tolist() != orders[1].tolist()
    assert np.array_equal(np.concatenate([part for _, part in stream.in_order()]), vectors)


@pytest.mark.parametrize("kind", ["two", "three", "several", "numbers"])
def test_streamed_probes_find_what_those_in_memory_find(kind: str) -> None:
    generator = np.random.default_rng(6)
    y = generator.integers(0, 3, 200)
    labels: Any = {
        "two": y > 0, "three": y, "several": np.eye(3, dtype=int)[y], "numbers": y + generator.normal(size=200),
    }[kind]  # fmt: skip
    written = 3 * np.eye(6)[y] if kind != "numbers" else along(np.ones(6), labels)
    found = random_activations(generator, 200, 6, 2, planted={1: written})
    plain = probe(found, labels=labels, **{**OPTIONS, "permutations": 0})
    streamed = probe(found, labels=labels, memory=38_000, **OPTIONS)
    assert streamed.streamed.all()
    assert not plain.streamed.any()
    assert any("chunk by chunk" in note for note in streamed.notes)
    assert abs(streamed.score[1, 0] - plain.score[1, 0]) < 0.05
    assert streamed.significant()[1, 0]
    assert streamed.score[0, 0] < streamed.score[1, 0] - 0.15
    one, two = (result["blocks[1].output @ last"].direction for result in (plain, streamed))
    # Of what is not linearly separable the two differ in strength and not much in direction.
    assert ((one * two).sum(-1) > 0.9).all()


def test_streamed_statistics_are_those_in_memory() -> None:
    found = random_activations(np.random.default_rng(2), 90, 5, 1)
    y = np.random.default_rng(3).integers(0, 2, 90)
    columns, shuffles = label_columns(y, "classification", 2), Shuffles.of(y, np.arange(90), 9, 0)
    turned = rotated(found["blocks[0].output @ last"].numpy())
    plain = linear_statistics(lambda: iter([(slice(0, 90), turned)]), 5, columns, shuffles)
    chunked = linear_statistics(scaled_chunks(_stream(found, 17)), 5, columns, shuffles, 200)
    assert np.allclose(plain, chunked, atol=1e-4)


def test_control_labels_are_streamed_too() -> None:
    generator = np.random.default_rng(4)
    y = np.arange(200) % 2
    found = random_activations(generator, 200, 5, 1, planted={0: along(np.eye(5)[0], 5 * y)})
    result = probe(found, labels=y, memory=30_000, **{**OPTIONS, "control": "auto", "permutations": 0})
    assert result.selectivity is not None
    assert result.score[0, 0] > 0.95
    assert result.selectivity[0, 0] > 0.25


_WORK = """
import json, os, sys, threading, time
import numpy as np, torch
import reftlab as rl
from reftlab.collecting import Activations, SiteVectors
from reftlab.probing import probe

def anonymous():
    # Memory that is the process's own; pages of the mapped file can be dropped at any time.
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

folder, width, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vectors = torch.from_file(folder + "/vectors.bin", shared=False, size=n * width, dtype=torch.float32).reshape(n, width)
index = torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)], 1)
found = Activations({"blocks[0].output @ last": SiteVectors(vectors, index)}, n)
labels = (np.arange(n) % 2).tolist()
small = Activations({"blocks[0].output @ last": SiteVectors(vectors[:400], index[:400])}, 400)
options = dict(progress=False, bootstrap=0, control=None, permutations=0, folds=2)
probe(small, labels=labels[:400], memory=1_600_000, **options)     # so that everything is imported
before, most, done = anonymous(), [0], []
def watch():
    while not done:
        most[0] = max(most[0], anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
result = probe(found, labels=labels, memory=int(sys.argv[4]), **options)
done.append(1); thread.join()
print(json.dumps([most[0] - before, bool(result.streamed.all()), float(result.score[0, 0])]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_map_larger_than_its_memory_is_read_chunk_by_chunk(tmp_path: Path) -> None:
    n, width, memory = 5_000, 512, 6_000_000
    generator = np.random.default_rng(5)
    with (tmp_path / "vectors.bin").open("wb") as file:
        for start in range(0, n, 1000):
            part = generator.standard_normal((1000, width), dtype=np.float32)
            part[:, 7] += 3 * (np.arange(start, start + 1000) % 2)
            file.write(part.tobytes())
    size = n * width * 4
    done = subprocess.run(
        [sys.executable, "-c", _WORK, str(tmp_path), str(width), str(n), str(memory)],
        capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    taken, streamed, score = json.loads(done.stdout.strip().splitlines()[-1])
    assert size > 1.5 * memory
    assert streamed
    assert taken < memory
    assert score > 0.87
