"""Hostile and broken archives, 1 to 33 of the list: how each is made, and what must be said of it."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import zstandard

from tests.package.expert_fixtures import (
    archive,
    expert_files,
    good_members,
    header,
    member,
    padded,
    pax,
    tar,
)

GOOD = good_members()
LINK, HARD, DIRECTORY = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


def sparse() -> bytes:
    return header(b"hole", 0, tarfile.GNUTYPE_SPARSE)


def gnu_long(name: bytes) -> bytes:
    return member(b"././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME)


def bomb() -> bytes:
    return archive(GOOD, member("zeros", bytes(30 << 20)))


def bad_crc() -> bytes:
    whole = bytearray(archive(GOOD))
    whole[-8] ^= 1
    return bytes(whole)


def bad_header_sum() -> bytes:
    block = bytearray(header(b"a"))
    block[0] ^= 1
    return archive(GOOD, bytes(block))


def zipped(
    files: Mapping[str, bytes] | None = None, change: Callable[[zipfile.ZipInfo], object] = lambda _: None
) -> bytes:
    """A zip of a valid package; `change` alters its entries before they are written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in (files or expert_files()).items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            packed.writestr(info, data)
    return buffer.getvalue()


def patched(data: bytes, find: bytes, put: bytes, which: int = 0) -> bytes:
    """The bytes with one occurrence of `find` replaced, counted from the front, or from the end below 0."""
    places = [at for at in range(len(data)) if data.startswith(find, at)]
    at = places[which]
    return data[:at] + put + data[at + len(find) :]


def overlapping_zip() -> bytes:
    """A zip whose two entries share the bytes of one member."""
    one = zipped({"manifest.json": bytes(1000)})
    end = one.rindex(b"PK\x05\x06")
    start = one.index(b"PK\x01\x02")
    central = one[start:end]
    other = central.replace(b"manifest.json", b"manifest.jsoo")
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, 2 * len(central), start, 0)
    return one[:start] + central + other + tail


def with_symlink(info: zipfile.ZipInfo) -> None:
    if info.filename == "grammar.gbnf":
        info.external_attr = 0o120777 << 16


def encrypted() -> bytes:
    data = bytearray(zipped())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    return bytes(data)


