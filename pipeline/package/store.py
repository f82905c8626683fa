"""Packages and base models on storage that every machine of a cluster reads, through fsspec.

Each lies under its digest, is written once, and is whole or, to a reader, not there: a marker is written last, and a
reader looks at nothing without it. So stagers may race, and die at any point: whoever comes next finishes the work.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BaseModelError, IntegrityError, StoreError, TrustError
from pipeline.package.base_model import model_files, why_no_model
from pipeline.package.cache import FILES_NAME, Kind, default_cache_dir
from pipeline.package.download import is_url, same_protocol
from pipeline.package.integrity import FileRecord, content_digest, file_sha256
from pipeline.package.locks import scratch_directory
from pipeline.package.opening import open_package
from pipeline.package.package import ExpertPackage
from pipeline.package.signatures import TrustPolicy
from pipeline.package.staged import MARKER, Marker, Reference, read_marker
from pipeline.package.versions import newest

if TYPE_CHECKING:
    from pipeline.storage import Storage

_VERSIONS = "versions"
_ATTEMPTS = "_attempts"


@dataclass(frozen=True)
class StagedPackage:
    """A package, or a base model, in a store.

    Args:
        url: What names it everywhere a package (or base model) is named.
        digest: Of its files; the last part of the URL.
        label: `name@version`; of a base model the name of its directory.
        size: Bytes of all files.
        is_new: Whether this call completed it; False when it was there.
    """

    url: str
    digest: str
    label: str
    size: int
    is_new: bool


class PackageStore:
    """Packages on shared storage.

    Args:
        url: A folder, as a path or a URL that fsspec knows: `s3://bucket/experts`. It need not exist.
        storage_options: Passed to the file system, e.g. an endpoint.

    Raises:
        StoreError: There is no such file system.
        MissingDependencyError: The package of the file system is not installed.

    Examples:
        >>> from pipeline import demo
        >>> from pipeline.package import open_package
        >>> staged = PackageStore(shared_folder).stage(demo.package("sql"))
        >>> open_package(staged.url).label
        'expert-sql@0.1.0'
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        from pipeline.storage import open_storage  # it brings in pyarrow

        place = os.fspath(url)
        self.url = (place if is_url(place) else os.path.abspath(place)).rstrip("/")  # noqa: PTH100  # follows no links
        self._options = storage_options
        self._storage = open_storage(self.url, storage_options, error=StoreError, any_protocol=True)

    def stage(
        self,
        package: str | os.PathLike[str] | ExpertPackage,
        *,
        cache_dir: Path | None = None,
        trust: TrustPolicy = "any",
        allow_rollback: bool = False,
    ) -> StagedPackage:
        """Put a package into the store, unless it is there.

        Args:
            package: What `open_package` takes, or what it returned. The store's options are for a URL of the same
                protocol, too.
            cache_dir: As for `open_package`.
            trust: As for `open_package`.
            allow_rollback: With `trust="trusted"`, stage a version though a newer one of that name is staged.

        Raises:
            LoadError: The package cannot be used.
            StoreError: The store cannot be written.
            TrustError: It is not signed as `trust` asks, or is older than what is staged.
        """
        if not isinstance(package, ExpertPackage):
            package = open_package(
                package,
                cache_dir=cache_dir,
                trust=trust,
                allow_rollback=allow_rollback,
                storage_options=self._options if same_protocol(os.fspath(package), self.url) else None,
            )
        name, version = package.manifest.name, package.manifest.version
        if trust == "trusted" and not allow_rollback:
            staged = newest(self.versions(name))
            if staged is not None and newest([staged, version]) != version:
                raise TrustError(
                    f"{package.label} is older than {name}@{staged}, which is staged at {self.url}",
                    hint="Stage the newer version, or ask for the older one: allow_rollback=True (--allow-rollback).",
                )
        staged_package = self._stage("packages", package.label, package.root, package.files, cache_dir)
        self._storage.create(f"{_VERSIONS}/{name}/{version}/{package.digest}", b"")
        self._storage.remove_tree(_ATTEMPTS)
        return staged_package

    def stage_base_model(self, folder: str | os.PathLike[str], *, cache_dir: Path | None = None) -> StagedPackage:
        """Put a base model into the store, unless it is there: its configuration, safetensors and tokenizer.

        Args:
            folder: The model's directory.
            cache_dir: Where scratch files go; as for `open_package`.

        Raises:
            BaseModelError: It is no directory of a model.
            StoreError: The store cannot be written.
        """
        root = Path(folder).resolve()
        reason = why_no_model(root)
        if reason is not None:
            raise BaseModelError(f"{folder} is no base model: {reason}", hint="Name the directory of a model.")
        files = tuple(FileRecord(path.name, path.stat().st_size, file_sha256(path)) for path in model_files(root))
        return self._stage("models", root.name, root, files, cache_dir)

    def find(self, digest: str, kind: Kind = "packages") -> StagedPackage | None:
        """What is staged under a digest; None where nothing whole is.

        Raises:
            StoreError: The store cannot be read.
        """
        marker = read_marker(self._folder(kind, digest), digest)
        return None if marker is None else self._staged(kind, digest, marker, is_new=False)

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions of an expert that were staged, in no order.

        Raises:
            StoreError: The store cannot be read.
        """
        found = self._storage.list(f"{_VERSIONS}/{name}")
        return tuple({path.split("/")[2] for path in found if path.count("/") == 3})

    def _folder(self, kind: Kind, digest: str) -> "Storage":
        return self._storage.subfolder(f"{kind}/{digest}")

    def _staged(self, kind: Kind, digest: str, marker: Marker, *, is_new: bool) -> StagedPackage:
        size = sum(record.size for record in marker.files)
        return StagedPackage(Reference(self.url, kind, digest).url, digest, marker.label, size, is_new)

    def _stage(
        self, kind: Kind, label: str, root: Path, files: tuple[FileRecord, ...], cache_dir: Path | None
    ) -> StagedPackage:
        digest = content_digest(files)
        folder = self._folder(kind, digest)
        marker = read_marker(folder, digest)
        if marker is not None:
            folder.remove_tree(_ATTEMPTS)  # of one who died between the marker and this
            return self._staged(kind, digest, marker, is_new=False)
        marker = Marker(label, tuple(sorted(files, key=lambda record: record.path)))
        there = folder.list(FILES_NAME)
        with scratch_directory((cache_dir or default_cache_dir()) / "staging") as scratch:
            for record in marker.files:
                _put(folder, record, root / record.path, scratch, is_there=f"{FILES_NAME}/{record.path}" in there)
        is_new = folder.create(MARKER, marker.to_json())
        if not is_new and read_marker(folder, digest) is None:  # cut short, where a file system creates no whole files
            folder.replace(MARKER, marker.to_json())
        folder.remove_tree(_ATTEMPTS)  # of stagers that died, on a disk; one that is alive begins its attempt again
        return self._staged(kind, digest, marker, is_new=is_new)


def _put(folder: "Storage", record: FileRecord, source: Path, scratch: Path, *, is_there: bool) -> None:
    """Create one file of a package; what another stager left under its name is read back, and goes if it is wrong."""
    if file_sha256(source) != record.sha256:
        raise IntegrityError(
            f"{source} has changed since it was verified",
            hint="Let no other program write to the package cache (expert cache verify), and stage again.",
        )
    name = f"{FILES_NAME}/{record.path}"
    if not is_there and folder.create_from_file(name, str(source)):
        return
    copy = scratch / "copy"
    same = folder.fetch(name, str(copy)) == record.sha256
    copy.unlink()
    if same:
        return
    folder.remove([name])
    folder.create_from_file(name, str(source))
