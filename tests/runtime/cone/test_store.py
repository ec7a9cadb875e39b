"""The store keeps within its budgets, falls through memory, file and computing anew, and changes no number."""

from __future__ import annotations

import errno
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.runtime.cone import ConeRunner, ConeStore
from reftlab.runtime.cone.store import _free_memory
from reftlab.runtime.sizes import in_words, parse_bytes
from tests.models import HEAD_SIZE, KEY_VALUE_HEADS, LAYERS, WIDTH

from .common import answered, assert_equal, bound, on_the_cone, small_store

FLOAT = 4
TOKEN_KEPT = 2 * KEY_VALUE_HEADS * HEAD_SIZE * FLOAT
"""Bytes of one token's keys and values in one block of the tiny llama."""


def values(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def size_of(store: ConeStore) -> int:
    """Bytes of the store's file on the disk."""
    return 0 if store._file is None else Path(f"/proc/self/fd/{store._file._file.fileno()}").stat().st_size


def test_what_was_put_in_comes_out_of_memory_and_of_the_file(tmp_path: Path) -> None:
    store = ConeStore(memory=100, disk="1MB", folder=tmp_path)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
    given = {bytes([n]): values(7 + n, n, kinds[n % 5]).view(1, -1) for n in range(20)}
    assert all(store.put(key, value) for key, value in given.items())
    assert 0 < store.in_memory <= 100
    assert store.on_disk > 0
    assert len(store) == 20
    for key, value in given.items():
        found = store.get(key)
        assert found is not None
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    assert store.get(b"?") is None
    assert b"?" not in store


def test_no_budget_is_passed_at_any_moment(tmp_path: Path) -> None:
    for memory, disk in itertools.product((0, 1, 399, 400, 401, 5000), (0, 1, 15, 16, 399, 1000, 5000)):
        store = ConeStore(memory=memory, disk=disk, folder=tmp_path)
        for number in range(30):
            value = values(1 + number * 7 % 40, number, (torch.float32, torch.bfloat16)[number % 2])
            room = store.put(bytes([number]), value)
            assert room == (bytes([number]) in store)
            held = sum(t.numel() * t.element_size() for t in store._held.values())
            assert held == store.in_memory <= memory
            assert size_of(store) == store.on_disk <= disk
        store.clear()


def test_a_key_that_is_there_is_kept_once(tmp_path: Path) -> None:
    store = ConeStore(memory=40, disk=1000, folder=tmp_path)
    for key in (b"a", b"b", b"a", b"b"):
        assert store.put(key, values(10))
    assert (len(store), store.in_memory, store.on_disk) == (2, 40, 48)


def test_the_store_has_a_copy_of_its_own_without_a_graph() -> None:
    store = small_store()
    value = torch.ones(3, requires_grad=True) * 2
    store.put(b"a", value)
    with torch.no_grad():
        value.zero_()
    found = store.get(b"a")
    assert found is not None
    assert found.tolist() == [2, 2, 2]
    assert not found.requires_grad
    assert found.grad_fn is None


def test_the_file_goes_with_the_store_and_has_no_name(tmp_path: Path) -> None:
    store = ConeStore(memory=0, disk=1000, folder=tmp_path)
    store.put(b"a", values(10))
    kept = store.get(b"a")
    assert list(tmp_path.iterdir()) == []
    store.clear()
    assert (len(store), store.in_memory, store.on_disk) == (0, 0, 0)
    assert store.get(b"a") is None
    assert kept is not None
    assert torch.equal(kept, values(10))
    assert store.put(b"a", values(10, 1))
    found = store.get(b"a")
    assert found is not None
    assert torch.equal(found, values(10, 1))


def test_values_read_before_the_file_grew_stay_right(tmp_path: Path) -> None:
    store = ConeStore(memory=0, disk="1MB", folder=tmp_path)
    kept = []
    for number in range(50):
        store.put(bytes([number]), values(100, number))
        kept.append(store.get(bytes([number])))
    assert all(torch.equal(one, values(100, n)) for n, one in enumerate(kept) if one is not None)
    assert None not in kept


def test_a_full_disk_keeps_what_is_there_and_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ConeStore(memory=0, disk="1MB", folder=tmp_path)
    store.put(b"a", values(100))
    assert store._file is not None
    whole = store._file._file

    class Full:
        """A file on a disk with room for ten more bytes."""

        def write(self, data: memoryview) -> int:
            if len(data) > 10:
                return int(whole.write(data[:10]))
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

    monkeypatch.setattr(store._file, "_file", Full())
    assert not store.put(b"b", values(100, 1))
    monkeypatch.undo()
    assert not store.put(b"c", values(1, 2))
    found = store.get(b"a")
    assert found is not None
    assert torch.equal(found, values(100))
    assert store.get(b"b") is store.get(b"c") is None
    assert store.on_disk == store.disk == 400
    store.clear()


def test_a_write_that_is_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ConeStore(memory=0, disk="1MB", folder=tmp_path)
    store.put(b"a", values(3))
    assert store._file is not None
    whole = store._file._file

    class Halting:
        def write(self, data: memoryview) -> int:
            return int(whole.write(data[:7]))

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

    monkeypatch.setattr(store._file, "_file", Halting())
    assert store.put(b"b", values(100, 1))
    assert store.put(b"c", values(9, 2))
    monkeypatch.undo()
    for key, value in ((b"a", values(3)), (b"b", values(100, 1)), (b"c", values(9, 2))):
        found = store.get(key)
        assert found is not None
        assert torch.equal(found, value)


def test_threads_share_a_store(tmp_path: Path) -> None:
    store = ConeStore(memory=4000, disk="2MB", folder=tmp_path)

    def work(first: int) -> None:
        for number in range(first, first + 60):
            store.put(number.to_bytes(2, "big"), values(200, number))

    # From several starts, so that the same keys are put at the same time.
    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 0, 30, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.in_memory <= 4000
    assert len(store) == 120
    for number in range(120):
        found = store.get(number.to_bytes(2, "big"))
        assert found is not None
        assert torch.equal(found, values(200, number))
    assert store.in_memory + store.on_disk == 120 * 800


@pytest.mark.parametrize("given", ["many", "3 XB", "-1", -1, 1.5, True, "", "1e3", "2,5 GB", [1]], ids=repr)
def test_budgets_that_are_no_number_of_bytes_are_refused(given: Any, users_call: None) -> None:
    with pytest.raises(DataError) as caught:
        ConeStore(memory=given)
    assert str(caught.value) == f"memory={given!r}: expected a number of bytes, such as 500_000_000 or '2GB'"
    with pytest.raises(DataError, match=r"^disk="):
        ConeStore(memory=0, disk=given)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder that exists"):
        ConeStore(folder=tmp_path / "nowhere")


def test_bytes_are_read_from_words_and_said_in_words() -> None:
    read = {
        "0": 0,
        "17": 17,
        "2kB": 2000,
        " 1.5 MB ": 1_500_000,
        "2 gib": 2 * 2**30,
        "1TB": 10**12,
        "512MiB": 2**29,
    }
    assert {text: parse_bytes("a", text) for text in read} == read
    said = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 2_500_000: "2.5 MB", 3 * 10**9: "3.0 GB"}
    assert {size: in_words(size) for size in said} == said
    assert repr(ConeStore(memory="2MB", disk=0)) == "ConeStore(0 B of 2.0 MB in memory, no file)"


