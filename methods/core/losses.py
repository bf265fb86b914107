"""What training, gradients and sensitivities are of, computed in float32: cross entropies, in nats a token, and errors of hidden states.

    cross entropy           −log p(y)               of the token y that is there
    soft cross entropy      −Σ_v q(v) log p(v)      of a teacher's distribution q: KL(q ‖ p) plus the entropy of q, which is fixed
    square head             Σ_l ‖h_l − t_l‖² / ‖t_l‖²   of hidden states h and those t of a teacher (SquareHead, arXiv 2310.06927)

p is the softmax of the logits z over the vocabulary. Divergences of a student's q from a teacher's p, in nats a token:

    forward         KL(p ‖ q)
    reverse         KL(q ‖ p)
    jsd             β KL(p ‖ m) + (1 − β) KL(q ‖ m),  m = β p + (1 − β) q       generalized Jensen–Shannon (GKD, arXiv 2306.13649)
    skew            KL(p ‖ α p + (1 − α) q)                                      DistiLLM, arXiv 2402.03898
    skew-reverse    KL(q ‖ α q + (1 − α) p)
    perturbation    Σ_v p(v) Σ_m ε_m (1 − q(v))^m                                what PTLoss adds to the first, arXiv 2305.05010
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

PIECE = 2048
"""Positions whose divergence is computed at once."""
Divergence = Literal["forward", "reverse", "jsd", "skew", "skew-reverse"]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


def divergence(
    logits: Tensor, teacher: Tensor, kind: Divergence = "forward", share: float = 0.5, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """A divergence of the student's distribution from the teacher's, averaged over positions, a scalar; its gradient is the student's.

    Args:
        logits: Of the student, [..., vocabulary].
        teacher: Its logits, of the same shape.
        share: β of `jsd`, α of the skew ones; above 0 and below 1.
        temperature: Both logits are divided by it; the divergence is not multiplied by its square.
        mask: True at the positions that count, [...]; None: all do.

    Of many positions it is computed in pieces, and again for the gradient, so that nothing in float32 is held of them all.
    """
    if mask is not None:
        logits, teacher = logits[mask], teacher[mask]
    return _in_pieces(_divergence, logits, teacher, kind, share, temperature)


def perturbation(logits: Tensor, teacher: Tensor, coefficients: Sequence[float], temperature: float = 1.0) -> Tensor:
    """Σ_v p(v) Σ_m ε_m (1 − q(v))^m, averaged over positions, a scalar; with ε_m = 1/m for all m it is the cross entropy of q under p.

    Args:
        logits: Of the student, [..., vocabulary].
        teacher: Its logits, of the same shape.
        coefficients: ε_1, ε_2, …
        temperature: Both logits are divided by it.
    """
    return _in_pieces(_perturbation, logits, teacher, tuple(coefficients), temperature)


def _in_pieces(of: Callable[..., Tensor], logits: Tensor, teacher: Tensor, *settings: Any) -> Tensor:
    """The mean over positions of what `of` makes of logits [positions, vocabulary]."""
    from torch.utils.checkpoint import checkpoint

    made, wanted = logits.flatten(0, -2), teacher.detach().flatten(0, -2)
    if len(made) <= PIECE:
        return of(made, wanted, *settings)
    parts = zip(made.split(PIECE), wanted.split(PIECE), strict=True)
    found = [len(ours) * checkpoint(of, ours, theirs, *settings, use_reentrant=False) for ours, theirs in parts]
    return sum(found, start=made.new_zeros((), dtype=found[0].dtype)) / len(made)


def _perturbation(logits: Tensor, teacher: Tensor, coefficients: tuple[float, ...], temperature: float) -> Tensor:
    q, p = ((of.float() / temperature).softmax(-1) for of in (logits, teacher))
    series = sum((epsilon * (1 - q) ** order for order, epsilon in enumerate(coefficients, 1)), start=q.new_zeros(()))
    return (p * series).sum(-1).mean()


def _divergence(logits: Tensor, teacher: Tensor, kind: Divergence, share: float, temperature: float) -> Tensor:
    """`divergence` of logits [positions, vocabulary]."""
    import math

    import torch

    q, p = ((of.float() / temperature).log_softmax(-1) for of in (logits, teacher))

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum(-1).mean()

    def mixed(first: Tensor, second: Tensor) -> Tensor:
        """The logarithm of share · first + (1 − share) · second."""
        return torch.logaddexp(first + math.log(share), second + math.log(1 - share))

    match kind:
        case "forward":
            return kl(p, q)
        case "reverse":
            return kl(q, p)
        case "jsd":
            middle = mixed(p, q)
            return share * kl(p, middle) + (1 - share) * kl(q, middle)
        case "skew":
            return kl(p, mixed(p, q))
        case "skew-reverse":
            return kl(q, mixed(q, p))


def square_head(states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ_l mean (h_l − t_l)² / mean t_l², a scalar, of hidden states [sequences, length, hidden] in float32."""
    pairs = [(state.float(), wanted.float()) for state, wanted in zip(states, teacher, strict=True)]
    return sum(((state - wanted).square().mean() / wanted.square().mean() for state, wanted in pairs), start=pairs[0][0].new_zeros(()))
