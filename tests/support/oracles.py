"""What the papers of distillation minimize, over numbers in float64: each loss from its formula, position by position.

Nothing of slimbench is used here, and of torch what a calculator has: no loss, no softmax. All functions take tensors, whoever made them:

    logits      z [sequences, length, vocabulary]; those of a position predict the token behind it
    ids         int64 [sequences, length]
    states      hidden states [sequences, length, features]
    heads       queries, keys or values [sequences, heads, length, width]
    masks       True at the tokens that are meant, [sequences, length]; the first token of a sequence is predicted by nothing

A position of a decoder sees itself and those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, cat, minimum


def logarithms(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / τ) of one position."""
    scaled = logits.double() / temperature
    scaled = scaled - scaled.max()
    return scaled - scaled.exp().sum().log()


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q), from logarithms."""
    return (first.exp() * (first - second)).sum()


def surprise(first: Tensor, second: Tensor) -> Tensor:
    """The cross entropy −Σ p log q, from logarithms."""
    return -(first.exp() * second).sum()


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of numbers."""
    total = values[0] * 0
    for value in values:
        total = total + value
    return total / len(values)


def squared_error(one: Tensor, other: Tensor) -> Tensor:
    """MSE: the mean over all elements of their squared differences."""
    apart = one.double() - other.double()
    return (apart * apart).sum() / apart.numel()


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of the angle between two vectors."""
    a, b = one.double(), other.double()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5


def text(logits: Tensor, ids: Tensor) -> Tensor:
    """−log q(y) of each token but the first, the mean."""
    rows, length = ids.shape
    return mean([-logarithms(logits[row, t])[ids[row, t + 1]] for row in range(rows) for t in range(length - 1)])


def predictions(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p^τ ‖ q^τ) at all positions but the last, the mean."""
    rows, length = student.shape[:2]
    places = [(row, t) for row in range(rows) for t in range(length - 1)]
    return mean([kl(logarithms(teacher[at], temperature), logarithms(student[at], temperature)) for at in places])


