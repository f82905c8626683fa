"""The `expert` command. Every command is thin: it calls the API that a program would call.

Exit codes: 0 when it worked, 1 when it did not, 2 when it was called wrongly, 130 when it was interrupted (Ctrl-C or
SIGTERM).
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.cli_ask import add_ask_commands
from pipeline.cli_common import (
    EXIT_FAILED,
    USAGE_OF_GRAMMARS,
    BaseModelOption,
    RollbackOption,
    StorageOption,
    Trust,
    TrustOption,
    errors_on_exit,
    storage_options,
)
from pipeline.cli_packages import add_package_commands
from pipeline.tracing import export_spans

MOST_PINNED = 16  # so many experts `expert serve` loads at the start

EPILOG = """\
[bold]To begin:[/bold] `expert demo` needs no package of yours; the packages it uses are in pipeline/demo/artifacts.

[bold]Exit codes:[/bold] 0 it worked; 1 it did not; 2 it was called wrongly; 130 it was interrupted (Ctrl-C, SIGTERM).

[bold]Completion:[/bold] `expert --install-completion` teaches your shell the commands and options.

[bold]Log:[/bold] `EXPERT_LOG=debug expert ...` tells what is done. docs/errors.md explains every error.
"""

app = typer.Typer(
    help="Answer datasets and prompts with expert packages.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
add_ask_commands(app)
add_package_commands(app)


class FileFormat(StrEnum):
    """Formats of a demo dataset."""

    parquet = "parquet"
    jsonl = "jsonl"
    openai = "openai"


class DemoTask(StrEnum):
    """The demo's tasks."""

    sql = "sql"
    cypher = "cypher"
    json = "json"


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/batch.yaml shows every key.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that belongs to another job.")
    ] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer again the rows of the output that have an error.")
    ] = False,
) -> None:
    """Run a batch job, or continue it.

    Example: expert run configs/demo.yaml num_workers=2 sampling.max_tokens=64
    """
    flags = {"overwrite": overwrite, "retry_errors": retry_errors}
    run_job(config, [*(overrides or []), *(f"{name}=true" for name, given in flags.items() if given)])


def run_job(config: Path, overrides: list[str]) -> None:
    """Run the batch job of a configuration file and print its report; the process ends with an exit code on errors."""
    with errors_on_exit(usage=USAGE_OF_GRAMMARS):
        from pipeline.batch import run_config
        from pipeline.batch.config_file import load_config

        result = run_config(load_config(config, overrides))
        typer.echo(str(result.report))


@app.command("demo-data")
def demo_data(
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    rows: Annotated[int, typer.Option(help="How many questions.", min=1)] = 2000,
    file_format: Annotated[
        FileFormat | None, typer.Option("--format", help="How to write them; as the file's name ends if not given.")
    ] = None,
    task: Annotated[DemoTask, typer.Option(help="Which expert they are for.")] = DemoTask.sql,
    seed: Annotated[int, typer.Option(help="The same seed gives the same questions.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that holds something else.")] = False,
) -> None:
    """Make a dataset of questions with their right answers.

    Example: expert demo-data questions.parquet --rows 10000
    """
    with errors_on_exit():
        from pipeline.demo.questions import QuestionFormat, write_questions

        form: QuestionFormat | None = None if file_format is None else file_format.value
        write_questions(path, rows, task=task.value, seed=seed, file_format=form, overwrite=overwrite)
        typer.echo(f"{rows:,} questions in {path}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the questions and answers go.")] = Path("demo-output"),
    rows: Annotated[int, typer.Option(help="How many questions.", min=1)] = 2000,
) -> None:
    """Answer generated questions with the demo's SQL expert on a local Ray, and check the answers.

    Example: expert demo --rows 500
    """
    with errors_on_exit():
        from pipeline.demo.show import run_demo

        run_demo(folder, rows, Console())


