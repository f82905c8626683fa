"""An unpacked package, and what is in it."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BaseModelError, GrammarError, IntegrityError, ManifestError
from pipeline.package.adapter import AdapterConfig, adapter_mismatches, locate_adapter, read_adapter_config
from pipeline.package.adapter_weights import check_adapter_weights
from pipeline.package.base_model import TOKENIZER_FILES
from pipeline.package.cache import CacheEntry
from pipeline.package.download import is_url, url_file_name
from pipeline.package.integrity import FileRecord, check_sha256
from pipeline.package.json_text import JsonPath
from pipeline.package.manifest import BaseModelSpec, Manifest
from pipeline.package.manifest_reader import MANIFEST_NAME, MAX_MANIFEST_BYTES, ManifestFile, read_manifest
from pipeline.package.signatures import UNSIGNED, Signature, read_signature
from pipeline.package.tokenizer import check_tokenizer_config
from pipeline.package.weights import read_safetensors_header

DEFAULT_GRAMMAR = "grammar.gbnf"
MAX_GRAMMAR_BYTES = 4 << 20


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
        signature: Who vouches for it.
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
    signature: Signature = UNSIGNED

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
                return read_package(CacheEntry(self.root, self.files, self.digest), self.source, index)
        raise BaseModelError(
            f"{self.label} has no adapter for the base model {name!r}",
            hint="Use one of these names.",
            details=[base.name for base in self.manifest.base_models],
        )


def read_package(entry: CacheEntry, source: str, base_index: int = 0) -> ExpertPackage:
    """Check what is in an unpacked package, all but the values of its tensors.

    Args:
        entry: Its files.
        source: What the caller named.
        base_index: Which of its base models it is for.

    Raises:
        LoadError: As for `open_package`.
        GrammarError: Its grammar is no text.
    """
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
    if base_index or not entry.is_checked:
        tensors = read_safetensors_header(found.weights, source=name)
        check_adapter_weights(tensors, config, source=f"{record.path} in {name}")
        check_tokenizer_config(entry.root, records, source=name)
    _check_soft_prompts(file, records, name)
    grammar = _grammar(entry, file, records, name)
    signature = read_signature(entry.root, entry.files, manifest, source=name)
    warnings = (*manifest.warnings, *found.warnings, *config_warnings, *adapter_mismatches(spec, config))
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
        warnings=(*warnings, *signature.warnings(f"{manifest.name}@{manifest.version}")),
        signature=signature,
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
