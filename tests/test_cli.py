"""The command line does what the public functions do, and wrong use is one clear line and a non-zero exit."""

import json
import subprocess
import sys

import pytest

import reftlab as rl
from reftlab import cli

from .training.conftest import PAIRS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model, a configuration and examples."""
    folder = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"question": q, "reply": a}) for q, a in PAIRS), encoding="utf-8"
    )
    (folder / "config.yaml").write_text(
        f"""
model: {folder / "model"}
graph:
  format: 1
  nodes:
    - edit: colour
      at: blocks[*].output
      positions: last
      intervention: {{type: LoReFT, rank: 2}}
data: {{path: pairs.jsonl, prompt: question, answer: reply}}
training: {{epochs: 2, learning_rate: 0.01, batch_size: 5, folder: checkpoints}}
save: artifact
""",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, output and error output."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reftlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def artifact(home, run):
    if not (home / "artifact").exists():
        code, _, err = run("train", home / "config.yaml")
        assert code == 0, err
    return home / "artifact"


def test_train_reads_a_configuration_and_saves_what_the_same_call_in_python_makes(home, artifact, run):
    experiment = rl.Experiment.from_yaml(home / "config.yaml")
    model, tokenizer = rl.load_model(home / "model")
    loaded = rl.load(artifact, model, tokenizer)
    bound, _ = experiment.model_copy(update={"save": None}).fine_tune(progress=False, folder=None)
    for name, tensor in loaded.interventions.state_dict().items():
        assert tensor.equal(bound.interventions.state_dict()[name])
    code, out, _ = run("train", home / "config.yaml", "--resume")
    assert code == 0
    assert "resumed at step 2" in out
    assert f"saved to {artifact}" in out


def test_chat_answers_as_reply_does(home, artifact, run):
    prompts = [PAIRS[0][0], PAIRS[3][0]]
    model, tokenizer = rl.load_model(home / "model")
    reft = rl.load(artifact, model, tokenizer)
    with reft.disabled():
        bare = rl.reply(reft, prompts, max_new_tokens=5)
    wanted = rl.reply(reft, prompts, max_new_tokens=5)
    said = [part for prompt in prompts for part in ("--say", prompt)]
    code, out, _ = run("chat", artifact, *said, "--max-new-tokens", 5, "--json", "--bare")
    assert code == 0
    rows = json.loads(out)
    assert [row["reply"] for row in rows] == wanted
    assert [row["bare"] for row in rows] == bare


def test_chat_reads_questions_until_an_empty_line(home, artifact, run, monkeypatch):
    typed = iter(["who", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    code, out, _ = run("chat", artifact)
    assert code == 0
    assert out.count("model") == 1


def test_explain_writes_a_report_from_the_examples_of_the_training(home, artifact, run, tmp_path):
    code, out, err = run("explain", artifact, "--out", tmp_path / "r.html")
    assert code == 0, err
    assert PAIRS[0][0] in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert str(tmp_path / "r.html") in out


def test_inspect_lists_paths_that_resolve_and_the_aliases(home, run):
    code, out, err = run("inspect", home / "model")
    assert code == 0, err
    assert "model.layers[*].self_attn.q_proj" in out
    assert "blocks[*].attn.heads" in out
    model, _ = rl.load_model(home / "model")
    for line in rl.inspect(model).lines:
        if line.output_width:
            edit = rl.Edit("x", at=f"{line.path}.output", intervention=rl.Scale(1.0))
            assert len(rl.InterventionGraph(edit).bind(model).edits) == line.modules


@pytest.mark.parametrize(
    ("arguments", "said", "exit_code"),
    [
        ([], "Missing command", 2),
        (["chta"], "Did you mean", 2),
        (["train"], "CONFIG.yaml", 2),
        (["demo", "--rank", "0"], "--rank", 2),
        (["train", "nowhere.yaml"], "nowhere.yaml cannot be read", 1),
        (["chat", "nowhere"], "no artifact at", 1),
        (["chat", "nowhere", "--json"], "--say", 1),
        (["explain", "nowhere"], "no artifact at", 1),
        (["inspect", "./nowhere"], "cannot load the model './nowhere'", 1),
    ],
)
def test_wrong_use_is_one_line_on_the_error_stream(run, arguments, said, exit_code):
    code, out, err = run(*arguments)
    assert code == exit_code
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_mistake_in_the_configuration_is_named(home, run):
    for wrong, said in [
        ("modl: x", "no field 'modl'"),
        ("graph: 3\ndata: []", "graph=3"),
        ("- 1", "must hold fields"),
        ("a: [", "not well-formed YAML"),
    ]:
        (home / "wrong.yaml").write_text(wrong, encoding="utf-8")
        code, _, err = run("train", home / "wrong.yaml")
        assert code == 1
        assert said in err
        assert err.count("\n") == 1


def test_an_unforeseen_error_is_one_line_too(run, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("reftlab.models.load_model", broken)
    code, _, err = run("inspect", "anything")
    assert code == 1
    assert "OSError: disk full" in err
    assert err.count("\n") == 1


def test_the_installed_command_runs_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "reftlab.cli", "chat", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error there is no artifact at")
