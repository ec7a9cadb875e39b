"""The notebooks run from the first cell to the last, and what they tell is true."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
QUICKSTART = NOTEBOOKS[0]
CLAIM = """
import json
from reftlab.demo import only_emojis
print(json.dumps({"exact": evaluation.exact, "emojis": sum(map(only_emojis, after)), "same": same}))
"""


def outputs(notebook, kind):
    return [
        output.data[kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def test_the_quickstart_trains_answers_and_shows_what_it_says(tmp_path):
    notebook = nbformat.read(QUICKSTART, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIM))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = json.loads(notebook.cells[-1].outputs[0].text)
    assert told["exact"] >= 9
    assert told["emojis"] >= 1
    assert told["same"]
    assert len(outputs(notebook, "image/png")) >= 3
    assert len(outputs(notebook, "text/html")) >= 4
    errors = [
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr" and "training:" not in output.text
    ]
    assert errors == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_in_the_repository_holds_its_results(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(outputs(notebook, "image/png")) >= 3
    assert path.stat().st_size < 2_000_000
