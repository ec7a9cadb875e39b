"""A configuration is checked field by field before anything is loaded."""

import pytest
import torch

import reftlab as rl

from .training.conftest import PAIRS, make_graph, make_model, make_tokenizer

GRAPH = make_graph().to_dict()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "graph is missing"),
        ({"graph": GRAPH}, "data is missing"),
        ({"graph": GRAPH, "data": 3}, "data=3: expected a list"),
        ({"graph": GRAPH, "data": {"path": "x.json", "limt": 1}}, "Did you mean 'limit'"),
        ({"graph": GRAPH, "data": [], "dtype": "float31"}, "dtype='float31'"),
        ({"graph": GRAPH, "data": [], "trainin": {}}, "no field 'trainin'.*Did you mean 'training'"),
        ({"graph": "nowhere.yaml", "data": []}, "graph='nowhere.yaml' cannot be read"),
        ({"graph": {"format": 1, "nodes": [{"edit": "x"}]}, "data": []}, "graph"),
        ({"graph": GRAPH, "data": [], "seed": "seven"}, "seed='seven'"),
    ],
)
def test_a_field_that_is_missing_unknown_or_wrong_is_named(content, said):
    with pytest.raises(rl.ConfigError, match=said):
        rl.Experiment.from_dict(content)


def test_fine_tune_is_bind_and_train_with_the_same_seeds(model_folder, tmp_path):
    settings = {"epochs": 2, "learning_rate": 0.02, "batch_size": 5}
    experiment = rl.Experiment.from_dict(
        {
            "model": model_folder,
            "graph": GRAPH,
            "data": [list(pair) for pair in PAIRS],
            "evaluation": [list(pair) for pair in PAIRS[:2]],
            "training": settings,
            "seed": 5,
            "save": "artifact",
        },
        tmp_path,
    )
    reft, result = experiment.fine_tune(progress=False)
    model, tokenizer = rl.load_model(model_folder)
    torch.manual_seed(5)
    twin = make_graph().bind(model, tokenizer)
    rl.train(twin, PAIRS, evaluation=PAIRS[:2], seed=5, progress=False, **settings)
    for name, tensor in reft.interventions.state_dict().items():
        assert tensor.equal(twin.interventions.state_dict()[name])
    assert result.evaluation_loss == pytest.approx(rl.answer_loss(twin, PAIRS[:2]), abs=1e-6)
    evaluation = experiment.evaluate()
    assert evaluation.loss == pytest.approx(result.evaluation_loss, abs=1e-6)
    assert [outcome.answer for outcome in evaluation.outcomes] == [answer for _, answer in PAIRS[:2]]


def test_a_configuration_or_a_graph_that_says_a_thing_twice_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("data: []\nseed: 1\nseed: 2\n", encoding="utf-8")
    with pytest.raises(rl.ConfigError, match="the key 'seed' stands twice"):
        rl.Experiment.from_yaml(tmp_path / "c.yaml")
    twice = make_graph().to_yaml().replace("  positions: last", "  positions: first\n  positions: last")
    with pytest.raises(rl.GraphError, match="the key 'positions' stands twice"):
        rl.InterventionGraph.from_yaml(twice)


def test_an_unknown_training_argument_is_refused_before_training(model_folder):
    experiment = rl.Experiment.from_dict(
        {"model": model_folder, "graph": GRAPH, "data": [["who", "red"]], "training": {"epoch": 3}}
    )
    with pytest.raises(rl.DataError, match=r"no argument 'epoch'.*Did you mean 'epochs'"):
        experiment.fine_tune(progress=False)


def test_paths_count_from_the_configurations_folder(model_folder, tmp_path):
    (tmp_path / "graph.yaml").write_text(make_graph().to_yaml(), encoding="utf-8")
    (tmp_path / "pairs.csv").write_text('prompt,answer\nwho,"green\nblue"\n', encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        f"model: {model_folder}\ngraph: graph.yaml\ndata: pairs.csv\n", encoding="utf-8"
    )
    experiment = rl.Experiment.from_yaml(tmp_path / "c.yaml")
    assert experiment.graph == make_graph()
    assert experiment.examples() == [rl.Example("who", "green\nblue")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.txt", "", r"ends in \.json"),
        ("x.json", "{", "not well-formed json"),
        ("x.json", "{}", "must hold a list"),
        ("x.jsonl", '{"prompt": "a"}\nnope', "not well-formed jsonl"),
        ("x.json", '[{"promt": "a"}]', "no field 'prompt'; it has promt. Did you mean 'promt'"),
        ("x.yaml", "[", "not well-formed yaml"),
        ("x.json", "[]", "no examples"),
    ],
)
def test_a_file_of_examples_that_cannot_be_read_says_why(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(rl.DataError, match=said):
        rl.read_examples(tmp_path / name)


def test_all_kinds_of_files_give_the_same_examples(tmp_path):
    texts = {
        "a.json": '[{"q": "who", "a": "red"}, {"q": "what"}]',
        "a.jsonl": '{"q": "who", "a": "red"}\n\n{"q": "what"}\n',
        "a.yaml": "- {q: who, a: red}\n- {q: what}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = rl.read_examples(tmp_path / name, prompt="q", answer="a")
        assert read == [rl.Example("who", "red"), rl.Example("what")]
    assert rl.read_examples(tmp_path / "a.json", prompt="q", answer="a", limit=1) == read[:1]
    with pytest.raises(rl.DataError, match="cannot be read"):
        rl.read_examples(tmp_path / "nowhere.json")
