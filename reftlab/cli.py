"""The command line: a thin skin over the public functions."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from reftlab.errors import DataError, ReftlabError

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["app", "main"]

app = typer.Typer(
    name="reftlab",
    help="Interventions on any PyTorch model: trained, composed, and explained.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out, _err = Console(), Console(stderr=True)

Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved artifact.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Base model, if it is not where it was when the artifact was made."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for artifact and report.")] = Path("out/demo"),
    at: Annotated[str, typer.Option(help="Site of the edit.")] = "blocks[*].output",
    rank: Annotated[int, typer.Option(min=1, help="Rank of each LoReFT.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the ten pairs.")] = 60,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Seed of the first values and of the training.")] = 0,
) -> None:
    """Teach the embedded chat model to answer in emojis, and explain how its edits do it."""
    from reftlab.demo import run

    run(out, at=at, rank=rank, epochs=epochs, learning_rate=learning_rate, seed=seed, console=_out)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="An experiment, written down.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train a graph of interventions as a configuration file says."""
    from reftlab.experiment import Experiment

    experiment = Experiment.from_yaml(config)
    overrides: dict[str, Any] = {"resume": True} if resume else {}
    reft, result = experiment.fine_tune(**overrides)
    _out.print(str(result), highlight=False)
    _out.print(str(experiment.evaluate(reft)), highlight=False)
    if experiment.save is not None:
        _out.print(f"saved to {experiment.folder / experiment.save}", highlight=False, soft_wrap=True)


@app.command()
def chat(
    folder: Artifact,
    say: Annotated[
        list[str] | None, typer.Option("--say", help="Ask this and leave; may be repeated.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Show the bare model's replies as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the replies to --say as JSON.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 64,
    model: Model = None,
) -> None:
    """Talk to a model with a saved artifact's edits; each question stands alone."""
    from reftlab.training import reply

    if as_json and not say:
        raise DataError("--json prints the replies to --say, and there is none")
    reft = _load(folder, model)

    def answers(prompts: list[str]) -> list[dict[str, str]]:
        rows = [{"prompt": prompt} for prompt in prompts]
        for row, text in zip(rows, reply(reft, prompts, max_new_tokens=max_new_tokens), strict=True):
            row["reply"] = text
        if bare:
            with reft.disabled():
                texts = reply(reft, prompts, max_new_tokens=max_new_tokens)
            for row, text in zip(rows, texts, strict=True):
                row["bare"] = text
        return rows

    if as_json:
        print(json.dumps(answers(say or []), ensure_ascii=False))
        return
    asked = iter(say) if say else _typed()
    for prompt in asked:
        (row,) = answers([prompt])
        if say:
            _out.print(f"[bold]you[/bold]   {escape(prompt)}", highlight=False)
        _out.print(f"[bold]model[/bold] {escape(row['reply'])}", highlight=False)
        if bare:
            _out.print(f"[bold]bare[/bold]  [dim]{escape(row['bare'])}[/dim]", highlight=False)


@app.command()
def explain(
    folder: Artifact,
    examples: Annotated[
        Path | None,
        typer.Option(help="Examples to explain on (.json, .jsonl, .csv, .yaml); those of the training."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The report; report.html beside the artifact.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use so many examples at most.")] = 32,
    model: Model = None,
) -> None:
    """Write a report that says what each edit of an artifact reads, writes and causes."""
    from reftlab.experiment import DataSource
    from reftlab.explaining import explain as explained
    from reftlab.training import as_examples, read_examples

    reft = _load(folder, model)
    noted = reft.facts.get("examples")
    if examples is not None:
        data = read_examples(examples, limit=limit)
    elif isinstance(noted, dict):
        most = min(limit, noted.get("limit") or limit)
        data = DataSource(**{**noted, "limit": most}).rows(folder).examples
    elif noted:
        data = as_examples(noted[:limit])
    else:
        raise DataError(f"{folder} notes no examples; give some, --examples FILE")
    report = explained(reft, data).save(out if out is not None else folder.parent / "report.html")
    _out.print(f"report {report}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The embedded model's name, a Hugging Face id, or a folder."),
    ],
    every: Annotated[bool, typer.Option("--all", help="List equal blocks one by one.")] = False,
) -> None:
    """Show a model's modules with the paths that one can type, their widths and aliases."""
    from reftlab.models import load_model
    from reftlab.runtime import inspect as inspected

    print(inspected(load_model(model)[0], every=every))


@app.callback()
def _version() -> None:
    """Interventions on any PyTorch model: trained, composed, and explained."""


def main() -> None:
    """Run the command line; an error is one line and a non-zero exit, unless REFTLAB_DEBUG is set."""
    # Where bitsandbytes is installed it tells of a kernel that it could not fetch when it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = app(prog_name="reftlab", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", 130)
    except ReftlabError as error:
        code = _fail(str(error))
    except Exception as error:
        # Wrong use; the class that typer raises for it has moved between its versions.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "reftlab"
            code = _fail(f"{error.format_message()} See: {command} --help", 2)
        elif os.environ.get("REFTLAB_DEBUG"):
            raise
        else:
            code = _fail(f"{type(error).__name__}: {error} (REFTLAB_DEBUG=1 shows where)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 1) -> int:
    _err.print(f"[red]error[/red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    return code


def _load(folder: Path, name: str | None) -> BoundModel:
    from reftlab.models import load_model
    from reftlab.runtime import load
    from reftlab.store import read_artifact

    base = read_artifact(folder).facts.get("base_model", {})
    made_for = base.get("name")
    if name is None and not isinstance(made_for, str):
        raise DataError(f"{folder} does not say which model it was made for; give it, --model NAME")
    model, tokenizer = load_model(name or made_for, dtype=base.get("dtype", "float32"))
    return load(folder, model, tokenizer)


def _typed() -> Any:
    """Questions typed by the user, until an empty line or the end of input."""
    prompt = "you   " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if not text:
            return
        yield text


if __name__ == "__main__":
    main()
