"""Archives become documents, and documents a text to train on and one to validate with."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.convergence.corpus import Source, fetch, read_documents, split_documents


def source(archive: Path, requirement: str = "no-such-package-of-ours==1") -> Source:
    return Source(requirement, hashlib.sha256(archive.read_bytes()).hexdigest(), ("*.po", "*.txt"))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("b/locale/de/x.po", "b/locale/en/x.po", "a.txt", "code.py"):
            archive.writestr(name, name)
    return path


def test_a_wheels_documents_are_those_of_its_patterns_without_the_english_catalogues(wheel: Path) -> None:
    assert read_documents(wheel, source(wheel)) == [b"a.txt", b"b/locale/de/x.po"]


def test_an_sdists_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("z.txt", "a.txt", "c.py"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    assert read_documents(path, source(path)) == [b"a.txt", b"z.txt"]


def test_what_is_in_the_cache_is_not_downloaded(wheel: Path) -> None:
    assert fetch(source(wheel), wheel.parent) == wheel


def test_an_archive_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no-such-package-of-ours==1 \(sha256 0123\) could not be downloaded to "):
        fetch(Source("no-such-package-of-ours==1", "0123", ("*",)), tmp_path)


def test_documents_are_whole_on_one_side_and_equal_ones_count_once() -> None:
    documents = [b"<%03d>" % number for number in range(300)]
    corpus = split_documents([*documents, *documents])
    train, validation = bytes(corpus.train), bytes(corpus.validation)
    assert len(train) + len(validation) == 5 * 300
    assert all((document in train) != (document in validation) for document in documents)
    assert 10 <= len(validation) // 5 <= 60
