from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from reftlab.errors import ArtifactError
from reftlab.runtime.saving import load, save
from reftlab.store import artifact as store
from reftlab.store import read_artifact, write_artifact
from tests.store import cases

ROOT = Path(__file__).parents[2]
GRAPH, TENSORS, FACTS, CARD = "graph.yaml", "interventions.safetensors", "artifact.json", "README.md"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_was_written_is_read(bound, folder):
    artifact = read_artifact(folder)
    assert artifact.folder == folder
    assert artifact.graph == bound.graph
    assert artifact.facts["training"] == bound.facts["training"]
    assert artifact.facts["base_model"]["hidden_size"] == cases.WIDTH
    own = bound.interventions.state_dict()
    assert artifact.state.keys() == own.keys()
    assert all(torch.equal(artifact.state[name], own[name]) for name in own)


def test_an_artifact_is_text_and_safetensors(folder):
    assert sorted(entry.name for entry in folder.iterdir()) == sorted([GRAPH, TENSORS, FACTS, CARD])
    for name in (GRAPH, FACTS, CARD):
        (folder / name).read_text(encoding="utf-8")
    assert int.from_bytes((folder / TENSORS).read_bytes()[:8], "little") < 2000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_artifact_or_the_new_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.store.interrupted", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    killed = report[:-1]
    assert len(killed) > 20
    assert all(entry["killed"] for entry in killed)
    assert not report[-1]["killed"]
    assert all(len(entry["found"]) == 1 for entry in report)
    found = [entry["found"][0] for entry in report]
    assert found == sorted(found, reverse=True), "once the new one is there, it stays"
    assert (found[0], found[-1]) == ("old", "new")
    assert all(entry["kept"] == "keep me" for entry in report)
    assert any(len(entry["left"]) > 1 for entry in killed), (
        "no kill left anything, so the next check says nothing"
    )
    assert all(entry["clean"] == entry["after"] == ["artifact"] for entry in report)


def test_clearing_up_spares_everything_else(bound, folder):
    beside = folder.parent
    spared = [
        ".artifact.new-",
        ".artifact.new-abcdefgh.previous",
        ".other.new-abcdefgh",
        "artifact.new-abcdefgh",
    ]
    for name in [*spared, ".artifact.new-abcdefgh"]:
        (beside / name).mkdir()
        (beside / name / "file").write_text("x")
    save(bound, folder)
    assert sorted(entry.name for entry in beside.iterdir()) == sorted([*spared, "artifact"])


def test_nothing_is_cleared_while_another_process_saves_there(bound, folder, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(store, "_LONGEST_WAIT", 0.1)
    building = folder.parent / ".artifact.new-abcdefgh"
    building.mkdir()
    handle = os.open(folder.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    save(bound, folder)
    assert building.is_dir()
    os.close(handle)
    save(bound, folder)
    assert not building.exists()


def test_saves_to_one_folder_at_once_leave_one_whole_artifact(small_model, tokenizer, tmp_path):
    versions = [cases.randomise(cases.example(small_model, tokenizer), seed) for seed in range(4)]
    failed = []

    def run(bound):
        try:
            for _ in range(5):
                save(bound, tmp_path / "a")
                load(tmp_path / "a", small_model, tokenizer)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(bound,)) for bound in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert load(tmp_path / "a", small_model, tokenizer).graph == versions[0].graph


def _peft(folder, model):
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def _pyreft(folder, model):
    folder.mkdir()
    (folder / "config.json").write_text('{"representations": []}')
    (folder / "intkey_layer.15.comp.block_output.unit.pos.nunit.1#0.bin").write_bytes(b"")


def _transformers(folder, model):
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "library"), [(_peft, "PEFT"), (_pyreft, "pyreft or pyvene"), (_transformers, "transformers")]
)
def test_folders_of_other_libraries_are_recognised_and_kept(make, library, bound, small_model, tmp_path):
    make(tmp_path / "theirs", small_model)
    before = contents(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=f"was written by {library} "):
        load(tmp_path / "theirs", small_model)
    with pytest.raises(ArtifactError, match="is not a reftlab artifact; save to a new or empty folder"):
        save(bound, tmp_path / "theirs")
    assert contents(tmp_path / "theirs") == before


def test_a_folder_or_file_of_the_users_is_not_overwritten(bound, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(ArtifactError, match="so that nothing of yours is overwritten"):
            save(bound, tmp_path / name)
    assert contents(tmp_path) == {"file": b"x", "mine/thesis.txt": b"years of work"}


def test_an_empty_folder_may_be_saved_to(bound, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o700)
    save(bound, tmp_path / "a")
    assert read_artifact(tmp_path / "a").graph == bound.graph
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_the_users_own_files_in_an_artifact_are_kept(bound, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"png")
    (folder / "link").symlink_to("notes.txt")
    bound.facts = {"training": {"epochs": 31}}
    save(bound, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "figures" / "a.png").read_bytes() == b"png"
    assert (folder / "link").is_symlink()
    assert read_artifact(folder).facts["training"] == {"epochs": 31}


def test_a_link_to_an_artifact_stays_a_link(bound, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    save(bound, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_artifact(tmp_path / "link").folder == folder


def test_a_failure_in_the_middle_leaves_everything_as_it_was(bound, folder, monkeypatch):
    before = contents(folder.parent)

    def full(*_args, **_rest):
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "_flush", full)
    with pytest.raises(OSError, match="No space"):
        save(bound, folder)
    assert contents(folder.parent) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["artifact"]


def test_tensors_that_share_memory_are_written_apart(folder, tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole[0], "b": whole.T, "c": whole}
    write_artifact(tmp_path / "shared", cases.InterventionGraph(), state, {}, "card")
    read = read_artifact(tmp_path / "shared").state
    assert all(torch.equal(read[name], state[name]) for name in state)
