"""The commands about packages: inspect, verify, pack, sign, keys, staging, the cache. Thin, like all commands."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli_common import (
    EXIT_FAILED,
    PackageArgument,
    RollbackOption,
    StorageOption,
    Trust,
    TrustOption,
    errors_on_exit,
    storage_options,
)
from pipeline.cli_tables import print_table, table_console
from pipeline.errors import ConfigError

JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
KeyOption = Annotated[Path | None, typer.Option(help="A private key to sign with (expert keygen).")]
CacheDirOption = Annotated[
    Path | None, typer.Option(help="The cache; $EXPERT_CACHE_DIR or ~/.cache/expert if not given.")
]
StoreOption = Annotated[
    str,
    typer.Option("--to", envvar="EXPERT_STORE", metavar="STORE", help="The store: a folder or URL all machines see."),
]


cache_app = typer.Typer(
    help="What is in the cache of this machine: unpacked packages and base models.", no_args_is_help=True
)


def add_package_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the program."""
    for command in (inspect, verify, pack, sign, keygen, trust, stage, schema):
        app.command()(command)
    app.add_typer(cache_app, name="cache")


def inspect(package: PackageArgument, storage_option: StorageOption = None, as_json: JsonOption = False) -> None:
    """Verify a package and show what is in it.

    Example: expert inspect expert-sql.expert
    """
    with errors_on_exit():
        from pipeline.package import open_package
        from pipeline.package.card import package_card

        card = package_card(open_package(package, storage_options=storage_options(storage_option)))
        if as_json:
            typer.echo(json.dumps(card, ensure_ascii=False, indent=2))
            return
        _print_rows([(name, value) for name, value in card.items()])


