"""The store: a package is whole there or, to a reader, not there; whoever races, dies or reads badly."""

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from moto.server import ThreadedMotoServer

from pipeline.errors import BaseModelError, IntegrityError, PackageNotFoundError, StoreError, TrustError
from pipeline.package import (
    ExpertPackage,
    PackageStore,
    find_base_model,
    local_base_model,
    open_package,
    open_planned,
    pack,
)
from pipeline.package.cache_admin import list_cache
from pipeline.package.keys import add_trusted_key, generate_key
from pipeline.package.manifest import BaseModelSpec
from pipeline.package.staged import MARKER, parse_reference
from pipeline.storage import open_storage
from pipeline.storage.local import LocalStorage
from tests.package.dying import FORK, dying_at
from tests.package.expert_fixtures import expert_files, manifest, weights, write_archive, write_files
from tests.package.hostile_cases import BASE_FILES


@pytest.fixture
def store(tmp_path: Path) -> PackageStore:
    return PackageStore(tmp_path / "store")


def test_a_staged_package_is_the_package(store: PackageStore, expert_file: Path, cache: Path, tmp_path: Path) -> None:
    package = open_package(expert_file)
    staged = store.stage(expert_file)
    assert staged.url == f"{tmp_path}/store/packages/{package.digest}"
    assert (staged.digest, staged.label, staged.is_new) == (package.digest, "expert-test@0.1.0", True)
    assert store.find(package.digest) == store.stage(package)
    assert not store.stage(package).is_new
    assert store.versions("expert-test") == ("0.1.0",)
    elsewhere = open_package(staged.url, cache_dir=tmp_path / "node")
    assert elsewhere.digest == package.digest
    assert elsewhere.files == package.files
    assert elsewhere.root.is_relative_to(tmp_path / "node" / "packages" / package.digest)
    assert open_planned(staged.url, package.digest, planned="the job", hint="x", cache_dir=str(cache)).digest
    shutil.rmtree(tmp_path / "store")
    assert open_package(staged.url, cache_dir=tmp_path / "node") == elsewhere


def test_nothing_whole_is_nothing(store: PackageStore, expert_file: Path, tmp_path: Path) -> None:
    staged = store.stage(expert_file)
    (Path(staged.url) / MARKER).unlink()
    assert store.find(staged.digest) is None
    with pytest.raises(PackageNotFoundError, match="nothing whole is staged"):
        open_package(staged.url, cache_dir=tmp_path / "node")
    assert store.stage(expert_file).is_new
    assert open_package(staged.url, cache_dir=tmp_path / "node").digest == staged.digest


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "label": "x", "files": []}'])
def test_a_marker_that_says_something_else_is_none(
    content: bytes, store: PackageStore, expert_file: Path, tmp_path: Path
) -> None:
    staged = store.stage(expert_file)
    (Path(staged.url) / MARKER).write_bytes(content)
    assert store.find(staged.digest) is None
    assert store.stage(expert_file).digest == staged.digest
    assert open_package(staged.url, cache_dir=tmp_path / "node").digest == staged.digest