@app.command("serve")
def serve_packages(
    packages: Annotated[list[str], typer.Argument(help="Expert packages: files, unpacked directories or URLs.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine only with API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 8000,
    base_model: BaseModelOption = None,
    trust: TrustOption = Trust.any,
    allow_rollback: RollbackOption = False,
    storage_option: StorageOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is if not given.")] = None,
    replicas: Annotated[int, typer.Option(help="Processes that answer, for each base model.", min=1)] = 1,
) -> None:
    """Answer over HTTP, as OpenAI's API does, until Ctrl-C.

    API keys come from EXPERT_API_KEYS (name=sha256, by commas). configs/serve.yaml, with `serve run`, says more.

    Example: expert serve expert-sql.expert expert-cypher.expert --port 8000
    """
    with errors_on_exit("interrupted"):
        from pipeline.serve.config import ServeConfig
        from pipeline.serve.run import StartPhases, run_service

        phases = StartPhases()
        options: dict[str, Any] = {
            "experts": [{"package": package, "pin": len(packages) <= MOST_PINNED} for package in packages],
            "host": host,
            "port": port,
            "base_model": base_model,
            "trust": trust.value,
            "allow_rollback": allow_rollback,
            "storage_options": storage_options(storage_option),
            "device": device,
            "replicas": {"min": replicas, "max": replicas},
        }
        run_service(ServeConfig.from_options(options), typer.echo, phases)


@app.command("status")
def show_status(
    output: Annotated[str, typer.Argument(help="The folder or URL that a job writes to.")],
    storage_option: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show how far a batch job is, while it runs or after it died.

    Example: expert status demo-output/answers-2000
    """
    with errors_on_exit("interrupted"):
        from pipeline.batch.status import output_status
        from pipeline.storage import open_storage

        status = output_status(open_storage(output, storage_options(storage_option)))
        typer.echo(json.dumps(status.to_dict(), ensure_ascii=False, indent=2) if as_json else str(status))


@app.command("verify-output")
def verify_output(
    output: Annotated[str, typer.Argument(help="The folder or URL that a job wrote to.")],
    storage_option: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Recount a finished output: every part, receipt and total; the exit code is 1 when anything is wrong.

    Example: expert verify-output demo-output/answers-2000
    """
    with errors_on_exit("interrupted"):
        from pipeline.batch.verify import verify
        from pipeline.storage import open_storage

        found = verify(open_storage(output, storage_options(storage_option)))
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2) if as_json else str(found))
        if not found.ok:
            raise typer.Exit(EXIT_FAILED)


@app.command("eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="A YAML file; columns.expected names the right answers.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override.")] = None,
    samples: Annotated[int, typer.Option(help="Show so many wrong answers of each expert.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Run a batch job, or continue it, and print how many answers are right, by expert.

    Example: expert eval configs/demo.yaml --samples 3
    """
    evaluate_job(config, overrides or [], samples=samples, as_json=as_json)


def evaluate_job(config: Path, overrides: list[str], *, samples: int, as_json: bool) -> None:
    """Run and judge the batch job of a configuration file; the process ends with an exit code on errors."""
    with errors_on_exit(usage=USAGE_OF_GRAMMARS):
        from pipeline.batch.config_file import load_config
        from pipeline.batch.evaluate import evaluate_job as judge
        from pipeline.cli_tables import print_scores

        _, scores = judge(load_config(config, overrides))
        if as_json:
            typer.echo(json.dumps([score.to_dict() for score in scores], ensure_ascii=False, indent=2))
        else:
            print_scores(scores, samples, Console())


@app.command("diff")
def diff_outputs(
    first: Annotated[str, typer.Argument(help="The output folder or URL of a finished job.")],
    second: Annotated[str, typer.Argument(help="That of another job over the same dataset.")],
    samples: Annotated[int, typer.Option(help="Show so many rows that differ.", min=0)] = 5,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with 1 when any row differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two outputs row by row.

    Example: expert diff answers/ answers-int8/ --samples 10
    """
    with errors_on_exit():
        from pipeline.batch.diff import diff_outputs as compare
        from pipeline.cli_tables import print_diff

        found = compare(first, second, max_samples=samples)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
        else:
            print_diff(found, Console())
    if exit_code and found.same != found.rows:
        raise typer.Exit(EXIT_FAILED)


def main() -> None:
    """The console script."""
    export_spans(os.environ)
    app()


if __name__ == "__main__":
    main()
