"""A configuration is checked field by field before anything is loaded."""

import datasets
import pytest
import torch

import reftlab as rl

from .training.conftest import PAIRS, make_graph, make_model, make_tokenizer, splits

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
        ({}, "data is missing"),
        ({"graph": GRAPH, "data": 3}, "data=3: expected a list"),
        ({"graph": GRAPH, "data": {"split": "train"}}, "either a path.* or a dataset"),
        ({"graph": GRAPH, "data": {"path": "x.json", "dataset": "y"}}, "either a path.* or a dataset"),
        ({"graph": GRAPH, "data": [], "limit": 0}, "data.limit=0: .*greater than or equal to 1"),
        ({"graph": GRAPH, "prompt_column": "q"}, "prompt_column='q' says something of the data, and data is"),
        ({"graph": GRAPH, "data": [], "training": 3}, "training=3"),
        ({"graph": GRAPH, "data": [], "folder": "x"}, "folder='x' is no field"),
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


def test_the_short_form_stands_for_the_full_one(model_folder, tmp_path):
    short = rl.Experiment(
        model_name=model_folder, dataset_name="pairs.csv", dataset_split=None, prompt_column="q",
        answer_column="a", limit=5, learning_rate=3e-5, epochs=3, batch_size=16, folder=tmp_path,
    )  # fmt: skip
    full = {
        "model": model_folder,
        "data": {"path": "pairs.csv", "prompt": "q", "answer": "a", "limit": 5},
        "training": {"learning_rate": 3e-5, "epochs": 3, "batch_size": 16},
    }
    assert short == rl.Experiment.from_dict(full, tmp_path)
    text = (
        f"model_name: {model_folder}\ndataset_name: pairs.csv\nprompt_column: q\nanswer_column: a\nlimit: 5\n"
        "learning_rate: 3e-5\nepochs: 3\nbatch_size: 16\n"
    )
    (tmp_path / "short.yaml").write_text(text, encoding="utf-8")
    assert rl.Experiment.from_yaml(tmp_path / "short.yaml") == short
    (edit,) = short.graph.edits
    assert (str(edit.at), str(edit.positions)) == ("blocks[*].output", "last")
    assert isinstance(edit.intervention, rl.LoReFT)
    assert edit.intervention.rank == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": "a", "model_name": "a", "data": []}, "model_name='a' and model='a' say the same"),
        ({"data": [], "dataset_name": "x"}, "dataset_name='x' and data="),
        ({"data": [], "epochs": 2, "training": {"epochs": 3}}, "epochs=2 and training.epochs=3"),
        (
            {"data": {"path": "x.csv", "prompt": "q"}, "prompt_column": "r"},
            "prompt_column='r' and data.prompt='q'",
        ),
    ],
)
def test_saying_a_thing_twice_is_an_error(content, said):
    with pytest.raises(rl.ConfigError, match=said):
        rl.Experiment(**content)


def test_fine_tune_then_evaluate_from_a_dataset_uses_its_held_out_split(model_folder):
    experiment = rl.Experiment(
        model_name=model_folder, dataset_name=splits(train=PAIRS[:3], validation=PAIRS[3:], test=PAIRS[:1]),
        learning_rate=0.02, epochs=2, batch_size=2,
    )  # fmt: skip
    with pytest.raises(rl.ConfigError, match="nothing to evaluate: call fine_tune"):
        experiment.evaluate()
    reft, result = experiment.fine_tune(progress=False)
    assert result.steps == 4
    assert sorted(reft.interventions) == [f"loreft[{block}]" for block in range(3)]
    before = rl.load_model(model_folder)
    torch.manual_seed(0)
    twin = experiment.graph.bind(*before)
    rl.train(twin, PAIRS[:3], learning_rate=0.02, epochs=2, batch_size=2, progress=False)
    evaluation = experiment.evaluate(max_new_tokens=4)
    assert [outcome.prompt for outcome in evaluation.outcomes] == [prompt for prompt, _ in PAIRS[3:]]
    assert evaluation.loss == pytest.approx(rl.answer_loss(twin, PAIRS[3:]), abs=1e-6)
    assert reft.facts["examples"] == [list(pair) for pair in PAIRS[:3]]