def test_usual_budgets_are_shares_of_what_is_free() -> None:
    import shutil
    import tempfile

    store = ConeStore()
    free = shutil.disk_usage(tempfile.gettempdir()).free
    assert store.memory > 0
    assert 0.9 * min(free // 2, 32 * 10**9) <= store.disk <= min(1.1 * free // 2, 32 * 10**9)


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_is_the_memory_that_there_is(tmp_path: Path, version: int) -> None:
    # 900 bytes may be used and 500 are, of which 200 are a cache of files.
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, used, cache = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        if version == 1
        else ("memory.max", "memory.current", "file")
    )
    (folder / limit).write_text("900\n")
    (folder / used).write_text("500\n")
    (folder / "memory.stat").write_text(f"anon 300\n{cache} 200\nshmem 0\n")
    assert _free_memory(tmp_path) == 600
    (folder / limit).write_text("max\n")
    assert _free_memory(tmp_path) > 10**6
    assert _free_memory(tmp_path / "nowhere") > 10**6


EDITS = (
    rl.Edit("low", at="blocks[0].output", positions="last", intervention=rl.LoReFT(3)),
    rl.Edit("high", at="blocks[2].mlp.output", positions="last(2)", intervention=rl.DiReFT(2)),
)
BUDGETS = {
    "nothing": (0, 0), "tiny memory": (3000, 0), "tiny both": (2000, 2000), "file alone": (0, "9MB"),
    "memory, then file": (3000, "9MB"), "memory": ("9MB", 0),
}  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_budget_gives_the_same_numbers(family: str, budget: Any, tmp_path: Path) -> None:
    reft = bound(family, *EDITS)
    store = small_store(*budget, folder=tmp_path)
    runner = ConeRunner(reft, store)
    roomy = ConeRunner(reft, small_store())
    batches = [answered(seed=1), answered(((19, 2), (33, 1), (2, 5)), "left", seed=2), answered(seed=3)]
    for _ in range(2):
        for batch in batches:
            assert_equal(runner, batch)
            got, expected = on_the_cone(runner, batch), on_the_cone(roomy, batch)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
            assert store.in_memory <= parse_bytes("a", budget[0])
            assert size_of(store) == store.on_disk <= parse_bytes("a", budget[1])
    assert runner.why_plain == ()
    if budget == (0, 0):
        assert len(store) == 0
    if budget in ((0, "9MB"), (3000, "9MB")):
        assert store.on_disk > 3000