def soft(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ p^τ log q^τ at all positions there are, the mean."""
    places = [(row, t) for row in range(student.shape[0]) for t in range(student.shape[1])]
    return mean([surprise(logarithms(teacher[at], temperature), logarithms(student[at], temperature)) for at in places])


def hinton(student: Tensor, teacher: Tensor, ids: Tensor, share: float, temperature: float) -> Tensor:
    """(1 − α) (−log q(y)) + α τ² KL(p^τ ‖ q^τ), arXiv 1503.02531."""
    return (1 - share) * text(student, ids) + share * temperature * temperature * predictions(student, teacher, temperature)


def distilbert(
    logits: tuple[Tensor, Tensor], states: tuple[Tensor, Tensor], ids: Tensor, weights: tuple[float, float, float], temperature: float
) -> Tensor:
    """α_ce τ² KL(p^τ ‖ q^τ) + α_lm (−log q(y)) + α_cos (1 − cos(h_T, h_S)), arXiv 1910.01108; student first."""
    places = [(row, t) for row in range(ids.shape[0]) for t in range(ids.shape[1])]
    direction = mean([1 - cosine(states[1][at], states[0][at]) for at in places])
    taught = temperature * temperature * predictions(*logits, temperature)
    return weights[0] * taught + weights[1] * text(logits[0], ids) + weights[2] * direction


def scores(queries: Tensor, keys: Tensor) -> list[list[Tensor]]:
    """Q Kᵀ / √d by sequence and head [length, length]; neighbouring heads of queries share one of keys."""
    heads, shared, width = queries.shape[1], keys.shape[1], queries.shape[3]
    return [
        [queries[row, head].double() @ keys[row, head * shared // heads].double().T / math.sqrt(width) for head in range(heads)]
        for row in range(queries.shape[0])
    ]


def tinybert(
    embeddings: tuple[Tensor, Tensor],
    hidden: Sequence[tuple[Tensor, Tensor]],
    attention: Sequence[tuple[list[list[Tensor]], list[list[Tensor]]]],
    turns: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Σ_m [1/h Σ_i MSE(A_i^S, A_i^T) + MSE(H^S W_h, H^T)] + MSE(E^S W_e, E^T), arXiv 1909.10351, of scores that are seen; student first.

    Args:
        turns: W_h and W_e; None: nothing is turned.
    """
    (first, wanted), (around, before) = embeddings, (None, None) if turns is None else turns
    total = squared_error(first.double() if before is None else first.double() @ before.double(), wanted)
    for state, target in hidden:
        total = total + squared_error(state.double() if around is None else state.double() @ around.double(), target)
    for ours, theirs in attention:
        errors = []
        for head in range(len(ours[0])):
            apart = [
                (ours[row][head][i, j] - theirs[row][head][i, j]) ** 2
                for row in range(len(ours))
                for i in range(len(ours[row][head]))
                for j in range(i + 1)
            ]
            errors.append(mean(apart))
        total = total + mean(errors)
    return total


def hint(student: Tensor, teacher: Tensor, regressor: Tensor) -> Tensor:
    """½ ‖h_T − R h_S‖² at each position, the mean, arXiv 1412.6550."""
    found = []
    for row in range(student.shape[0]):
        for t in range(student.shape[1]):
            apart = teacher[row, t].double() - student[row, t].double() @ regressor.double()
            found.append(0.5 * (apart * apart).sum())
    return mean(found)


def flow(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """1/n Σ_pairs ‖G^T − G^S‖², G = 1/T Σ_t h_a(t) h_b(t)ᵀ, the mean over sequences (FSP, CVPR 2017).

    Args:
        student: States at the ends of the parts of the network, one more than there are pairs.
    """
    found = []
    for row in range(student[0].shape[0]):
        for pair in range(len(student) - 1):
            both = []
            for states in (student, teacher):
                first, second = states[pair][row].double(), states[pair + 1][row].double()
                products = [first[t][:, None] * second[t][None, :] for t in range(len(first))]
                both.append(mean(products))
            apart = both[1] - both[0]
            found.append((apart * apart).sum())
    return mean(found)


def relations(heads: Tensor) -> list[list[list[Tensor]]]:
    """log softmax(V Vᵀ / √d) by sequence, head and position, each over what the position sees."""
    width = heads.shape[3]
    found = []
    for row in range(heads.shape[0]):
        products = [head.double() @ head.double().T / math.sqrt(width) for head in heads[row]]
        found.append([[logarithms(of[t, : t + 1]) for t in range(len(of))] for of in products])
    return found


def between(student: list[list[list[Tensor]]], teacher: list[list[list[Tensor]]]) -> Tensor:
    """1/(A |x|) Σ_a Σ_t KL(teacher ‖ student), the mean over sequences, of logarithms by sequence, head and position."""
    found = [
        kl(theirs, ours)
        for one, other in zip(student, teacher, strict=True)
        for mine, its in zip(one, other, strict=True)
        for ours, theirs in zip(mine, its, strict=True)
    ]
    return mean(found)


def minilm(attention: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> Tensor:
    """KL of the attentions and of the relations of values, arXiv 2002.10957; student first.

    Args:
        attention: Probabilities [sequences, heads, length, length] of the last attention.
        values: Its values.
    """
    logs = [[[[head[t, : t + 1].double().log() for t in range(len(head))] for head in row] for row in of] for of in attention]
    return between(logs[0], logs[1]) + between(relations(values[0]), relations(values[1]))


def minilm_relations(student: Sequence[Tensor], teacher: Sequence[Tensor], count: int) -> Tensor:
    """KL of the relations of queries, of keys and of values in so many relation heads, arXiv 2012.15828.

    Args:
        student: Queries, keys and values of its last attention.
    """

    def cut(heads: Tensor) -> Tensor:
        """The heads side by side, and then cut anew."""
        whole = cat([heads[:, head] for head in range(heads.shape[1])], dim=2)
        width = whole.shape[2] // count
        return cat([whole[:, None, :, part * width : (part + 1) * width] for part in range(count)], dim=1)

    parts = [between(relations(cut(ours)), relations(cut(theirs))) for ours, theirs in zip(student, teacher, strict=True)]
    return parts[0] + parts[1] + parts[2]


def filtered(states: Tensor, matrix: Tensor) -> Tensor:
    """W h, of states over their root mean square."""
    found = states.double()
    return found / ((found * found).sum(-1, keepdim=True) / found.shape[-1]) ** 0.5 @ matrix.double()


def ted_task(states: Sequence[Tensor], filters: Sequence[Tensor], head: Tensor, ids: Tensor) -> Tensor:
    """Σ_l −log softmax(head(W_l h_l))(y), arXiv 2210.01351, the task being the next token.

    Args:
        head: [vocabulary, features].
    """
    parts = [text(filtered(state, each) @ head.double().T, ids) for state, each in zip(states, filters, strict=True)]
    return mean(parts) * len(parts)


def ted(
    logits: tuple[Tensor, Tensor],
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    filters: tuple[Sequence[Tensor], Sequence[Tensor]],
    ids: Tensor,
    weights: tuple[float, float],
) -> Tensor:
    """−log q(y) + a KL(p ‖ q) + b · mean_l MSE(W^S h^S, W^T h^T), arXiv 2210.01351; student first."""
    ours, theirs = ([filtered(state, each) for state, each in zip(*of, strict=True)] for of in zip(states, filters, strict=True))
    layers = mean([squared_error(one, other) for one, other in zip(ours, theirs, strict=True)])
    return text(logits[0], ids) + weights[0] * predictions(*logits) + weights[1] * layers


def mutual(own: Tensor, peer: Tensor, ids: Tensor) -> Tensor:
    """−log q(y) + KL(p ‖ q) of a student q, whose peer p stands still, arXiv 1706.00384."""
    return text(own, ids) + predictions(own, peer.detach())


def homodistil(logits: tuple[Tensor, Tensor], layers: Tensor, ids: Tensor, weights: tuple[float, float]) -> Tensor:
    """−log q(y) + α₁ KL(p ‖ q) + α₂ L_layers, arXiv 2302.09632; student first."""
    return text(logits[0], ids) + weights[0] * predictions(*logits) + weights[1] * layers


def dynabert(parts: Sequence[tuple[Tensor, Tensor, Sequence[tuple[Tensor, Tensor]]]], weight: float) -> Tensor:
    """Σ over parts of −Σ p log q + λ Σ_l MSE(h_l, h_l'), arXiv 2004.04037.

    Args:
        parts: Logits of a part and of its teacher, all but the last position of which count, and their states in pairs.
    """
    found = []
    for ours, theirs, states in parts:
        errors = [squared_error(*pair) for pair in states]
        found.append(soft(ours[:, :-1], theirs[:, :-1]) + weight * mean(errors) * len(errors))
    return mean(found) * len(found)


def gkd(student: Tensor, teacher: Tensor, prompt: int, share: float) -> Tensor:
    """JSD_β(p ‖ q) of the predictions of the tokens behind a prompt, the mean, arXiv 2306.13649; KL(p ‖ q) and KL(q ‖ p) at 0 and 1."""
    found = []
    for row in range(student.shape[0]):
        for t in range(prompt - 1, student.shape[1] - 1):
            q, p = logarithms(student[row, t]), logarithms(teacher[row, t])
            if share in (0.0, 1.0):
                found.append(kl(p, q) if share == 0 else kl(q, p))
            else:
                middle = (share * p.exp() + (1 - share) * q.exp()).log()
                found.append(share * kl(p, middle) + (1 - share) * kl(q, middle))
    return mean(found)


def places(mask: Tensor, row: int) -> list[int]:
    """The positions that predict the tokens of a mask in one sequence."""
    return [t - 1 for t in range(1, mask.shape[1]) if bool(mask[row, t])]


def responses(
    logits: Tensor, ids: Tensor, learned: Tensor, tasks: Sequence[int] | None = None, weights: Mapping[int, float] | None = None
) -> Tensor:
    """−log q(y) of the tokens of responses: the mean of all, or Σ_task w_task times the mean of the tokens of its sequences.

    Args:
        tasks: Of each sequence.
        weights: w by task; tasks that no sequence is of have no part.
    """
    found: dict[int, list[Tensor]] = {}
    for row in range(ids.shape[0]):
        for t in places(learned, row):
            task = 0 if weights is None or tasks is None else tasks[row]
            found.setdefault(task, []).append(-logarithms(logits[row, t])[ids[row, t + 1]])
    parts = [(1.0 if weights is None else weights[task]) * mean(values) for task, values in found.items()]
    return mean(parts) * len(parts)


def consistency(
    logits: tuple[Tensor, Tensor], ids: tuple[Tensor, Tensor], learned: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], weight: float
) -> Tensor:
    """½ (CE_a + CE_b) + β · ½ [KL(p_a ‖ p_b) + KL(p_b ‖ p_a)] of the tokens of the answer, arXiv 2310.14747."""
    apart = []
    for row in range(ids[0].shape[0]):
        for one, other in zip(places(right[0], row), places(right[1], row), strict=True):
            p, q = logarithms(logits[0][row, one]), logarithms(logits[1][row, other])
            apart.append(0.5 * (kl(p, q) + kl(q, p)))
    first, second = (responses(*of) for of in zip(logits, ids, learned, strict=True))
    return 0.5 * (first + second) + weight * mean(apart)


def in_context(student: Tensor, teacher: Tensor, ids: Tensor, learned: Tensor, there: Tensor, weight: float) -> Tensor:
    """½ CE(y) + ½ CE(p) of the answers + β · CE(p) of all tokens that are there, arXiv 2212.10670."""

    def taught(mask: Tensor) -> Tensor:
        each = [(row, t) for row in range(ids.shape[0]) for t in places(mask, row)]
        return mean([surprise(logarithms(teacher[at]), logarithms(student[at])) for at in each])

    return 0.5 * responses(student, ids, learned) + 0.5 * taught(learned) + weight * taught(there)


def context(student: Tensor, told: Tensor, learned: Tensor, heard: Tensor, temperature: float) -> Tensor:
    """τ² KL(p^τ(· | definition, text so far) ‖ q^τ(· | text so far)) of the tokens of a response, the mean, arXiv 2306.09306.

    Args:
        told: Logits of the teacher, of other sequences with the same responses.
        learned: Where these are in the student's sequences.
        heard: Where they are in the teacher's.
    """
    found = []
    for row in range(student.shape[0]):
        for ours, theirs in zip(places(learned, row), places(heard, row), strict=True):
            found.append(kl(logarithms(told[row, theirs], temperature), logarithms(student[row, ours], temperature)))
    return temperature * temperature * mean(found)


def triplets(anchor: Sequence[Tensor], near: Sequence[Tensor], far: Sequence[Tensor], margin: float) -> Tensor:
    """max(0, D(a, p) − D(a, n) + margin), D = −cos, the mean, arXiv 2310.13332."""
    gaps = [-cosine(a, p) + cosine(a, n) + margin for a, p, n in zip(anchor, near, far, strict=True)]
    return mean([-minimum(-gap, gap * 0) for gap in gaps])
