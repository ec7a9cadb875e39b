"""A configuration is checked field by field before anything is loaded."""

import datasets
import pandas as pd
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


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.txt", "", r"ends in \.json"),
        ("x.json", "{", "not well-formed json"),
        ("x.json", "{}", "must hold a list"),
        ("x.jsonl", '{"prompt": "a"}\nnope', "not well-formed jsonl"),
        ("x.jsonl", '{"prompt": "a"}\nnope', "line 2: Expecting value"),
        ("x.json", '[{"promt": "a"}]', "no column .* of a prompt .*'promt'; say which.*Did you mean 'promt'"),
        ("x.json", '[{"query": "a"}, {"answer": "b"}]', "example 1 has no 'query'; it has 'answer'"),
        ("x.json", '[{"prompt": "a", "answer": 4}]', "example 0: the column 'answer' holds 4, int"),
        (
            "x.json",
            '[{"question": "a", "query": "b"}]',
            "'question', 'query' all have a usual name of prompts",
        ),
        (
            "x.json",
            '[{"query": "a", "output": "b", "target": "c"}]',
            "'output', 'target' .* usual name of answers",
        ),
        ("x.csv", "prompt,answer\na", "line 2 has fewer fields than the header"),
        ("x.csv", "prompt,answer\na,b,c", "line 2 has more fields than the header"),
        ("x.parquet", "PAR", "not well-formed parquet"),
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


def test_parquet_a_dataset_a_frame_and_a_list_give_the_same_examples(tmp_path):
    rows = [{"question": "who", "answer": "red"}, {"question": "what", "answer": None}]
    expected = [rl.Example("who", "red"), rl.Example("what")]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "a.parquet", saved, tmp_path / "saved", str(tmp_path / "saved"), rows):
        assert rl.read_examples(source) == expected
    assert rl.read_examples(pd.DataFrame(rows[:1])) == expected[:1]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"question": "q", "answer": "a", "id": 7}, ("q", "a")),
        ({"instruction": "i", "input": "", "output": "o", "answer": "x"}, ("i", "o")),
        ({"instruction": "i", "input": "c", "output": "o"}, ("i\n\nc", "o")),
        ({"instruction": "i", "response": "r"}, ("i", "r")),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"prompt": "p", "answer": "a", "response": "r", "question": "q"}, ("p", "a")),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, ("u", "a")),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ("u", "a")),
        ({"messages": [{"role": "user", "content": "u"}]}, ("u", None)),
        (
            {
                "prompt": [{"role": "user", "content": "u"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            ("u", "a"),
        ),
        ({"text": "t", "query": "q"}, ("q", None)),
    ],
)
def test_columns_with_usual_names_are_found(row, example):
    assert rl.read_examples([row]) == [rl.Example(*example)]


def test_a_column_of_tasks_counts_in_our_own_layout_or_where_it_is_named():
    own = {"prompt": "p", "answer": "a", "task": "emoji"}
    assert rl.read_examples([own]) == [rl.Example("p", "a", "emoji")]
    foreign = {"question": "p", "answer": "a", "task": "trivia", "edit": "emoji"}
    assert rl.read_examples([foreign]) == [rl.Example("p", "a")]
    assert rl.read_examples([foreign], task="edit") == [rl.Example("p", "a", "emoji")]


def test_columns_that_are_named_win_over_usual_names():
    row = {"instruction": "i", "input": "c", "output": "o", "answer": "a"}
    assert rl.read_examples([row], answer="answer", prompt="instruction") == [rl.Example("i", "a")]
    assert rl.read_examples([row], prompt="output", answer="input") == [rl.Example("o", "c")]
    with pytest.raises(
        rl.DataError, match=r"answer='outptu': there is no such column; .*Did you mean 'output'"
    ):
        rl.read_examples([row], answer="outptu")
    with pytest.raises(rl.DataError, match="prompt='q' names a column, and the examples are no table"):
        rl.read_examples([("a", "b")], prompt="q")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["user", "assistant", "user", "assistant"], "turns user, assistant, user, assistant; expected one"),
        (["assistant"], "turns assistant"),
        (["system"], "expected one of the user"),
    ],
)
def test_a_conversation_of_another_form_is_refused_with_its_turns(roles, said):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(rl.DataError, match=f"example 0: .*{said}"):
        rl.read_examples([{"messages": messages}])


def test_json_lines_may_hold_separators_and_be_called_json(tmp_path):
    text = '{"prompt": "a\u2028b", "answer": "c\u0085d"}\n{"prompt": "e"}\n'
    expected = [rl.Example("a\u2028b", "c\u0085d"), rl.Example("e")]
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert rl.read_examples(tmp_path / name) == expected


