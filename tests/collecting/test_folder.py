"""Collections on disk: memory-mapped, bounded in memory, resumable, and refused where something differs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from sklearn.linear_model import LogisticRegression

import reftlab as rl
from tests.collecting.test_collect import LAST, TEXTS, id_rows
from tests.models import batch_of, build, copy_of

SITES = (LAST, "blocks[0].output")
ALL = "blocks[0].output @ all"


def collect(model: Any, data: Any, *sites: Any, **arguments: Any) -> rl.Activations:
    return rl.collect(model, data, *(sites or SITES), **{"batch_size": 2, "progress": False, **arguments})


def same(one: rl.Activations, other: rl.Activations) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one.flat(name).vectors, other.flat(name).vectors)
        and torch.equal(one.flat(name).index, other.flat(name).index)
        for name in one
    )


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the system lists a mapped safetensors file at the tensor's address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.endswith(".safetensors")
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ready", [False, True], ids=["rows", "batches"])
def test_a_folder_holds_the_same_vectors_memory_mapped(
    tmp_path: Path, dtype: torch.dtype, ready: bool
) -> None:
    model = build("llama").to(dtype)
    data: Any = [batch_of((4, 6)), batch_of((3, 2))] if ready else id_rows()
    inside, outside = collect(model, data), collect(model, data, folder=tmp_path / "found")
    assert same(inside, outside)
    assert outside[ALL].dtype == dtype
    assert is_mapped(outside[ALL])
    assert not is_mapped(inside[ALL])
    assert repr(outside).endswith(f"memory-mapped in {tmp_path / 'found'})")
    del model
    opened = rl.Activations.open(str(tmp_path / "found"))
    assert same(inside, opened)
    assert opened.rows == inside.rows == len(opened.flat(LAST).examples)
    plain = safetensors.torch.load_file(tmp_path / "found" / "vectors-000.safetensors")
    assert torch.equal(plain["array"], inside[LAST])
    opened[LAST].zero_()
    assert same(inside, rl.Activations.open(tmp_path / "found"))


def test_an_example_without_a_token_takes_no_room_on_the_disk(llama: Any, tmp_path: Path) -> None:
    rows = id_rows()[:3]
    site = rl.Read("blocks[1].output", [[0], [], [1]], name="chosen")
    found = collect(llama, rows, site, batch_size=1, folder=tmp_path)
    assert found.flat("chosen").index.tolist() == [[0, 0, rows[0][0]], [2, 1, rows[2][1]]]
    assert same(found, collect(llama, rows, site, batch_size=1))


def test_scikit_learn_takes_the_mapped_vectors_as_they_are(llama: Any, tmp_path: Path) -> None:
    rows = [[*row, 7 + 4 * (number % 2)] for number, row in enumerate(id_rows() * 3)]
    vectors = collect(llama, rows, "blocks[0].output @ last", folder=tmp_path)["blocks[0].output @ last"]
    assert is_mapped(vectors)
    array = vectors.numpy()
    assert array.ctypes.data == vectors.data_ptr()
    labels = [row[-1] for row in rows]
    assert LogisticRegression(max_iter=1000).fit(array, labels).predict(array).tolist() == labels


@pytest.mark.parametrize("ready", [False, True], ids=["rows", "batches"])
def test_more_than_the_budget_goes_to_a_temporary_folder_that_goes_with_the_result(
    llama: Any, ready: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data: Any = [batch_of((4, 6)), batch_of((3, 2)), batch_of((9, 9))] if ready else id_rows()
    inside = collect(llama, data)
    assert list(tmp_path.iterdir()) == []
    size = sum(
        values.vectors.nbytes + values.index.nbytes for values in inside.values_by_name.values()
    )  # fmt: skip
    if not ready:
        assert collect(llama, data, budget=size).folder is None
    outside = collect(llama, data, budget=size - 1)
    assert same(inside, outside)
    assert is_mapped(outside[ALL])
    assert [outside.folder] == list(tmp_path.iterdir())
    assert "temporary folder, removed with this object" in repr(outside)
    kept = outside[ALL]
    del outside
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(kept, inside[ALL])


def test_an_error_leaves_no_temporary_folder(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with stopping(llama, 3), pytest.raises(KeyboardInterrupt):
        collect(llama, id_rows(), budget=1)
    assert list(tmp_path.iterdir()) == []


class stopping:  # noqa: N801
    """Raise KeyboardInterrupt in a model's n-th pass inside a `with` block, and count the passes."""

    def __init__(self, model: Any, at: int = 0) -> None:
        self.model, self.at, self.passes = model, at, 0

    def __enter__(self) -> stopping:
        self.handle = self.model.model.layers[0].register_forward_pre_hook(self.see)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def see(self, *_: Any) -> None:
        self.passes += 1
        if self.passes == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ready", [False, True], ids=["rows", "batches"])
def test_after_ctrl_c_only_the_batches_that_are_left_run(llama: Any, ready: bool, tmp_path: Path) -> None:
    data: Any = [batch_of((4, 6)), batch_of((3, 2)), batch_of((5, 2))] if ready else id_rows()
    batches = 3 if ready else 4
    with stopping(llama, 3), pytest.raises(KeyboardInterrupt):
        collect(llama, data, folder=tmp_path)
    with pytest.raises(rl.ArtifactError, match="interrupted after 2 batches"):
        rl.Activations.open(tmp_path)
    with stopping(llama) as rest:
        found = collect(llama, data, folder=tmp_path)
    assert rest.passes == batches - 2
    assert same(found, collect(llama, data))
    with stopping(llama) as nothing:
        assert same(collect(llama, data, folder=tmp_path), found)
    assert nothing.passes == 0


