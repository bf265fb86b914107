"""What training, gradients and sensitivities are of, computed in float32: cross entropies, in nats a token, and errors of hidden states.

    cross entropy           −log p(y)               of the token y that is there
    soft cross entropy      −Σ_v q(v) log p(v)      of a teacher's distribution q: KL(q ‖ p) plus the entropy of q, which is fixed
    square head             Σ_l ‖h_l − t_l‖² / ‖t_l‖²   of hidden states h and those t of a teacher (SquareHead, arXiv 2310.06927)

p is the softmax of the logits z over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def cross_entropy(logits: Tensor, tokens: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """−log p(y) over all positions, a scalar.

    Args:
        logits: z [..., vocabulary].
        tokens: y [...], int64.
    """
    from torch.nn import functional

    return functional.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction=reduction)


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of a text with what is predicted of each token by those before it, a scalar.

    Args:
        logits: z [sequences, length, vocabulary]; those of the last position predict nothing that is there.
        ids: The text, int64 [sequences, length].
    """
    return cross_entropy(logits[:, :-1], ids[:, 1:])


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """−Σ_v q(v) log p(v), averaged over positions, a scalar.

    Args:
        logits: Of the student, [..., vocabulary].
        teacher: Its logits, of the same shape: q is their softmax.
    """
    from torch.nn import functional

    return functional.cross_entropy(logits.flatten(0, -2).float(), teacher.flatten(0, -2).float().softmax(-1))


def square_head(states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ_l mean (h_l − t_l)² / mean t_l², a scalar, of hidden states [sequences, length, hidden] in float32."""
    pairs = [(state.float(), wanted.float()) for state, wanted in zip(states, teacher, strict=True)]
    return sum(((state - wanted).square().mean() / wanted.square().mean() for state, wanted in pairs), start=pairs[0][0].new_zeros(()))
