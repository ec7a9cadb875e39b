from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from reftlab.errors import ArtifactError
from reftlab.runtime.saving import load, save
from reftlab.store import read_artifact
from tests.store import cases

GRAPH, TENSORS, FACTS, CARD = "graph.yaml", "interventions.safetensors", "artifact.json", "README.md"


def reseal(folder):
    """Write the checksums anew, as someone who changes an artifact on purpose would."""
    facts = json.loads((folder / FACTS).read_text())
    facts["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (GRAPH, TENSORS)
    }
    (folder / FACTS).write_text(json.dumps(facts))


@pytest.mark.parametrize("name", [GRAPH, TENSORS, FACTS])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match="is not a whole artifact") as error:
        read_artifact(folder)
    assert f"{name} is missing; save it again, or copy all of it" in str(error.value)


def test_the_card_is_not_needed_to_load(folder):
    (folder / CARD).unlink()
    read_artifact(folder)


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(ArtifactError, match=r"there is no artifact at .*nowhere: no such folder"):
        read_artifact(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="no such folder"):
        read_artifact(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="not a whole artifact"):
        read_artifact(tmp_path / "empty")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, "one byte"])
@pytest.mark.parametrize("name", [GRAPH, TENSORS, FACTS])
def test_a_file_cut_short_is_named(name, share, folder):
    whole = (folder / name).read_bytes()
    # The last byte of the facts is the end of their last line.
    cut = len(whole) - (2 if name == FACTS else 1) if share == "one byte" else int(len(whole) * share)
    (folder / name).write_bytes(whole[:cut])
    with pytest.raises(ArtifactError, match=name) as error:
        read_artifact(folder)
    assert "again" in str(error.value)


def test_a_graph_cut_between_two_edits_is_noticed(folder):
    text = (folder / GRAPH).read_text()
    (folder / GRAPH).write_text(text[: text.index("- edit: zero")])
    with pytest.raises(ArtifactError, match=r"graph\.yaml is not the file that was saved here"):
        read_artifact(folder)


def test_a_changed_number_in_the_tensors_is_noticed(folder):
    whole = bytearray((folder / TENSORS).read_bytes())
    whole[-3] ^= 1
    (folder / TENSORS).write_bytes(whole)
    with pytest.raises(ArtifactError, match="not the file that was saved here"):
        read_artifact(folder)


def test_other_line_ends_in_the_graph_are_no_damage(bound, folder):
    (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes().replace(b"\n", b"\r\n"))
    assert read_artifact(folder).graph == bound.graph


def test_files_of_two_artifacts_do_not_mix(bound, folder, small_model, tokenizer, tmp_path):
    other = save(cases.one(cases.LoReFT(rank=3)).bind(small_model, tokenizer), tmp_path / "other")
    shutil.copy(other / TENSORS, folder / TENSORS)
    with pytest.raises(ArtifactError, match="comes from another artifact"):
        load(folder, small_model, tokenizer)
    reseal(folder)
    with pytest.raises(ArtifactError, match="is not among those stored beside the graph"):
        load(folder, small_model, tokenizer)


def test_graph_and_tensors_that_disagree_are_refused(folder, small_model, tokenizer):
    text = (folder / GRAPH).read_text()
    (folder / GRAPH).write_text(text.replace("edit: edit\n", "edit: renamed\n"))
    reseal(folder)
    with pytest.raises(
        ArtifactError, match=r"graph and tensors do not belong together; missing.*renamed.*left over.*edit"
    ):
        load(folder, small_model, tokenizer)
    (folder / GRAPH).write_text(text.replace("rank: 2", "rank: 3"))
    reseal(folder)
    with pytest.raises(
        ArtifactError, match=r"has shape \(.*2.*\), and this LlamaForCausalLM needs \(.*3.*\)"
    ):
        load(folder, small_model, tokenizer)