def test_the_second_visit_computes_nothing_outside_the_cone() -> None:
    reft = bound("llama", *EDITS)
    runner = ConeRunner(reft, small_store())
    first = on_the_cone(runner, answered())
    kept = {key: value.clone() for key, value in runner.store._held.items()}
    second = on_the_cone(runner, answered())
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert kept.keys() == runner.store._held.keys()
    assert all(torch.equal(value, runner.store._held[key]) for key, value in kept.items())
    assert not any(value.requires_grad or value.grad_fn for value in runner.store._held.values())


def test_kept_bytes_are_those_of_the_tokens_outside_the_cone() -> None:
    """One row of 20 + 2 tokens, cone from block 1 and token 19: keys of 19 tokens in 2 blocks, 2 vectors."""
    runner = ConeRunner(bound("llama", EDITS[0]), small_store())
    on_the_cone(runner, answered(((20, 2),)))
    expected = 19 * (LAYERS - 1) * TOKEN_KEPT + 2 * WIDTH * FLOAT
    assert runner.store.in_memory == expected == 19 * 2 * 192 + 256


def test_a_common_beginning_is_kept_once() -> None:
    """Rows that share 40 tokens share the entries of 32 of them, 16 at a time."""
    runner = ConeRunner(bound("llama", EDITS[0]), small_store())
    batch = answered(((45, 1),) * 6)
    batch["input_ids"][:, :40] = batch["input_ids"][0, :40]
    assert_equal(runner, batch)
    keys = (32 + 6 * (44 - 32)) * 2 * TOKEN_KEPT
    vectors = 6 * 1 * WIDTH * FLOAT
    assert runner.store.in_memory == keys + vectors
    # And so does an example that comes later.
    later = answered(((45, 1),), seed=9)
    later["input_ids"][:, :40] = batch["input_ids"][0, :40]
    assert_equal(runner, later)
    assert runner.store.in_memory == keys + vectors + 12 * 2 * TOKEN_KEPT + WIDTH * FLOAT


def test_rows_that_begin_alike_and_differ_early_are_told_apart() -> None:
    runner = ConeRunner(bound("llama", EDITS[0]), small_store())
    batch = answered(((20, 2), (20, 2), (36, 1)))
    batch["input_ids"][1] = batch["input_ids"][0]
    batch["input_ids"][1, 3] = (batch["input_ids"][0, 3] + 1) % 190 + 3
    for row in (0, 1, 2):
        assert_equal(runner, {name: value[row : row + 1] for name, value in batch.items()})
    assert_equal(runner, batch)


def test_filling_ahead_keeps_what_the_batches_need() -> None:
    reft = bound("llama", *EDITS)
    runner = ConeRunner(reft, small_store())
    batches = [answered(seed=1), answered(seed=2)]
    runner.fill(batches)
    count, size = len(runner.store), runner.store.in_memory
    for batch in batches:
        assert_equal(runner, batch)
    assert (len(runner.store), runner.store.in_memory) == (count, size)
    for parameter in reft.interventions.parameters():
        assert parameter.grad is None


def test_filling_ends_where_there_is_no_room() -> None:
    reft = bound("llama", *EDITS)
    drawn = []

    def batches() -> Any:
        for seed in range(50):
            drawn.append(seed)
            yield answered(seed=seed)

    runner = ConeRunner(reft, small_store(20_000))
    runner.fill(batches())
    assert 1 < len(drawn) < 20
    assert runner.store.in_memory <= 20_000
    assert_equal(runner, answered(seed=49))
    assert_equal(runner, answered(seed=0))


def test_values_made_in_inference_mode_serve_a_training_and_the_other_way_round() -> None:
    reft = bound("llama", *EDITS)
    runner = ConeRunner(reft, small_store())
    with torch.inference_mode():
        found = runner.predictions(answered())
    assert found is not None
    assert_equal(runner, answered())
    with torch.inference_mode():
        again = runner.predictions(answered())
    assert again is not None
    torch.testing.assert_close(again.logits, found.logits, rtol=1e-6, atol=1e-6)