def test_the_mark_that_spreadsheets_write_is_no_part_of_a_columns_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nwho,red\n", encoding="utf-8-sig")
    assert rl.read_examples(tmp_path / "a.csv") == [rl.Example("who", "red")]


def splits(**rows):
    tables = {
        name: datasets.Dataset.from_list([{"prompt": p, "answer": a} for p, a in pairs])
        for name, pairs in rows.items()
    }
    return datasets.DatasetDict(tables)


def test_of_several_splits_the_one_named_train_or_chosen_is_read(tmp_path):
    both = splits(train=PAIRS[:2], test=PAIRS[2:])
    both.save_to_disk(str(tmp_path / "both"))
    for source in (both, tmp_path / "both"):
        assert rl.read_examples(source) == [rl.Example(*pair) for pair in PAIRS[:2]]
        assert rl.read_examples(source, split="test", limit=1) == [rl.Example(*PAIRS[2])]
        with pytest.raises(rl.DataError, match=r"split='tset': .*there is train, test\. Did you mean 'test'"):
            rl.read_examples(source, split="tset")
    with pytest.raises(rl.DataError, match="the splits dev, test; say which one"):
        rl.read_examples(splits(dev=PAIRS, test=PAIRS))
    assert len(rl.read_examples(splits(dev=PAIRS))) == len(PAIRS)
    with pytest.raises(rl.DataError, match="this dataset is one split already"):
        rl.read_examples(both["train"], split="train")
    with pytest.raises(rl.DataError, match=r"split='train': only a Hugging Face dataset has one"):
        rl.read_examples(PAIRS, split="train")


def test_a_folder_of_files_is_a_dataset_with_splits_and_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "task").mkdir()
    for name, pairs in (("train", PAIRS[:3]), ("test", PAIRS[3:])):
        pd.DataFrame(pairs, columns=["question", "answer"]).to_json(
            tmp_path / "task" / f"{name}.jsonl", orient="records", lines=True
        )
    folder = str(tmp_path / "task")
    assert rl.read_examples(folder) == [rl.Example(*pair) for pair in PAIRS[:3]]
    assert rl.read_examples(folder, split="train[1:]") == [rl.Example(*pair) for pair in PAIRS[1:3]]


def test_a_dataset_that_is_nowhere_says_that_it_is_no_file_either(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        rl.DataError, match=r"'nobody/nothing' cannot be loaded: Couldn't reach.* no such file"
    ):
        rl.read_examples("nobody/nothing")


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


def test_sources_and_positions_of_rows_are_kept_from_every_kind_of_source(tmp_path):
    rows = [
        {"prompt": "who", "answer": "red", "sources": {"other": "what"}, "positions": {"swap": [0]}},
        {"prompt": "what", "answer": "blue", "sources": {"other": "who"}, "positions": {"swap": [0]}},
    ]
    wanted = [rl.Example(**row) for row in rows]
    for name, write in (
        ("rows.jsonl", lambda file: pd.DataFrame(rows).to_json(file, orient="records", lines=True)),
        ("rows.parquet", lambda file: pd.DataFrame(rows).to_parquet(file)),
    ):
        write(tmp_path / name)
        read = rl.read_examples(tmp_path / name)
        assert [example.sources for example in read] == [example.sources for example in wanted]
        assert [list(example.positions["swap"]) for example in read] == [[0], [0]]
    assert rl.read_examples(rows) == wanted
    assert rl.read_examples(datasets.Dataset.from_list(rows)) == wanted
    # In tables made elsewhere the words mean other things.
    cited = [{"prompt": "who", "answer": "red", "sources": "a book"}]
    assert rl.read_examples(cited) == [rl.Example("who", "red")]


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


def test_a_dataset_saved_as_one_split_has_no_other(tmp_path):
    datasets.Dataset.from_list([{"prompt": "who", "answer": "red"}] * 3).save_to_disk(str(tmp_path / "one"))
    assert len(rl.read_examples(tmp_path / "one")) == 3
    for split in ("nonsense", "train[:1]"):
        with pytest.raises(rl.DataError, match="one split already"):
            rl.read_examples(tmp_path / "one", split=split)
    with pytest.raises(rl.DataError, match=r"subset='nonsense'.*without subsets"):
        rl.read_examples(tmp_path / "one", subset="nonsense")


def test_prompts_may_be_messages_without_answers():
    [example] = rl.read_examples([{"prompt": [{"role": "user", "content": "who"}]}])
    assert example == rl.Example("who")


def test_a_stream_of_examples_prints_without_its_length(model_folder):
    rows = datasets.Dataset.from_list([{"prompt": "who", "answer": "red"}]).to_iterable_dataset()
    experiment = rl.Experiment(model_name=model_folder, dataset_name=rows, graph=make_graph())
    assert "a IterableDataset" in repr(experiment)
