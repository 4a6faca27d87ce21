"""From logits to experts, weights and the sums of the router's losses, and back, reading the logits once each way.

T tokens, E experts, K top-k, B blocks of tokens. The products of each block land in a row of its own, and torch sums
the rows: the same bits every time. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import device_of

# Elements of a program's [BLOCK_T, BLOCK_E] tile, 8 to a thread: several tiles are alive at once.
_TILE = 2048


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    chosen_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """([T, K], [T, K], [E], []): `eager_route`."""
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    block_e, block_t, num_blocks = _blocks(num_tokens, num_experts)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    probs_BE = torch.empty(num_blocks, num_experts, dtype=torch.float32, device=device)
    squares_B = torch.empty(num_blocks, dtype=torch.float32, device=device)
    if num_blocks:
        with device_of(logits_TE):
            route_kernel[(num_blocks,)](
                logits_TE.contiguous(),
                None if bias_E is None else bias_E.contiguous(),
                None if chosen_TK is None else chosen_TK.contiguous(),
                ids_TK,
                weights_TK,
                probs_BE,
                squares_B,
                num_tokens,
                E=num_experts,
                K=top_k,
                SOFTMAX=score == "softmax",
                RENORMALIZE=renormalize,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
                BLOCK_K=triton.next_power_of_2(top_k),
                num_warps=8,
            )
    return weights_TK, ids_TK, probs_BE.sum(0), squares_B.sum()


def route_backward(
    grad_weights_TK: Tensor,
    grad_probs_E: Tensor,
    grad_square: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    score: str,
    renormalize: bool,
) -> Tensor:
    """[T, E]: `eager_route_backward`."""
    num_tokens, num_experts = logits_TE.shape
    block_e, block_t, num_blocks = _blocks(num_tokens, num_experts)
    grad_TE = torch.empty(num_tokens, num_experts, dtype=logits_TE.dtype, device=logits_TE.device)
    if num_blocks:
        with device_of(logits_TE):
            route_backward_kernel[(num_blocks,)](
                grad_weights_TK.contiguous(),
                grad_probs_E.contiguous(),
                grad_square.contiguous(),
                logits_TE.contiguous(),
                ids_TK.contiguous(),
                grad_TE,
                num_tokens,
                E=num_experts,
                K=ids_TK.shape[1],
                SOFTMAX=score == "softmax",
                RENORMALIZE=renormalize,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
                num_warps=8,
            )
    return grad_TE


def _blocks(num_tokens: int, num_experts: int) -> tuple[int, int, int]:
    """(BLOCK_E, BLOCK_T, B)."""
    block_e = triton.next_power_of_2(num_experts)
    block_t = min(max(_TILE // block_e, 1), 128)
    return block_e, block_t, triton.cdiv(num_tokens, block_t)


@triton.jit
def _load_logits(p_logits, b_t, b_e, num_tokens, E: tl.constexpr):
    """(logits [BLOCK_T, BLOCK_E], -inf where no expert is; mask). A token beyond T has zeros: no nan comes of them."""
    m_e = b_e[None, :] < E
    m = (b_t[:, None] < num_tokens) & m_e
    b_logits = tl.load(p_logits + b_t[:, None] * E + b_e[None, :], mask=m, other=0.0).to(tl.float32)
    return tl.where(m_e, b_logits, -float("inf")), m


@triton.jit
def _softmax(b_logits):
    """(softmax [BLOCK_T, BLOCK_E], log-sum-exp [BLOCK_T])."""
    b_max = tl.max(b_logits, axis=1)
    b_exp = tl.exp(b_logits - b_max[:, None])
    b_sum = tl.sum(b_exp, axis=1)
    return b_exp / b_sum[:, None], b_max + tl.log(b_sum)


@triton.jit
def _shares(b_scores):
    """(scores as shares, their sums [BLOCK_T] as divided by): what keeps a token of zero scores from 0 / 0."""
    b_sum = tl.maximum(tl.sum(b_scores, axis=1), 1e-20)
    return b_scores / b_sum[:, None], b_sum


@triton.jit
def route_kernel(
    p_logits,  # [T, E]
    p_bias,  # [E], or None
    p_chosen,  # [T, K], or None; -1 takes the best
    p_ids,  # [T, K]
    p_weights,  # [T, K]
    p_probs,  # [B, E]
    p_squares,  # [B]
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`route` of a block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    b_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    b_e = tl.arange(0, BLOCK_E)
    b_k = tl.arange(0, BLOCK_K)
    b_logits, m = _load_logits(p_logits, b_t, b_e, num_tokens, E)
    b_scores, b_lse = _softmax(b_logits)
    b_probs = b_scores
    if not SOFTMAX:
        b_scores = tl.sigmoid(b_logits)
        b_probs, _ = _shares(b_scores)
    tl.store(p_probs + block * E + b_e, tl.sum(tl.where(m, b_probs, 0.0), axis=0), mask=b_e < E)
    tl.store(p_squares + block, tl.sum(tl.where(b_t < num_tokens, b_lse * b_lse, 0.0), axis=0))

    b_biased = b_scores
    if p_bias is not None:
        b_biased += tl.load(p_bias + b_e, mask=b_e < E, other=0.0).to(tl.float32)[None, :]
    b_biased = tl.where(b_e[None, :] < E, b_biased, -float("inf"))
    # [BLOCK_T, BLOCK_K]
    b_ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    b_weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        # The first of equals. With nan scores any expert may come, but always one of E.
        b_best = tl.minimum(tl.argmax(b_biased, axis=1), E - 1)
        if p_chosen is not None:
            b_chosen = tl.load(p_chosen + b_t * K + k, mask=b_t < num_tokens, other=-1).to(tl.int32)
            b_best = tl.where(b_chosen < 0, b_best, b_chosen)
        is_best = b_e[None, :] == b_best[:, None]
        b_score = tl.sum(tl.where(is_best, b_scores, 0.0), axis=1)
        b_ids = tl.where(b_k[None, :] == k, b_best[:, None], b_ids)
        b_weights = tl.where(b_k[None, :] == k, b_score[:, None], b_weights)
        b_biased = tl.where(is_best, -float("inf"), b_biased)
    if RENORMALIZE:
        b_weights, _ = _shares(b_weights)
    m_tk = (b_t[:, None] < num_tokens) & (b_k[None, :] < K)
    tl.store(p_ids + b_t[:, None] * K + b_k[None, :], b_ids, mask=m_tk)
    tl.store(p_weights + b_t[:, None] * K + b_k[None, :], b_weights, mask=m_tk)


@triton.jit
def route_backward_kernel(
    p_grad_weights,  # [T, K]
    p_grad_probs,  # [E]
    p_grad_square,  # []
    p_logits,  # [T, E]
    p_ids,  # [T, K]
    p_grad_logits,  # [T, E]
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """`route_backward` of a block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    b_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    b_e = tl.arange(0, BLOCK_E)
    m_t = b_t < num_tokens
    b_logits, m = _load_logits(p_logits, b_t, b_e, num_tokens, E)
    b_softmax, b_lse = _softmax(b_logits)
    b_scores = b_softmax if SOFTMAX else tl.sigmoid(b_logits)

    # The weights' gradient, spread to the chosen experts: [BLOCK_T, BLOCK_E], zero elsewhere.
    b_grad = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    b_chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    for k in tl.static_range(K):
        b_id = tl.load(p_ids + b_t * K + k, mask=m_t, other=-1).to(tl.int32)
        b_grad_weight = tl.load(p_grad_weights + b_t * K + k, mask=m_t, other=0.0).to(tl.float32)
        is_chosen = b_e[None, :] == b_id[:, None]
        b_grad = tl.where(is_chosen, b_grad_weight[:, None], b_grad)
        b_chosen = b_chosen | is_chosen
    if RENORMALIZE:
        b_raw = tl.where(b_chosen, b_scores, 0.0)
        b_weights, b_sum = _shares(b_raw)
        # Below the clamp the divisor is a constant.
        b_mean = tl.where(tl.sum(b_raw, axis=1) >= 1e-20, tl.sum(b_grad * b_weights, axis=1), 0.0)
        b_grad = tl.where(b_chosen, (b_grad - b_mean[:, None]) / b_sum[:, None], 0.0)

    b_grad_probs = tl.load(p_grad_probs + b_e, mask=b_e < E, other=0.0).to(tl.float32)[None, :]
    if SOFTMAX:
        b_grad += b_grad_probs
        b_grad = b_softmax * (b_grad - tl.sum(b_grad * b_softmax, axis=1)[:, None])
    else:
        b_probs, b_sum = _shares(b_scores)
        b_mean = tl.where(tl.sum(b_scores, axis=1) >= 1e-20, tl.sum(b_grad_probs * b_probs, axis=1), 0.0)
        b_grad += (b_grad_probs - b_mean[:, None]) / b_sum[:, None]
        b_grad = b_grad * b_scores * (1 - b_scores)
    b_grad += 2 * tl.load(p_grad_square).to(tl.float32) * b_lse[:, None] * b_softmax
    tl.store(p_grad_logits + b_t[:, None] * E + b_e[None, :], b_grad, mask=m)