def test_a_file_that_was_changed_in_the_store_is_refused_and_mended(
    store: PackageStore, expert_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.package.staged._RETRY_SECONDS", (0.0,))
    staged = store.stage(expert_file)
    grammar = Path(staged.url) / "files" / "grammar.gbnf"
    grammar.write_bytes(b'root ::= "b"\n')
    with pytest.raises(IntegrityError, match=r"grammar\.gbnf of .* differs from its checksum"):
        open_package(staged.url, cache_dir=tmp_path / "node")
    assert not list((tmp_path / "node" / "packages").iterdir())
    (Path(staged.url) / MARKER).unlink()
    store.stage(expert_file)
    assert open_package(staged.url, cache_dir=tmp_path / "node").grammar == 'root ::= "a"\n'


def test_names_in_a_marker_are_not_believed(store: PackageStore, expert_file: Path, tmp_path: Path) -> None:
    from pipeline.package.integrity import FileRecord, content_digest
    from pipeline.package.staged import Marker, localise

    files = (FileRecord("../canary", 1, "0" * 64),)
    digest = content_digest(files)
    write_files(tmp_path / "store" / "packages" / digest, {MARKER: Marker("x", files).to_json()})
    reference = parse_reference(f"{tmp_path}/store/packages/{digest}")
    assert reference is not None
    with pytest.raises(StoreError, match="cannot be used"):
        localise(reference, tmp_path / "node")


class Flaky(LocalStorage):
    """A disk whose first reads are short, or fail."""

    left = 2

    def fetch(self, name: str, path: str) -> str:
        if Flaky.left and name.endswith("safetensors"):
            Flaky.left -= 1
            if Flaky.left:
                raise StoreError("the network has gone", hint="Wait.")
            Path(path).write_bytes(b"short")
            return "0" * 64
        return super().fetch(name, path)


def test_short_and_failing_reads_are_read_again(
    store: PackageStore, expert_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = store.stage(expert_file)
    monkeypatch.setattr("pipeline.package.staged._RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("pipeline.storage.LocalStorage", Flaky)
    assert open_package(staged.url, cache_dir=tmp_path / "node").digest == staged.digest
    assert Flaky.left == 0


def test_a_disk_that_is_full_leaves_nothing_that_is_read(store: PackageStore, tmp_path: Path) -> None:
    import resource

    big = write_archive(tmp_path / "big.expert", expert_files() | {"z": os.urandom(300_000)})
    package = open_package(big)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            store.stage(package)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.find(package.digest) is None
    assert store.stage(package).is_new


def stage_together(store: PackageStore, package: ExpertPackage, cache: Path, *, killed: int | None) -> list[int]:
    """Eight processes stage one package at once; or seven, while another dies at its n-th flush. Their exit codes."""
    start = FORK.Event()

    def work(number: int) -> None:
        flush, count = os.fsync, 0

        def counted(handle: int) -> None:
            nonlocal count
            count += 1
            if count == killed:
                start.set()
                os._exit(9)
            flush(handle)

        if number == 0 and killed is not None:
            os.fsync = counted
        else:
            start.wait(60)
        store.stage(package, cache_dir=cache / str(number))
        os._exit(0)

    children = [FORK.Process(target=work, args=(number,)) for number in range(8)]
    for child in children:
        child.start()
    if killed is None:
        start.set()
    for child in children:
        child.join(60)
    return [-1 if child.exitcode is None else child.exitcode for child in children]


@pytest.mark.parametrize("killed", [None, 1, 6, 17])
def test_eight_processes_stage_one_package(killed: int | None, store: PackageStore, tmp_path: Path) -> None:
    package = open_package(write_archive(tmp_path / "x.expert", expert_files(adapter_model__safetensors=weights(1))))
    codes = stage_together(store, package, tmp_path / "caches", killed=killed)
    assert codes == [0 if killed is None else 9, *[0] * 7]
    staged = store.find(package.digest)
    assert staged is not None
    copies = [path for path in open_storage(store.url).list("packages") if path.endswith(MARKER)]
    assert copies == [f"packages/{package.digest}/{MARKER}"]
    assert sorted(path.name for path in Path(staged.url).iterdir()) == [MARKER, "files"]
    assert open_package(staged.url, cache_dir=tmp_path / "node").digest == package.digest


def test_eight_processes_localise_once(store: PackageStore, expert_file: Path, tmp_path: Path) -> None:
    staged = store.stage(expert_file)
    fetched = FORK.Value("i", 0)
    fetch = LocalStorage.fetch

    class Counting(LocalStorage):
        def fetch(self, name: str, path: str) -> str:
            with fetched.get_lock():
                fetched.value += 1
            return fetch(self, name, path)

    def work() -> None:
        import pipeline.storage

        pipeline.storage.LocalStorage = Counting  # type: ignore[misc]  # in this process only
        found = open_package(staged.url, cache_dir=tmp_path / "node").digest == staged.digest
        os._exit(0 if found else 1)

    children = [FORK.Process(target=work) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 8
    assert fetched.value == len(expert_files())


def test_base_models_are_staged_alike(store: PackageStore, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "Tiny", BASE_FILES | {"pytorch_model.bin": b"never", "notes.md": b"not needed"})
    staged = store.stage_base_model(folder)
    assert (staged.label, staged.is_new) == ("Tiny", True)
    assert not store.stage_base_model(folder).is_new
    spec = BaseModelSpec(name="Tiny", adapters=({"type": "dora"},))  # type: ignore[arg-type]
    found = find_base_model(spec, base_model=staged.url, cache_dir=tmp_path / "node")
    assert found.place == staged.url
    assert sorted(path.name for path in found.path.iterdir()) == sorted(BASE_FILES)
    assert local_base_model(found.place, str(tmp_path / "node")) == found.path
    assert local_base_model(str(folder)) == folder
    assert local_base_model(found.place, str(tmp_path / "node"), weights=False) == found.path, "it is here already"
    light = local_base_model(found.place, str(tmp_path / "other"), weights=False)
    there = [name for name in BASE_FILES if not name.endswith(".safetensors")]
    assert sorted(path.name for path in light.iterdir()) == sorted(there) != sorted(BASE_FILES)
    assert local_base_model(found.place, str(tmp_path / "other"), weights=False) == light
    whole = local_base_model(found.place, str(tmp_path / "other"))
    assert sorted(path.name for path in whole.iterdir()) == sorted(BASE_FILES)
    assert {item.is_whole for item in list_cache(tmp_path / "other")} == {True}
    with pytest.raises(BaseModelError) as caught:
        find_base_model(spec, base_model=f"{store.url}/models/{'0' * 64}", cache_dir=tmp_path / "node")
    assert "nothing whole is staged" in caught.value.details[0]
    with pytest.raises(BaseModelError, match="is no base model: holds no config"):
        store.stage_base_model(tmp_path)


def test_an_older_version_is_not_staged_over_a_newer_one(
    store: PackageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERT_TRUST_DIR", str(tmp_path / "trusted"))
    key, public = generate_key("alice", tmp_path / "keys")
    add_trusted_key(public)
    packages = {}
    for version in ("0.2.0", "0.10.0"):
        files = expert_files(manifest__json=json.dumps(manifest(version=version)).encode())
        packages[version] = pack(write_files(tmp_path / version, files), tmp_path / f"{version}.expert", key=key)
    store.stage(packages["0.10.0"], trust="trusted")
    with pytest.raises(TrustError, match=r"older than expert-test@0\.10\.0, which is staged"):
        store.stage(packages["0.2.0"], trust="trusted", cache_dir=tmp_path / "elsewhere")
    assert store.stage(packages["0.2.0"], trust="trusted", allow_rollback=True).is_new
    assert sorted(store.versions("expert-test")) == ["0.10.0", "0.2.0"]


@pytest.mark.parametrize(
    "place", ["store/packages/abc", "s3://b/packages", f"s3://b/other/{'0' * 64}", f"packages/{'0' * 63}g", ""]
)
def test_other_places_are_no_references(place: str) -> None:
    assert parse_reference(place) is None


def test_a_store_in_memory(expert_file: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        staged = PackageStore("memory://experts").stage(expert_file)
        assert staged.url == f"memory://experts/packages/{staged.digest}"
        assert not PackageStore("memory://experts/").stage(expert_file).is_new
        assert open_package(staged.url, cache_dir=tmp_path / "node").digest == staged.digest
    finally:
        memory.store.clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Options for a real S3 API on this machine, with a bucket `experts`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"},
    }
    made = urllib.request.Request(f"http://{host}:{port}/experts", method="PUT")  # on this machine
    urllib.request.urlopen(made).close()  # noqa: S310
    yield options
    server.stop()


def test_a_store_in_s3(s3: dict[str, Any], expert_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.package.staged._RETRY_SECONDS", (0.0,))
    store = PackageStore("s3://experts/team", s3)
    staged = store.stage(expert_file)
    assert staged.is_new
    assert not PackageStore("s3://experts/team/", s3).stage(expert_file).is_new
    assert store.versions("expert-test") == ("0.1.0",)
    opened = open_package(staged.url, cache_dir=tmp_path / "node", storage_options=s3)
    assert opened.digest == staged.digest == open_package(expert_file).digest
    files = fsspec.filesystem("s3", **s3)
    assert len(files.find("experts/team/packages")) == len(opened.files) + 1
    files.pipe_file(f"{staged.url}/files/grammar.gbnf".removeprefix("s3://"), b"changed")
    with pytest.raises(IntegrityError):
        open_package(staged.url, cache_dir=tmp_path / "other", storage_options=s3)
    assert store.find("0" * 64) is None


class Stagings(RuleBasedStateMachine):
    """Stagers, some of which die, and nodes that localise and prune: the store always holds whole packages only."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.root = Path(tempfile.mkdtemp(prefix="stagings-"))
        self.store = PackageStore(self.root / "store")
        self.packages = [
            write_archive(self.root / f"{number}.expert", expert_files(adapter_model__safetensors=weights(number)))
            for number in range(2)
        ]
        self.digests = [open_package(package, cache_dir=self.root / "made").digest for package in self.packages]
        self.whole: set[int] = set()

    @rule(number=st.integers(0, 1))
    def stage(self, number: int) -> None:
        staged = self.store.stage(self.packages[number], cache_dir=self.root / "made")
        assert staged.is_new == (number not in self.whole)
        self.whole.add(number)
        assert "_attempts" not in [path.name for path in Path(staged.url).iterdir()]

    @rule(number=st.integers(0, 1), step=st.integers(1, 24))
    def stage_and_die(self, number: int, step: int) -> None:
        code = dying_at(step, lambda: self.store.stage(self.packages[number], cache_dir=self.root / "made"))
        assert code in (0, 9)
        if self.store.find(self.digests[number]) is not None:
            self.whole.add(number)
        else:
            assert code == 9

    @rule(number=st.integers(0, 1), step=st.integers(1, 4))
    def localise_and_die(self, number: int, step: int) -> None:
        url = f"{self.store.url}/packages/{self.digests[number]}"
        if number in self.whole:
            dying_at(step, lambda: open_package(url, cache_dir=self.root / "node"))

    @rule(number=st.integers(0, 1))
    def localise(self, number: int) -> None:
        url = f"{self.store.url}/packages/{self.digests[number]}"
        if number in self.whole:
            assert open_package(url, cache_dir=self.root / "node").digest == self.digests[number]
            left = [path for path in (self.root / "node" / "packages").iterdir() if path.name.startswith(".fresh-")]
            assert len(left) <= 1  # of one who died, where this call had nothing to make
        else:
            with pytest.raises(PackageNotFoundError):
                open_package(url, cache_dir=self.root / "fresh")

    @rule()
    def prune(self) -> None:
        from pipeline.package.cache_admin import prune_cache

        for item in list_cache(self.root / "node"):
            os.utime(item.path / ".index.json", (0, 0))
        prune_cache(self.root / "node", everything=True)
        assert not list((self.root / "node").glob("packages/*"))

    @invariant()
    def the_store_holds_whole_packages_only(self) -> None:
        if hasattr(self, "store"):
            assert {number for number in range(2) if self.store.find(self.digests[number])} == self.whole

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


Stagings.TestCase.settings = settings(
    max_examples=6, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
test_stagings = Stagings.TestCase