def zst(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(data)


ARCHIVES: list[tuple[str, Callable[[], bytes], str]] = [
    ("01 parent", lambda: archive(GOOD, member("../canary/x")), "holds '..'"),
    ("01 parent inside", lambda: archive(GOOD, member("a/../../canary/x")), "holds '..'"),
    ("01 parent directory", lambda: archive(GOOD, member("..", kind=DIRECTORY)), "holds '..'"),
    ("01 parent by pax", lambda: archive(GOOD, pax([(b"path", b"../canary/x")]), member("x")), "holds '..'"),
    ("01 parent by GNU name", lambda: archive(GOOD, gnu_long(b"../canary/x"), member("x")), "holds '..'"),
    ("02 absolute", lambda: archive(GOOD, member("/tmp/x")), "is absolute"),  # noqa: S108  # never written
    ("03 drive", lambda: archive(GOOD, member("C:/x")), "drive letter"),
    ("03 backslash", lambda: archive(GOOD, member("..\\x")), "backslash"),
    ("04 symlink out", lambda: archive(GOOD, header(b"l", kind=LINK, link=b"../canary")), "is a symbolic link"),
    (
        "05 chained symlinks",
        lambda: archive(GOOD, header(b"a", kind=LINK, link=b"b"), header(b"b", kind=LINK, link=b"..")),
        "is a symbolic link",
    ),
    (
        "06 write through a symlink",
        lambda: archive(GOOD, header(b"l", kind=LINK, link=b"../canary"), member("l/x")),
        "is a symbolic link",
    ),
    ("07 hard link", lambda: archive(GOOD, header(b"l", kind=HARD, link=b"/etc/passwd")), "is a hard link"),
    ("08 hard link inside", lambda: archive(GOOD, header(b"l", kind=HARD, link=b"a/b")), "is a hard link"),
    ("07 pax linkpath", lambda: archive(GOOD, pax([(b"linkpath", b"/etc/passwd")]), member("x")), "is a link"),
    ("04 GNU long link", lambda: archive(GOOD, member(b"l", b"x" * 200, tarfile.GNUTYPE_LONGLINK)), "is a link"),
    ("09 long path", lambda: archive(GOOD, pax([(b"path", b"a/" * 2500 + b"x")]), member("x")), "longer than 200"),
    ("22 long part", lambda: archive(GOOD, pax([(b"path", b"n" * 10_000)]), member("x")), "longer than 200"),
    ("22 deep path", lambda: archive(GOOD, pax([(b"path", b"a/" * 20 + b"x")]), member("x")), "deeper than 8"),
    ("10 character device", lambda: archive(GOOD, header(b"d", kind=tarfile.CHRTYPE)), "a character device"),
    ("10 block device", lambda: archive(GOOD, header(b"d", kind=tarfile.BLKTYPE)), "a block device"),
    ("10 pipe", lambda: archive(GOOD, header(b"d", kind=tarfile.FIFOTYPE)), "a named pipe"),
    ("10 unknown type", lambda: archive(GOOD, header(b"d", kind=b"Z")), "unknown type"),
    ("11 duplicate", lambda: archive(GOOD, member("grammar.gbnf", b"other")), "occurs twice"),
    ("11 duplicate by dot", lambda: archive(GOOD, member("./grammar.gbnf", b"other")), "occurs twice"),
    ("12 case", lambda: archive(GOOD, member("GRAMMAR.gbnf")), "one name on some file systems"),
    ("12 case of a directory", lambda: archive(GOOD, member("Tests/x")), "one name on some file systems"),
    ("12 NFC and NFD", lambda: archive(GOOD, member("\u00e9"), member("e\u0301")), "one name on some file systems"),
    ("13 file then directory", lambda: archive(GOOD, member("x"), member("x/y")), "both a file and a directory"),
    ("13 directory then file", lambda: archive(GOOD, member("x/y"), member("x")), "both a file and a directory"),
    ("14 bomb by size", lambda: archive(GOOD, member("z", bytes(33 << 20))), "a file may have"),
    ("14 bomb by ratio", bomb, "times its size"),
    ("14 bomb after the end", lambda: gzip.compress(tar(GOOD) + bytes(30 << 20)), "times its size"),
    ("17 truncated gzip", lambda: archive(GOOD)[:-200], "cut short"),
    ("17 truncated trailer", lambda: archive(GOOD)[:-4], "cut short"),
    ("17 header only", lambda: archive(GOOD)[:10], "cut short"),
    ("17 truncated tar", lambda: gzip.compress(GOOD + padded(b"x")[:100]), "ends inside a member's header"),
    ("17 no end of archive", lambda: gzip.compress(GOOD), "ends inside a member's header"),
    ("17 truncated member", lambda: gzip.compress(GOOD + header(b"x", 1000) + b"short"), "ends inside 'x'"),
    ("18 bad CRC", bad_crc, "fails its checksum"),
    ("18 bad header checksum", bad_header_sum, "header is corrupt"),
    ("18 flipped bits", lambda: archive(GOOD)[:60] + b"\xff" * 40 + archive(GOOD)[100:], "corrupt"),
    ("19 trailing garbage", lambda: archive(GOOD) + b"garbage", "follows the end of the gzip stream"),
    ("19 garbage in the tar", lambda: gzip.compress(tar(GOOD) + b"x"), "follows the end of the tar"),
    ("20 concatenated gzip", lambda: archive(GOOD) + archive(member("more")), "follows the end of the gzip stream"),
    ("20 second tar", lambda: gzip.compress(tar(GOOD) + tar(member("more"))), "follows the end of the tar"),
    ("21 many members", lambda: archive(*(member(f"m{number}") for number in range(300))), "more than 200 members"),
    ("21 many global headers", lambda: archive(*[pax([(b"comment", b"x")], tarfile.XGLTYPE)] * 300), "more than 200"),
    ("23 GNU sparse", lambda: archive(GOOD, sparse()), "a sparse file"),
    ("23 pax sparse", lambda: archive(GOOD, pax([(b"GNU.sparse.major", b"1")]), member("x")), "a sparse file"),
    ("24 not UTF-8", lambda: archive(GOOD, member(b"\xff\xfe")), "not UTF-8"),
    ("24 NUL in a field", lambda: archive(GOOD, member(b"good\0evil")), "holds a NUL"),
    ("24 NUL in pax", lambda: archive(GOOD, pax([(b"path", b"a\0b")]), member("x")), "control character"),
    ("24 newline", lambda: archive(GOOD, member("a\nb")), "control character"),
    ("25 pax size", lambda: archive(GOOD, pax([(b"size", b"1024")]), member("x", b"a")), "different sizes"),
    ("26 negative size", lambda: archive(GOOD, header(b"x", size_field=b"\xff" * 11 + b"\x00")), "bytes"),
    ("26 size in letters", lambda: archive(GOOD, header(b"x", size_field=b"00000z00000\0")), "header is corrupt"),
    ("26 huge size", lambda: archive(GOOD, header(b"x", size_field=b"\x80" + b"\x7f" * 11)), "a file may have"),
    (
        "27 unterminated pax",
        lambda: archive(GOOD, member(b"p", b"12 path=abc", tarfile.XHDTYPE), member("x")),
        "corrupt",
    ),
    (
        "27 pax of length 0",
        lambda: archive(GOOD, member(b"p", b"0 path=abc\n", tarfile.XHDTYPE), member("x")),
        "corrupt",
    ),
    ("27 huge pax", lambda: archive(GOOD, header(b"p", 1 << 30, tarfile.XHDTYPE)), "an extended header has"),
    ("27 pax at the end", lambda: archive(GOOD, pax([(b"path", b"a")])), "after an extended header"),
    ("27 pax twice", lambda: archive(GOOD, pax([(b"path", b"a")]), pax([(b"path", b"b")]), member("x")), "repeated"),
    ("27 pax key twice", lambda: archive(GOOD, pax([(b"path", b"a"), (b"path", b"b")]), member("x")), "twice"),
    (
        "27 global path",
        lambda: archive(GOOD, pax([(b"path", b"a")], tarfile.XGLTYPE), member("x")),
        "set values for all",
    ),
    ("28 two long names", lambda: archive(GOOD, gnu_long(b"a"), pax([(b"path", b"b")]), member("x")), "both a GNU"),
    ("29 file named as directory", lambda: archive(GOOD, member("x/")), "with the name of a directory"),
    ("29 directory with content", lambda: archive(GOOD, member("x", b"abc", DIRECTORY)), "a directory none"),
    ("33 plain tar", lambda: tar(GOOD), "a tar archive without gzip"),
    ("33 web page", lambda: b"<!DOCTYPE html>", "a web page"),
    ("33 Git LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ("33 random", lambda: b"\x00\x01\x02", "something else"),
    ("32 empty file", lambda: b"", "an empty file"),
]
ZIPS: list[tuple[str, Callable[[], bytes], str]] = [
    ("01 zip parent", lambda: zipped({"../canary/x": b""}), "holds '..'"),
    ("02 zip absolute", lambda: zipped({"/tmp/x": b""}), "is absolute"),  # noqa: S108  # never written
    ("03 zip backslash", lambda: patched(patched(zipped({"a/b": b""}), b"a/b", b"a\\b"), b"a/b", b"a\\b"), "backslash"),
    ("04 zip symlink", lambda: zipped(change=with_symlink), "a symbolic link"),
    ("12 zip case", lambda: zipped({"a": b"", "A": b""}), "one name on some file systems"),
    ("14 zip bomb", lambda: zipped({"z": bytes(30 << 20)}), "times its size"),
    ("15 overlapping zip", overlapping_zip, "its members overlap"),
    ("17 zip cut", lambda: zipped()[:-5], "is cut short"),
    ("17 zip directory only", lambda: b"PK\x03\x04", "is cut short"),
    (
        "18 zip CRC",
        lambda: zipped({"a": b"x" * 100}).replace(struct.pack("<L", zlib.crc32(b"x" * 100)), b"abcd"),
        "corrupt",
    ),
    ("19 zip trailing garbage", lambda: zipped() + b"garbage", "something follows its end"),
    ("20 stacked zips", lambda: zipped() + zipped(), "not where its end says"),
    ("21 zip many members", lambda: zipped({f"m{number}": b"" for number in range(300)}), "more than 200 members"),
    ("22 zip deep path", lambda: zipped({"a/" * 20 + "x": b""}), "deeper than 8"),
    ("24 zip not UTF-8", lambda: zipped({"abc": b""}).replace(b"abc", b"a\xffc"), "not UTF-8"),
    ("29 zip other local name", lambda: patched(zipped(), b"grammar.gbnf", b"grammaR.gbnf"), "two headers differ"),
    (
        "29 zip other size",
        lambda: patched(zipped({"a": b"xyz"}), struct.pack("<L", 3), struct.pack("<L", 4), 0),
        "differ",
    ),
    ("30 zip encrypted", encrypted, "is encrypted"),
    (
        "30 zip unknown method",
        lambda: zipped({"a": b""}, lambda info: setattr(info, "compress_type", zipfile.ZIP_LZMA)),
        "a method that is not known (14)",
    ),
    ("33 zip comment", lambda: zipped()[:-2] + b"\x01\x00x", "something follows its end"),
    ("17 zst cut", lambda: zst(tar(GOOD))[:-10], "is cut short"),
    ("18 zst checksum", lambda: zst(tar(GOOD))[:-1] + b"x", "fails its checksum"),
    ("19 zst trailing garbage", lambda: zst(tar(GOOD)) + b"x", "follows the end of the zstandard frame"),
    ("20 zst second frame", lambda: zst(tar(GOOD)) + zst(tar(GOOD)), "follows the end of the zstandard frame"),
    ("14 zst bomb", lambda: zst(tar(GOOD) + bytes(60 << 20)), "times its size"),
    ("33 zst garbage", lambda: b"\x28\xb5\x2f\xfd" + bytes(100), "zstandard"),
    ("33 zst of no tar", lambda: zst(b"no tar"), "ends inside a member's header"),
    ("19 gzip comment", lambda: b"\x1f\x8b\x08\x10\0\0\0\0\0\xffhello\0" + archive(GOOD)[10:], "a seal that is broken"),
]
