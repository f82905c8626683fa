"""Open a `.expert` package: find it, check it, unpack it, and say what is in it."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import (
    ArchiveError,
    BaseModelError,
    GrammarError,
    IntegrityError,
    ManifestError,
    PackageNotFoundError,
)
from pipeline.package.adapter import AdapterConfig, adapter_mismatches, locate_adapter, read_adapter_config
from pipeline.package.base_model import TOKENIZER_FILES
from pipeline.package.download import downloaded, is_url, url_file_name
from pipeline.package.integrity import FileRecord, check_sha256, content_digest, scan_directory
from pipeline.package.json_text import JsonPath
from pipeline.package.limits import ArchiveLimits
from pipeline.package.manifest import BaseModelSpec, Manifest
from pipeline.package.manifest_reader import MANIFEST_NAME, MAX_MANIFEST_BYTES, ManifestFile, read_manifest
from pipeline.package.store import CacheEntry, default_cache_dir, unpack_cached
from pipeline.package.weights import read_safetensors_header

DEFAULT_GRAMMAR = "grammar.gbnf"
MAX_GRAMMAR_BYTES = 4 << 20
_DEFAULT_LIMITS = ArchiveLimits()


@dataclass(frozen=True)
class ExpertPackage:
    """A verified, unpacked expert package.

    Args:
        root: The unpacked directory.
        source: What the caller named.
        digest: The sha256 over the paths and checksums of all files; equal for an archive and its unpacked directory.
        base: The base model this adapter belongs to: the first of the manifest, or what `for_base` chose.
        adapter: What `adapter_config.json` says.
        adapter_weights: The safetensors file of the adapter.
        tokenizer_dir: The root when the package brings a tokenizer, else None.
        grammar: The text of the grammar, or None.
        files: Every file, sorted by path.
        warnings: Where the package is odd, one sentence each.
    """

    root: Path
    source: str
    digest: str
    manifest: Manifest
    base: BaseModelSpec
    adapter: AdapterConfig
    adapter_weights: Path
    tokenizer_dir: Path | None
    grammar: str | None
    files: tuple[FileRecord, ...]
    warnings: tuple[str, ...]

    @property
    def label(self) -> str:
        """`name@version`."""
        return f"{self.manifest.name}@{self.manifest.version}"

    def for_base(self, name: str) -> "ExpertPackage":
        """The same package with the adapter for another of its base models.

        Args:
            name: The base model's name in the manifest, or the last part of it.

        Raises:
            AdapterError: The adapter for that base cannot be used.
            BaseModelError: The package has no adapter for it; `details` lists the names it has.
            IntegrityError: The adapter differs from its checksum.
        """
        for index, base in enumerate(self.manifest.base_models):
            if name in (base.name, base.short_name):
                return _build(CacheEntry(self.root, self.files, self.digest), self.source, index)
        raise BaseModelError(
            f"{self.label} has no adapter for the base model {name!r}",
            hint="Use one of these names.",
            details=[base.name for base in self.manifest.base_models],
        )


def open_package(
    path: str | os.PathLike[str],
    *,
    cache_dir: Path | None = None,
    limits: ArchiveLimits = _DEFAULT_LIMITS,
) -> ExpertPackage:
    """Open a package, verify it, and unpack it into the cache when it is an archive.

    Args:
        path: A `.expert` file (a gzip'd tar), an unpacked directory, or a URL of a `.expert` file that fsspec reads.
            When `<path>.sha256` is beside a file, the file is checked against it.
        cache_dir: Where archives are unpacked; `$EXPERT_CACHE_DIR` or `~/.cache/expert` when not given.
        limits: What the package may hold.

    Raises:
        LoadError: As `PackageNotFoundError`, `ArchiveError`, `ManifestError`, `IntegrityError` or `AdapterError`:
            what is wrong with the package.
        GrammarError: The package's grammar is no text.
    """
    source = os.fspath(path)
    cache = cache_dir or default_cache_dir()
    if is_url(source):
        with downloaded(source, cache, limits) as copy:
            entry = unpack_cached(copy, cache, limits, source=url_file_name(source))
        return _build(entry, source)
    place = Path(source)
    if place.is_dir():
        root = place.resolve()
        try:
            files = scan_directory(root, limits)
        except OSError as problem:
            raise PackageNotFoundError(
                f"{source} cannot be read: {problem.strerror}", hint="Check its permissions."
            ) from problem
        return _build(CacheEntry(root, files, content_digest(files)), source)
    if place.is_file():
        return _build(unpack_cached(place, cache, limits, source=place.name), source)
    if place.exists():
        raise ArchiveError(f"{source} is neither a file nor a directory", hint="Name a .expert file.")
    raise PackageNotFoundError(f"nothing is at {source}", hint="Check the path of the .expert file.")


def open_planned(
    path: str | os.PathLike[str], sha256: str, *, planned: str, hint: str, cache_dir: str | None = None
) -> ExpertPackage:
    """Open a package in another process than the one that planned with it, and see that it is the same one.

    Args:
        path: As for `open_package`.
        sha256: The digest of the package that was planned with.
        planned: What was planned, for the message: `the job`.
        hint: What to do when it is another package.
        cache_dir: As for `open_package`.

    Raises:
        LoadError: It cannot be used; IntegrityError where it is another.
    """
    package = open_package(path, cache_dir=None if cache_dir is None else Path(cache_dir))
    if package.digest != sha256:
        raise IntegrityError(
            f"{os.fspath(path)} is not the package {planned} was planned with",
            details=(f"there {package.digest}, planned {sha256}",),
            hint=hint,
        )
    return package


def _build(entry: CacheEntry, source: str, base_index: int = 0) -> ExpertPackage:
    name = url_file_name(source) if is_url(source) else Path(source).name or source
    records = {record.path: record for record in entry.files}
    file = _manifest(entry, records, name)
    manifest = file.manifest
    base = manifest.base_models[base_index]
    place: JsonPath = ("base_models", base_index, "adapters")
    if len(base.adapters) > 1:
        raise file.error(name, place, "More than one adapter for one base model is not supported")
    spec = base.adapters[0]
    found = locate_adapter(entry.root, spec, source=name)
    record = records[found.weights.relative_to(entry.root).as_posix()]
    if spec.size_bytes is not None and spec.size_bytes != record.size:
        raise IntegrityError(
            f"{record.path} in {name} differs from its size in the manifest",
            hint="Fetch the package again from where it was published.",
            details=[f"the manifest says {spec.size_bytes:,} bytes, the file has {record.size:,}"],
        )
    if spec.sha256 is not None:
        what = f"{record.path} in {name}"
        check_sha256(what, expected=spec.sha256, actual=record.sha256, stated_by="the manifest")
    config, config_warnings = read_adapter_config(found.config.read_bytes(), source=name)
    read_safetensors_header(found.weights, source=name)
    _check_soft_prompts(file, records, name)
    grammar = _grammar(entry, file, records, name)
    is_tokenizer = any(tokenizer in records for tokenizer in TOKENIZER_FILES[:2])
    return ExpertPackage(
        root=entry.root,
        source=source,
        digest=entry.digest,
        manifest=manifest,
        base=base,
        adapter=config,
        adapter_weights=found.weights,
        tokenizer_dir=entry.root if is_tokenizer else None,
        grammar=grammar,
        files=entry.files,
        warnings=(*manifest.warnings, *found.warnings, *config_warnings, *adapter_mismatches(spec, config)),
    )


def _manifest(entry: CacheEntry, records: dict[str, FileRecord], name: str) -> ManifestFile:
    if MANIFEST_NAME not in records:
        deeper = sorted(path for path in records if path.endswith(f"/{MANIFEST_NAME}"))
        raise ManifestError(
            f"{name} holds no {MANIFEST_NAME} at its root",
            hint="Pack the expert so that manifest.json lies at the root of the archive.",
            details=[f"found {path}" for path in deeper[:3]],
        )
    with (entry.root / MANIFEST_NAME).open("rb") as file:
        return read_manifest(file.read(MAX_MANIFEST_BYTES + 1), source=name)


def _check_soft_prompts(file: ManifestFile, records: dict[str, FileRecord], name: str) -> None:
    for index, prompt in enumerate(file.manifest.soft_prompts):
        if prompt.path not in records:
            raise file.error(name, ("soft_prompts", index, "path"), f"{prompt.path!r} is not in the package")


def _grammar(entry: CacheEntry, file: ManifestFile, records: dict[str, FileRecord], name: str) -> str | None:
    """The text of the grammar: the file that the manifest names, else `grammar.gbnf` where there is one."""
    named = file.manifest.decoding.grammar_file
    if named is not None and named not in records:
        raise file.error(name, ("decoding", "grammar_file"), f"{named!r} is not in the package")
    chosen = named or DEFAULT_GRAMMAR
    if chosen not in records:
        return None
    if records[chosen].size > MAX_GRAMMAR_BYTES:
        raise GrammarError(
            f"{chosen} in {name} has {records[chosen].size:,} bytes",
            hint=f"A grammar may have {MAX_GRAMMAR_BYTES:,} bytes.",
        )
    try:
        return (entry.root / chosen).read_bytes().decode()
    except UnicodeDecodeError as problem:
        raise GrammarError(f"{chosen} in {name} is not UTF-8", hint="Save the grammar as UTF-8.") from problem
