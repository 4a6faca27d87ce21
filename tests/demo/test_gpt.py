from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from swiftmoe_lightning.demo.gpt import GPT, LanguageModel, dropless, next_byte_loss, rotate
from tests.helpers import run_ranks
from tests.strategies.cases import trainer


def model(**options: float | None) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(2, 32, hidden_dim=16, num_experts=4, top_k=2, **options)
    for parameter in gpt.parameters():
        # As after some training: blocks that add something.
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


def text(seq_len: int = 12) -> Tensor:
    return torch.randint(256, (3, seq_len), generator=torch.Generator().manual_seed(1))


def test_every_byte_gets_a_score_for_each_possible_next_byte() -> None:
    assert model()(text()).shape == (3, 12, 256)


@pytest.mark.parametrize("changed", [1, 6, 11])
def test_a_byte_changes_no_score_before_it_and_the_scores_from_it_on(changed: int) -> None:
    gpt, bytes_BT = model(), text()
    other_BT = bytes_BT.clone()
    other_BT[:, changed] = (other_BT[:, changed] + 1) % 256
    difference_BT = (gpt(bytes_BT) - gpt(other_BT)).abs().amax(-1)
    assert difference_BT[:, :changed].max() < 1e-5
    assert difference_BT[:, changed:].min() > 1e-4


def test_scores_see_the_order_of_earlier_bytes() -> None:
    gpt, bytes_BT = model(), text()
    swapped_BT = bytes_BT[:, [1, 0, *range(2, 12)]]
    assert (gpt(bytes_BT) - gpt(swapped_BT))[:, -1].abs().max() > 1e-4


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q_C, k_C = torch.randn(2, 8).unbind()
    q_TC, k_TC = rotate(q_C.expand(1, 1, 6, 8))[0, 0], rotate(k_C.expand(1, 1, 6, 8))[0, 0]
    scores_TT = q_TC @ k_TC.T
    for distance in range(-5, 6):
        diagonal = scores_TT.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores_TT[0].unique().numel() == 6


def test_an_untrained_model_has_the_loss_of_uniform_guesses() -> None:
    torch.manual_seed(0)
    gpt = GPT(2, 32, hidden_dim=16, num_experts=4, top_k=2)
    loss = next_byte_loss(gpt, text(13))
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)


def test_the_loss_is_that_of_each_next_byte() -> None:
    gpt, bytes_BT = model(), text()
    expected = F.cross_entropy(gpt(bytes_BT[:, :-1]).transpose(1, 2), bytes_BT[:, 1:])
    torch.testing.assert_close(next_byte_loss(gpt, bytes_BT), expected)


def test_a_capacity_is_off_inside_dropless_and_on_again_after_it() -> None:
    capped, bytes_BT = model(capacity_factor=0.5), text()
    before, free = capped(bytes_BT), model()(bytes_BT)
    with dropless(capped):
        inside = capped(bytes_BT)
    torch.testing.assert_close(inside, free)
    torch.testing.assert_close(capped(bytes_BT), before)
    assert not torch.allclose(before, free)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, [1.0]), (20, [0.5, 1.0, 1.0, 1.0])])
def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_stays(num_steps: int, expected: list[float]) -> None:
    actual = LanguageModel(model(), lr=1.0, num_steps=num_steps).configure_optimizers()
    optimizer, schedule = actual["optimizer"], actual["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[: len(expected)] == pytest.approx(expected)
    assert schedule.get_last_lr()[0] == 1.0


def fit_in_bf16() -> list[float]:
    batch = DataLoader(torch.randint(256, (8, 13), generator=torch.Generator().manual_seed(2)), batch_size=4)
    language_model = LanguageModel(model(capacity_factor=1.0), lr=1e-3, num_steps=4)
    trainer(1, "swiftmoe", precision="bf16-mixed", gradient_clip_val=1.0).fit(language_model, batch, batch)
    return language_model.val_losses


def test_it_trains_in_mixed_precision_with_clipping() -> None:
    (losses,) = run_ranks(fit_in_bf16, 1, init=False)
    assert losses[-1] < losses[0]