def test_the_data_must_have_answers_and_the_error_names_its_columns(model_folder):
    experiment = rl.Experiment(model_name=model_folder, dataset_name=[{"question": "who", "solution": "red"}])
    with pytest.raises(rl.DataError, match=r"no column .* of an answer .*'question', 'solution'; say which"):
        experiment.fine_tune(progress=False)
    named = rl.Experiment(
        model_name=model_folder, answer_column="solution", epochs=1,
        dataset_name=[{"question": "who", "solution": "red"}],
    )  # fmt: skip
    assert named.fine_tune(progress=False)[1].steps == 1


def test_the_system_message_of_conversations_is_that_of_the_training(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(template=True).save_pretrained(tmp_path / "model")

    def rows(system):
        return [
            {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ]
            }
            for prompt, answer in PAIRS
        ]

    settings = {"model_name": str(tmp_path / "model"), "epochs": 1, "graph": GRAPH}
    reft, _ = rl.Experiment(dataset_name=rows("cat"), **settings).fine_tune(progress=False)
    assert reft.facts["training"]["system"] == "cat"
    twin = rl.Experiment(data=PAIRS, system="cat", **settings).fine_tune(progress=False)[0]
    for name, tensor in reft.interventions.state_dict().items():
        assert tensor.equal(twin.interventions.state_dict()[name])
    with pytest.raises(rl.ConfigError, match=r"system='sea', and the data's conversations have .*'cat'"):
        rl.Experiment(dataset_name=rows("cat"), system="sea", **settings).fine_tune(progress=False)
    with pytest.raises(rl.DataError, match="evaluation: its conversations have the system message 'sea'"):
        rl.Experiment(dataset_name=rows("cat"), evaluation=rows("sea"), **settings).fine_tune(progress=False)
    trained = rl.Experiment(dataset_name=datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows("cat")), test=datasets.Dataset.from_list(rows("sea"))
    ), **settings)  # fmt: skip
    trained.fine_tune(progress=False)
    with pytest.raises(rl.DataError, match="system message 'sea', and the training had 'cat'"):
        trained.evaluate(max_new_tokens=1)
    with pytest.raises(rl.DataError, match="different system messages, such as 'cat' and 'sea'"):
        rl.read_examples([*rows("cat"), *rows("sea")])


def test_an_artifact_notes_where_its_examples_came_from(model_folder, tmp_path):
    datasets.Dataset.from_list([{"question": "who", "answer": "red"}]).save_to_disk(str(tmp_path / "task"))
    experiment = rl.Experiment.from_dict(
        {"model": model_folder, "data": "task", "save": "out/artifact", "epochs": 1}, tmp_path
    )
    experiment.fine_tune(progress=False)
    again = rl.Experiment.from_dict({"model": model_folder, "data": "task", "save": "out/artifact"}, tmp_path)
    evaluation = again.evaluate(max_new_tokens=2)
    assert evaluation.loss == pytest.approx(experiment.evaluate(max_new_tokens=2).loss, abs=1e-6)
    noted = rl.load(tmp_path / "out" / "artifact", *rl.load_model(model_folder)).facts["examples"]
    assert noted["path"] == "../../task"
    assert rl.read_examples(tmp_path / "out" / "artifact" / noted["path"]) == experiment.examples()


def test_an_experiment_prints_itself_in_one_line(model_folder):
    experiment = rl.Experiment(model_name="tiny", dataset_name=splits(train=PAIRS), epochs=3, graph=GRAPH)
    assert str(experiment) == (
        "Experiment('tiny', edits colour, DataSource(dataset='a DatasetDict of 1'), epochs=3)"
    )
    assert "Experiment(&#x27;tiny&#x27;" in experiment._repr_html_()


def test_an_artifact_notes_the_sources_of_its_examples(model_folder):
    swap = rl.Edit(
        "swap", at="blocks[0].output", positions="last", intervention=rl.RotatedSwap(rank=2),
        source=rl.Read(run="other"),
    )  # fmt: skip
    rows = [{"prompt": "who", "answer": "red", "sources": {"other": "what"}}]
    graph = rl.InterventionGraph(rl.Source("other"), swap)
    experiment = rl.Experiment(model_name=model_folder, epochs=1, data=rows, graph=graph)
    reft, _ = experiment.fine_tune(progress=False)
    assert reft.facts["examples"] == rows


def test_a_stream_of_examples_prints_without_its_length(model_folder):
    rows = datasets.Dataset.from_list([{"prompt": "who", "answer": "red"}]).to_iterable_dataset()
    experiment = rl.Experiment(model_name=model_folder, dataset_name=rows, graph=make_graph())
    assert "a IterableDataset" in repr(experiment)
