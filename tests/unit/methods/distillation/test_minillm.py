"""The policy gradient of MiniLLM against the exact gradient of the divergence of whole texts, all of which a toy can write."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.base import DenseModel
from slimbench.methods.core.learning.rollouts import rollout
from slimbench.methods.distillation.minillm import MiniLLM, policy_loss
from tests.support import tiny
from tests.unit.methods.distillation.test_gkd import pair, sharp

__all__ = ["pair"]
WORDS, LENGTH, BATCHES, BATCH = 5, 4, 100, 1000
IDS = tiny.tokens(8, 32).ids[:2, :16]


class Toy:
    """Tables of the logits of a word after the one before it; the last row is the beginning of a text."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = nn.Parameter(torch.randn(WORDS + 1, WORDS, generator=generator))
        self.teacher = 1.5 * torch.randn(WORDS + 1, WORDS, generator=generator)

    def logits(self, table: Tensor, ids: Tensor) -> Tensor:
        """Of all positions of texts [n, 1 + LENGTH] whose first id stands for their beginning."""
        states = torch.cat([torch.full_like(ids[:, :1], WORDS), ids[:, 1:]], 1)
        return table[states]

    def draw(self, count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Texts of the mixture, and the weight of each whole text for the student."""
        q, p = self.student.detach().softmax(-1), self.teacher.softmax(-1)
        mixed = share * p + (1 - share) * q
        state, ids, weight = torch.full((count,), WORDS), [torch.zeros(count, dtype=torch.int64)], torch.ones(count)
        for _ in range(LENGTH):
            word = torch.multinomial(mixed[state], 1, generator=generator).squeeze(1)
            weight, state = weight * q[state, word] / mixed[state, word], word
            ids.append(word)
        return torch.stack(ids, 1), weight[:, None].expand(-1, 1 + LENGTH)

    def gradient(self, ids: Tensor, weights: Tensor, **settings: Any) -> Tensor:
        written = torch.ones_like(ids, dtype=torch.bool)
        written[:, 0] = False
        loss = policy_loss(self.logits(self.student, ids), self.logits(self.teacher, ids), ids, written, weights, **settings)
        (found,) = torch.autograd.grad(loss, self.student)
        return found

    def exact(self) -> Tensor:
        """∇ Σ_y q(y) log q(y)/p(y) over all texts."""
        texts = torch.tensor([(0, *words) for words in product(range(WORDS), repeat=LENGTH)])
        logs = []
        for table in (self.student.double(), self.teacher.double()):
            chosen = self.logits(table, texts)[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None]).squeeze(-1)
            logs.append(chosen.sum(1))
        (found,) = torch.autograd.grad((logs[0].exp() * (logs[0] - logs[1])).sum(), self.student)
        return found


def sampled(toy: Toy, share: float, **settings: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the gradient, over batches."""
    generator = torch.Generator().manual_seed(1)
    found = torch.stack([toy.gradient(*toy.draw(BATCH, share, generator), **settings) for _ in range(BATCHES)]).double()
    return found.mean(0), found.std(0) / BATCHES**0.5


@pytest.mark.parametrize(("share", "single_step"), [(0.0, True), (0.0, False), (0.3, True)])
def test_the_mean_of_many_draws_is_the_exact_gradient(share: float, single_step: bool) -> None:
    toy = Toy()
    mean, error = sampled(toy, share, length_norm=False, single_step=single_step)
    apart = (mean - toy.exact()).abs() / error.clamp_min(1e-9)
    assert float(apart.max()) < 4.5, apart
    assert float((toy.exact().abs() / error).max()) > 30, "the gradient is far from zero"


def test_the_next_token_alone_is_another_gradient_and_its_sum_has_less_variance() -> None:
    toy = Toy()
    exact, (_, error) = toy.exact(), sampled(toy, 0.0, length_norm=False)
    ids, _ = toy.draw(20_000, 0.0, torch.Generator().manual_seed(2))
    q, p = (toy.logits(table, ids)[:, :-1].log_softmax(-1) for table in (toy.student, toy.teacher))
    (short,) = torch.autograd.grad((q.exp() * (q - p)).sum(-1).sum(1).mean(), toy.student)
    assert float(((short - exact).abs() / error).max()) > 10, "what GKD learns at β = 1 is not the divergence of texts"
    assert float(error.norm()) < float(sampled(toy, 0.0, length_norm=False, single_step=False)[1].norm())


def test_each_token_weighs_by_itself_in_the_papers_estimate_which_is_nearly_right() -> None:
    toy = Toy()
    generator, parts = torch.Generator().manual_seed(3), []
    q, p = toy.student.detach().softmax(-1), toy.teacher.softmax(-1)
    mixed = 0.2 * p + 0.8 * q
    for _ in range(BATCHES):
        ids, _ = toy.draw(BATCH, 0.2, generator)
        states = torch.cat([torch.full_like(ids[:, :1], WORDS), ids[:, 1:-1]], 1)
        single = q[states, ids[:, 1:]] / mixed[states, ids[:, 1:]]
        parts.append(toy.gradient(ids, torch.cat([torch.ones(BATCH, 1), single], 1), length_norm=False))
    mean, exact = torch.stack(parts).double().mean(0), toy.exact()
    alike = float(functional.cosine_similarity(mean.flatten(), exact.flatten(), 0))
    print(f"bias of one-step weights: {float((mean - exact).norm() / exact.norm()):.3f} of the gradient, cosine {alike:.4f}")
    assert alike > 0.97


def test_what_follows_is_divided_by_its_length_and_what_was_not_written_counts_for_nothing() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 6, WORDS, requires_grad=True), torch.randn(2, 6, WORDS)
    ids, weights = torch.randint(WORDS, (2, 6)), torch.rand(2, 6)
    written = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    policy_loss(logits, teacher, ids, written, weights).backward()
    wanted = torch.zeros_like(logits)
    for n in range(2):
        places = [t for t in range(1, 6) if written[n, t]]
        for t in places:
            rewards = []
            for later in (u for u in places if u > t):
                log = [of[n, later - 1].log_softmax(-1)[ids[n, later]] for of in (teacher, logits.detach())]
                rewards.append(float(log[0] - log[1]))
            ahead = sum(rewards) / len(rewards) if rewards else 0.0
            row = logits.detach()[n, t - 1].clone().requires_grad_(True)
            q, p = row.log_softmax(-1), teacher[n, t - 1].log_softmax(-1)
            (float(weights[n, t]) * ((q.exp() * (q - p)).sum() - ahead * q[ids[n, t]]) / 2).backward()
            assert row.grad is not None
            wanted[n, t - 1] += row.grad
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-6)