def test_a_newer_layout_asks_for_a_newer_reftlab(folder):
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(
        ArtifactError, match="has artifact format 99, and this reftlab reads up to 1; upgrade reftlab"
    ):
        read_artifact(folder)


def test_a_newer_graph_asks_for_a_newer_reftlab(folder):
    (folder / GRAPH).write_text((folder / GRAPH).read_text().replace("format: 1", "format: 99"))
    reseal(folder)
    with pytest.raises(
        ArtifactError, match=r"graph\.yaml cannot be read: graph format 99.*needs a newer reftlab"
    ):
        read_artifact(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"format": true}',
        '{"format": "1"}',
        '{"format": 0}',
        "{}",
        "nonsense",
        "[" * 100_000,
        '{"format": 1, "base_model": 3}',
        '{"format": 1, "files": []}',
    ],
)
def test_facts_that_are_none_are_refused(text, folder):
    (folder / FACTS).write_text(text)
    with pytest.raises(ArtifactError, match=r"artifact.json"):
        read_artifact(folder)


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "[]", "a: [", "format: 1", "format: 1\nnodes: 3", "format: 1\nnodes: [3]", "format: true\nnodes: []",
        "format: 1\nnodes: [{edit: a}]", "format: 1\nnodes: [{edit: a, at: 3, intervention: {type: Zero}}]",
        "format: 1\nnodes: [{edit: a, at: 'x.output', intervention: {type: Zero, what: 2}}]",
        "format: 1\nnodes: [{edit: a, at: 'x.output', intervention: {type: LoReFT}}]",
        "format: 1\nnodes: [{edit: a, at: 'x.output', intervention: {type: Zero}, heads: zwei}]",
        "format: 1\nnodes: [{edit: a, at: 'x.output', intervention: {type: Zero}, features: {slice: [a, b, c]}}]",
        "format: 1\nnodes: [{read: 3}]", "format: 1\nnodes: [{source: [1]}]", "format: 1\nnodes: [{source: base}]",
        "format: 2020-99-99\nnodes: []", "[" * 5000, "\x00", "format: 1\nnodes: [{edit: {}, at: 'x.output'}]",
    ],
)  # fmt: skip
def test_graphs_that_are_none_are_refused(text, folder):
    (folder / GRAPH).write_text(text)
    reseal(folder)
    with pytest.raises(ArtifactError, match=r"graph\.yaml cannot be read"):
        read_artifact(folder)


def test_bytes_that_are_no_text_are_refused(folder):
    for name in (GRAPH, FACTS):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\xff\xfe\x00" + whole)
        if name == GRAPH:
            reseal(folder)
        with pytest.raises(ArtifactError, match=name):
            read_artifact(folder)


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{file}]]",
     "!!python/object/apply:os.system ['touch {file}']", "!!python/name:os.system ''"],
)  # fmt: skip
def test_loading_runs_no_code_from_yaml(tag, folder, tmp_path):
    (folder / GRAPH).write_text((folder / GRAPH).read_text() + "extra: " + tag.format(file=tmp_path / "ran"))
    reseal(folder)
    with pytest.raises(ArtifactError, match=r"cannot be read: this is not YAML.*python"):
        read_artifact(folder)
    assert not (tmp_path / "ran").exists()


def test_loading_runs_no_code_from_a_pickle(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for data in (pickle.dumps(Payload()), b""):
        (folder / TENSORS).write_bytes(data)
        with pytest.raises(ArtifactError, match="damaged or cut short"):
            read_artifact(folder)
    torch.save({"x": Payload()}, folder / TENSORS)
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        read_artifact(folder)
    assert not (tmp_path / "ran").exists()


def test_an_intervention_type_is_looked_up_and_never_imported(folder):
    (folder / GRAPH).write_text((folder / GRAPH).read_text().replace("type: Zero", "type: os.system"))
    reseal(folder)
    with pytest.raises(ArtifactError, match=r"intervention type 'os.system' is not known"):
        read_artifact(folder)
