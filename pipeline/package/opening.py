"""Open a `.expert` package: find it, check it, unpack it, and hold it to what is asked of its signature."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArchiveError, ConfigError, IntegrityError, PackageNotFoundError, TrustError
from pipeline.package.cache import CacheEntry, default_cache_dir, unpack_cached
from pipeline.package.contents import check_values
from pipeline.package.download import downloaded, is_url, url_file_name
from pipeline.package.integrity import content_digest, scan_directory
from pipeline.package.limits import ArchiveLimits
from pipeline.package.locks import file_lock, unwritable
from pipeline.package.package import ExpertPackage, read_package
from pipeline.package.signatures import TRUST_POLICIES, TrustPolicy, require
from pipeline.package.staged import localise, parse_reference
from pipeline.package.versions import newest

_DEFAULT_LIMITS = ArchiveLimits()


def open_package(
    path: str | os.PathLike[str] | ExpertPackage,
    *,
    cache_dir: Path | None = None,
    limits: ArchiveLimits = _DEFAULT_LIMITS,
    trust: TrustPolicy = "any",
    allow_rollback: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> ExpertPackage:
    """Open a package, verify it, and unpack it into the cache when it is an archive.

    Args:
        path: A `.expert` file (tar.gz, tar.zst or zip), an unpacked directory, a URL of a `.expert` file that fsspec
            reads, or what is staged in a `PackageStore` (`<store>/packages/<digest>`). When `<path>.sha256` is beside a
            file, the file is checked against it. A package that was opened before is held to `trust` and given back.
        cache_dir: Where packages are unpacked; `$EXPERT_CACHE_DIR` or `~/.cache/expert` when not given.
        limits: What the package may hold.
        trust: `"any"` takes unsigned packages, with a warning; `"signed"` asks for a signature of anybody, so that the
            package is whole; `"trusted"` for one by a key of the trust store. A signature that is wrong is always
            refused.
        allow_rollback: With `trust="trusted"`, open a package though a newer version of it was opened so before.
        storage_options: Passed to the file system of a URL, e.g. an endpoint.

    Raises:
        LoadError: As `PackageNotFoundError`, `ArchiveError`, `ManifestError`, `IntegrityError`, `TrustError`,
            `StoreError`, `TokenizerError` or `AdapterError`: what is wrong with the package.
        GrammarError: The package's grammar is no text.
        ConfigError: `path` or `trust` is none of these.
    """
    if trust not in TRUST_POLICIES:
        raise ConfigError(f"trust is {trust!r}", hint=f"Use {', '.join(TRUST_POLICIES)}.")
    cache = cache_dir or default_cache_dir()
    if isinstance(path, ExpertPackage):
        package = path
    else:
        source = _named(path)
        package = read_package(_entry(source, cache, limits, storage_options), source)
    require(trust, package.signature, label=package.label)
    if trust == "trusted":
        _refuse_older(package, cache, allow_rollback=allow_rollback)
    return package


def _named(path: object) -> str:
    if isinstance(path, str | os.PathLike) and isinstance(source := os.fspath(path), str):
        return source
    raise ConfigError(
        f"a package is named by a string or a path, not by {type(path).__name__}",
        hint="Give a .expert file, an unpacked directory, a URL, or what open_package returned.",
    )


def _entry(source: str, cache: Path, limits: ArchiveLimits, storage_options: Mapping[str, Any] | None) -> CacheEntry:
    def check(fresh: CacheEntry) -> None:
        check_values(read_package(fresh, source))

    reference = parse_reference(source)
    if reference is not None and reference.kind == "packages":
        return localise(reference, cache, storage_options=storage_options, limits=limits, check=check)
    if is_url(source):
        with downloaded(source, cache, limits, storage_options) as copy:
            name = url_file_name(source)
            return unpack_cached(copy, cache, limits, source=name, check=check, is_temporary=True)
    place = Path(source)
    if place.is_dir():
        root = place.resolve()
        try:
            files = scan_directory(root, limits)
        except OSError as problem:
            raise PackageNotFoundError(
                f"{source} cannot be read: {problem.strerror}", hint="Check its permissions."
            ) from problem
        entry = CacheEntry(root, files, content_digest(files))
        check(entry)
        return entry
    if place.is_file():
        return unpack_cached(place, cache, limits, source=place.name, check=check)
    if place.exists():
        raise ArchiveError(f"{source} is neither a file nor a directory", hint="Name a .expert file.")
    raise PackageNotFoundError(f"nothing is at {source}", hint="Check the path of the .expert file.")


def _refuse_older(package: ExpertPackage, cache: Path, *, allow_rollback: bool) -> None:
    """Remember the newest trusted version of each expert that was opened here; refuse an older one."""
    name, version = package.manifest.name, package.manifest.version
    place = cache / "trusted" / f"{name}.json"
    with file_lock(place.with_suffix(".lock")):
        try:
            known = str(json.loads(place.read_bytes())["version"])
            latest = newest([known, version]) or version
        except FileNotFoundError:
            known, latest = version, version
        except (ValueError, KeyError, TypeError) as problem:
            raise TrustError(
                f"{place} does not say which version of {name} was opened before",
                hint="Remove the file, when you know that no newer version was.",
            ) from problem
        if latest != version and not allow_rollback:
            raise TrustError(
                f"{package.label} is older than {name}@{known}, which was opened here before",
                hint="Get the newer version, or ask for the older one: allow_rollback=True (--allow-rollback).",
            )
        try:
            fresh = place.with_suffix(".fresh")
            fresh.write_text(json.dumps({"version": latest}), encoding="utf-8")
            fresh.replace(place)
        except OSError as problem:
            raise unwritable(place, problem) from problem


def open_planned(
    path: str | os.PathLike[str],
    sha256: str,
    *,
    planned: str,
    hint: str,
    cache_dir: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ExpertPackage:
    """Open a package in another process than the one that planned with it, and see that it is the same one.

    Args:
        path: As for `open_package`.
        sha256: The digest of the package that was planned with.
        planned: What was planned, for the message: `the job`.
        hint: What to do when it is another package.
        cache_dir, storage_options: As for `open_package`.

    Raises:
        LoadError: It cannot be used; IntegrityError where it is another.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    package = open_package(path, cache_dir=cache, storage_options=storage_options)
    if package.digest != sha256:
        raise IntegrityError(
            f"{os.fspath(path)} is not the package {planned} was planned with",
            details=(f"there {package.digest}, planned {sha256}",),
            hint=hint,
        )
    return package