def differing(model: Any) -> dict[str, tuple[Any, dict[str, Any], str]]:
    """Ways in which a second call differs from `collect(model, TEXTS)`, and what the error names."""
    other = copy_of(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.01)
    return {
        "data": (model, {"data": [*TEXTS[:-1], "Paris"]}, "with data="),
        "order": (model, {"data": TEXTS[::-1]}, "with data="),
        "fewer": (model, {"data": TEXTS[1:]}, "with examples=7, and now it is 6"),
        "sites": (model, {"sites": (LAST,)}, r"other sites: Read\('blocks\[0\].output'\) there and not here"),
        "positions": (
            model,
            {"positions": "first"},
            r"other sites: .*blocks\[0\].output @ first'\) here and not",
        ),
        "weights": (other, {}, "with weights="),
        "dtype of the model": (copy_of(model).bfloat16(), {}, "with model_dtype='float32'.*'bfloat16'"),
        "model": (build("gpt2"), {}, "with model='LlamaForCausalLM', and now it is 'GPT2"),
        "dtype": (model, {"dtype": "float16"}, "with dtype=None, and now it is 'float16'"),
        "batches": (model, {"batch_size": 3}, "with batch_size=2, and now it is 3"),
    }


@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
def test_a_folder_of_other_data_model_or_settings_is_refused(
    llama: Any, tokenizer: Any, tmp_path: Path, interrupted: bool
) -> None:
    if interrupted:
        with stopping(llama, 3), pytest.raises(KeyboardInterrupt):
            collect(llama, TEXTS, tokenizer=tokenizer, folder=tmp_path)
    else:
        collect(llama, TEXTS, tokenizer=tokenizer, folder=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for what, (model, changes, message) in differing(llama).items():
        arguments = {"tokenizer": tokenizer, "folder": tmp_path, **changes}
        data, sites = arguments.pop("data", TEXTS), arguments.pop("sites", SITES)
        with pytest.raises(rl.DataError, match=message):
            collect(model, data, *sites, **arguments)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, what
    with pytest.raises(rl.DataError, match="resume=True"):
        collect(llama, TEXTS, tokenizer=tokenizer, folder=tmp_path, resume=False)


def test_other_edits_or_other_numbers_in_them_are_refused(llama: Any, tmp_path: Path) -> None:
    def bound(scale: float, name: str = "emoji") -> Any:
        edit = rl.Edit(name, at="blocks[0].output", positions="last", intervention=rl.LoReFT(rank=2))
        reft = rl.InterventionGraph(edit).bind(llama)
        with torch.no_grad():
            next(reft.interventions.parameters()).fill_(scale)
        return reft

    torch.manual_seed(3)
    reft = bound(0.5)
    collect(reft, id_rows(), folder=tmp_path)
    collect(reft, id_rows(), folder=tmp_path)
    changed = copy_of(reft)
    with torch.no_grad():
        next(changed.interventions.parameters())[0] += 1e-4
    with pytest.raises(rl.DataError, match="with interventions="):
        collect(changed, id_rows(), folder=tmp_path)
    with pytest.raises(rl.DataError, match="other edits: emoji there and not here, formal here"):
        collect(bound(0.5, "formal"), id_rows(), folder=tmp_path)
    with reft.disabled(), pytest.raises(rl.DataError, match="other edits: emoji there and not here"):
        collect(reft, id_rows(), folder=tmp_path)
    with pytest.raises(rl.DataError, match="with select=None"):
        collect(reft, id_rows(), folder=tmp_path, select="emoji")
    with pytest.raises(rl.DataError, match="other edits"):
        collect(llama, id_rows(), folder=tmp_path)


def test_a_folder_that_holds_something_else_is_refused(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(rl.DataError, match=r"is no collection: it holds thesis\.tex; give a new or an empty"):
        collect(llama, id_rows(), folder=tmp_path)
    with pytest.raises(rl.DataError, match="it holds a file"):
        collect(llama, id_rows(), folder=tmp_path / "thesis.tex")
    with pytest.raises(rl.ArtifactError, match="there is no collection"):
        rl.Activations.open(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_damage_is_named(llama: Any, tmp_path: Path) -> None:
    collect(llama, id_rows(), folder=tmp_path)
    record, vectors = tmp_path / "activations.json", tmp_path / "vectors-001.safetensors"
    text, data = record.read_text(), vectors.read_bytes()
    for changed, message in (
        (text[:-20], "is damaged"),
        (text.replace('"format": 1', '"format": 99'), "format 99.*upgrade"),
        (text.replace('"rows"', '"rws"'), "lacks 'rows'"),
        ("[]", "does not name a format"),
    ):
        record.write_text(changed)
        with pytest.raises(rl.ArtifactError, match=message):
            rl.Activations.open(tmp_path)
        with pytest.raises(rl.ArtifactError, match=message):
            collect(llama, id_rows(), folder=tmp_path)
    record.write_text(text)
    vectors.write_bytes(data[:-4])
    with pytest.raises(rl.ArtifactError, match=r"vectors-001.safetensors is missing, damaged or cut short"):
        rl.Activations.open(tmp_path)
    vectors.write_bytes((tmp_path / "vectors-000.safetensors").read_bytes())
    with pytest.raises(rl.ArtifactError, match="vectors-001 does not hold"):
        rl.Activations.open(tmp_path)


def test_an_interrupted_collection_whose_files_are_gone_does_not_go_on(llama: Any, tmp_path: Path) -> None:
    with stopping(llama, 3), pytest.raises(KeyboardInterrupt):
        collect(llama, id_rows(), folder=tmp_path)
    (tmp_path / "vectors-000.safetensors").unlink()
    with pytest.raises(rl.ArtifactError, match=r"vectors-000.safetensors is missing or shorter"):
        collect(llama, id_rows(), folder=tmp_path)