def verify(
    package: PackageArgument,
    trust: TrustOption = Trust.any,
    allow_rollback: RollbackOption = False,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check everything that can be checked of a package, and say what was and what was not.

    Example: expert verify expert-sql.expert --trust trusted
    """
    with errors_on_exit():
        from pipeline.package import open_package
        from pipeline.package.card import verification

        options = storage_options(storage_option)
        opened = open_package(package, trust=trust.value, allow_rollback=allow_rollback, storage_options=options)
        found = verification(opened)
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
            return
        _print_rows([*found["checked"].items(), ("not covered", found["not_covered"]), ("warnings", found["warnings"])])


def pack(
    directory: Annotated[Path, typer.Argument(help="PEFT's output, or a trainer's checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .expert file, or a folder for its standard name.")],
    manifest: Annotated[
        Path | None, typer.Option(help="The manifest; manifest.json of the directory if not given.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Make a manifest: the expert's name, expert-...")] = None,
    version: Annotated[str, typer.Option(help="Of a manifest that is made.")] = "0.1.0",
    base_model: Annotated[
        str | None, typer.Option(help="Of a manifest that is made; what adapter_config.json says if not given.")
    ] = None,
    description: Annotated[str, typer.Option(help="Of a manifest that is made.")] = "",
    licence: Annotated[str, typer.Option("--license", help="Of a manifest that is made.")] = "",
    key: KeyOption = None,
) -> None:
    """Make a .expert archive of a directory; the same content gives the same bytes.

    Example: expert pack checkpoint-1000 -o expert-sql.expert --name expert-sql --version 0.3.0
    """
    with errors_on_exit():
        from pipeline.package.builder import pack_files
        from pipeline.package.drafts import draft_manifest, read_manifest_file

        if manifest is not None and name is not None:
            raise ConfigError("--manifest and --name are given", hint="Give one of them.")
        given: dict[str, Any] | None = None if manifest is None else read_manifest_file(manifest)
        if name is not None:
            given = draft_manifest(
                directory, name=name, version=version, base_model=base_model, description=description, licence=licence
            )
        packed = pack_files(directory, output, manifest=given, key=key)
        for path in packed.left_out:
            typer.echo(f"left out: {path}", err=True)
        typer.echo(str(packed.path))


def sign(
    package: Annotated[Path, typer.Argument(help="A .expert file, or an unpacked directory.")],
    key: Annotated[Path, typer.Option(help="The private key (expert keygen).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The signed archive; the same file if not given.")
    ] = None,
) -> None:
    """Sign a package: its list of files, and the signature over it, become a part of it.

    Example: expert sign expert-sql.expert --key me.key
    """
    with errors_on_exit():
        from pipeline.package.builder import sign as sign_package

        typer.echo(str(sign_package(package, key, output)))


def keygen(
    name: Annotated[str, typer.Argument(help="Whose key it is: the files become NAME.key and NAME.pub.")],
    folder: Annotated[Path, typer.Option(help="Where they go.")] = Path(),
) -> None:
    """Make a pair of keys for signing: keep NAME.key secret, and give NAME.pub away.

    Example: expert keygen alice
    """
    with errors_on_exit():
        from pipeline.package.keys import generate_key

        private, public = generate_key(name, folder)
        typer.echo(f"{private}  to sign with; keep it secret")
        typer.echo(f"{public}  for others: expert trust {public.name}")


def trust(
    key: Annotated[Path, typer.Argument(help="A public key: NAME.pub.")],
    name: Annotated[str | None, typer.Option(help="Whose it is; the file's name if not given.")] = None,
) -> None:
    """Trust packages that are signed with a key.

    Example: expert trust alice.pub
    """
    with errors_on_exit():
        from pipeline.package.keys import add_trusted_key

        typer.echo(f"trusted from now on: {add_trusted_key(key, name)}")


def stage(
    store: StoreOption,
    packages: Annotated[list[str] | None, typer.Argument(help="Packages, as for expert inspect.")] = None,
    base_model: Annotated[
        list[Path] | None, typer.Option("--base-model", help="The directory of a base model; may be repeated.")
    ] = None,
    trust: TrustOption = Trust.any,
    allow_rollback: RollbackOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Put packages and base models where every machine of a cluster finds them; prints what to write in a config.

    Example: expert stage expert-sql.expert --base-model Qwen3-0.6B --to s3://bucket/experts
    """
    stage_all(store, packages or [], base_model or [], trust, allow_rollback, storage_option)


def stage_all(
    store: str,
    packages: list[str],
    base_models: list[Path],
    trust: Trust,
    allow_rollback: bool,
    storage_option: list[str] | None,
) -> None:
    """Stage packages and base models, and print their references; the process ends with an exit code on errors."""
    with errors_on_exit("interrupted; the same command continues"):
        from pipeline.package import PackageStore

        if not packages and not base_models:
            raise ConfigError("nothing is named to stage", hint="Name packages, or --base-model DIR.")
        place = PackageStore(store, storage_options(storage_option))
        done = [place.stage(package, trust=trust.value, allow_rollback=allow_rollback) for package in packages]
        done += [place.stage_base_model(folder) for folder in base_models]
        for staged in done:
            state = "staged" if staged.is_new else "was there"
            typer.echo(f"{staged.label}: {state}, {staged.size:,} bytes", err=True)
            typer.echo(staged.url)


def schema() -> None:
    """Print a JSON schema of the manifests that are accepted.

    Example: expert schema > manifest.schema.json
    """
    from pipeline.package.schema import manifest_schema

    typer.echo(json.dumps(manifest_schema(), indent=2))


@cache_app.command("ls")
def cache_ls(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """List the cache, what was used last first.

    Example: expert cache ls
    """
    with errors_on_exit():
        from pipeline.package.cache import default_cache_dir
        from pipeline.package.cache_admin import list_cache

        items = list_cache(cache_dir or default_cache_dir())
        if as_json:
            typer.echo(json.dumps([_item(item) for item in items], indent=2))
            return
        _print_items(items)
        typer.echo(f"{sum(item.size for item in items):,} bytes in {len(items)} entries")


@cache_app.command("verify")
def cache_verify(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """Read everything in the cache and compare it with its checksums; the exit code is 1 when anything is wrong.

    Example: expert cache verify
    """
    with errors_on_exit():
        from pipeline.package.cache import default_cache_dir
        from pipeline.package.cache_admin import verify_cache

        found = verify_cache(cache_dir or default_cache_dir())
        wrong = {item: problems for item, problems in found.items() if problems}
        if as_json:
            entries = [_item(item) | {"problems": list(problems)} for item, problems in found.items()]
            typer.echo(json.dumps(entries, indent=2))
        else:
            for item, problems in wrong.items():
                typer.echo(f"{item.path}: {'; '.join(problems)}")
            typer.echo(f"{len(found) - len(wrong)} of {len(found)} entries are whole")
        if wrong:
            typer.echo("expert cache prune removes what cannot be read; delete other entries by hand", err=True)
            raise typer.Exit(EXIT_FAILED)


@cache_app.command("prune")
def cache_prune(
    unused_days: Annotated[float | None, typer.Option(min=0, help="What was not opened for so many days.")] = None,
    max_size: Annotated[str | None, typer.Option(help="The least used, until so much is left: 20GB.")] = None,
    source_gone: Annotated[
        bool, typer.Option(help="What was unpacked from files that are deleted or changed.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    cache_dir: CacheDirOption = None,
) -> None:
    """Remove from the cache: what is not whole, and what an option names. What was opened within the hour stays.

    Example: expert cache prune --unused-days 30 --max-size 20GB
    """
    with errors_on_exit():
        from pipeline.package.cache import default_cache_dir
        from pipeline.package.cache_admin import parse_size, prune_cache

        removed = prune_cache(
            cache_dir or default_cache_dir(),
            unused_days=unused_days,
            max_bytes=None if max_size is None else parse_size(max_size),
            source_gone=source_gone,
            everything=everything,
            dry_run=dry_run,
        )
        _print_items(removed)
        freed = sum(item.size for item in removed)
        typer.echo(f"{'would free' if dry_run else 'freed'} {freed:,} bytes in {len(removed)} entries")


def _print_rows(rows: list[tuple[str, Any]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        lines = value if isinstance(value, list) else [value]
        table.add_row(f"[bold]{escape(name)}[/bold]", escape("\n".join(map(str, lines)) or "-"))
    table_console().print(table)


def _print_items(items: Any) -> None:
    rows = [
        (
            item.kind,
            item.key[:12],
            item.label if item.is_whole else "damaged",
            f"{item.size:,}",
            f"{max(0.0, time.time() - item.used) / 86_400:.1f}",
            "" if not item.sources else "gone" if item.source_is_gone else "there",
        )
        for item in items
    ]
    headings = ("kind", "key", "what", "bytes", "days unused", "source")
    if rows:
        print_table(headings, rows, table_console(), words=("kind", "key", "what", "source"))


def _item(item: Any) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "key": item.key,
        "label": item.label,
        "path": str(item.path),
        "bytes": item.size,
        "made": item.made,
        "used": item.used,
        "sources": [{"path": path, "unchanged": unchanged} for path, unchanged in item.sources],
        "whole": item.is_whole,
    }