def test_draws_from_the_mixture_are_weighed(pair: DenseModel) -> None:
    student, teacher = sharp(pair), pair.load_original(dtype=torch.float32)
    torch.manual_seed(0)
    drawn = rollout(student, IDS[:1, :6].expand(200, -1), 2, other=teacher, share=0.4)
    with torch.no_grad():
        q, p = (model(drawn.ids).logits[:, 5:-1].softmax(-1).gather(-1, drawn.ids[:, 6:, None]).squeeze(-1) for model in (student, teacher))
    wanted = torch.where(drawn.written[:, 6:], q / (0.4 * p + 0.6 * q), 1.0)
    torch.testing.assert_close(drawn.weights[:, 6:], wanted, rtol=1e-3, atol=1e-4)
    assert bool((drawn.weights[:, :6] == 1).all()) and float(drawn.weights.std()) > 0.05


def test_the_text_at_hand_is_learned_too(pair: DenseModel) -> None:
    student, teacher = pair.load(dtype=torch.float32), pair.load_original(dtype=torch.float32)
    losses = []
    for weight in (0.0, 2.0):
        method = MiniLLM(text_weight=weight, steps=4, length=16, batch_size=2, prompt_tokens=6)
        (lesson,) = method.lessons(student, teacher, pair)
        torch.manual_seed(5)
        losses.append(float(lesson.loss(IDS)))
    with torch.no_grad():
        logits = student(IDS).logits[:, 5:-1].double().flatten(0, 1)
    assert losses[1] - losses[0] == pytest.approx(2 * float(functional.cross_entropy(logits, IDS[:, 6:].flatten())), rel=1e-4)


def test_a_ratio_far_from_1_stops_what_would_take_it_farther() -> None:
    """As in PPO: −max of A ρ and A clip(ρ), with the advantage A = R and ρ = w · exp(log q − log q before)."""
    generator = torch.Generator().manual_seed(4)
    logits, teacher = (torch.randn(5, 8, 7, generator=generator) for _ in range(2))
    ids, written = torch.randint(0, 7, (5, 8), generator=generator), torch.ones(5, 8, dtype=torch.bool)
    weights = 0.3 + 1.4 * torch.rand(5, 8, generator=generator)
    gradients = []
    for clip in (0.2, None):
        ours = logits.clone().requires_grad_(True)
        policy_loss(ours, teacher, ids, written, weights, clip=clip).backward()
        gradients.append(ours.grad)
    theirs = logits.clone().requires_grad_(True)
    q, p = theirs[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1)
    chosen = q.gather(-1, ids[:, 1:, None])[..., 0]
    reward = (p.gather(-1, ids[:, 1:, None])[..., 0] - chosen).detach()
    total, stopped = torch.zeros(()), 0
    for n in range(5):
        for t in range(7):
            rest = reward[n, t + 1 :]
            advantage = rest.mean() if len(rest) else torch.zeros(())
            ratio = weights[n, t + 1] * (chosen[n, t] - chosen[n, t].detach()).exp()
            total = total + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)) / 5
            stopped += bool((-advantage * ratio < -advantage * ratio.clamp(0.8, 1.2)).item())
            total = total + weights[n, t + 1] * (q[n, t].exp() * (q[n, t] - p[n, t])).sum() / 5
    total.backward()
    torch.testing.assert_close(gradients[0], theirs.grad)
    assert stopped > 2 and not torch.allclose(gradients[0], gradients[1], atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", [0.0, 0.6])
def test_a_lesson_is_the_policy_loss_of_what_was_drawn_behind_the_prompts(mix: float, pair: DenseModel) -> None:
    student, teacher = pair.load(dtype=torch.float32).requires_grad_(True), pair.load_original(dtype=torch.float32)
    method = MiniLLM(text_weight=0.0, teacher_mix=mix, steps=4, length=16, batch_size=2, prompt_tokens=6)
    (lesson,) = method.lessons(student, teacher, pair)
    torch.manual_seed(7)
    lesson.loss(IDS).backward()
    found = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
    student.zero_grad()
    torch.manual_seed(7)
    drawn = rollout(student, IDS[:, :6], 10, other=teacher, share=mix)
    logits, wanted = student(drawn.ids).logits, teacher(drawn.ids).logits.detach()
    (policy_loss(logits, wanted, drawn.ids, drawn.written, drawn.weights, clip=0.2) * 2 / drawn.written.sum()).backward()
    assert len(found) > 8
    for name, value in student.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-6)
    torch.manual_seed(7)
    assert torch.equal(rollout(student, IDS[:, :6], 10).ids, drawn.ids) is (mix == 0.0)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (({"teacher_mix": 1.0}, "teacher_mix must be at least 0"), ({"text_weight": -1.0}, "text_weight must not be")):
        made: Any = MiniLLM
        with pytest.raises(ValueError, match=message):
            made(**settings)
