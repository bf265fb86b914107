"""What runs for tokens while they are scored, against tokens one by one, attempts that were cut off, and policies that lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import scored, work
from slimbench.harness.measure.dynamic.hooks import counted
from slimbench.harness.schema.work import ScoredWork
from slimbench.harness.stages import compress, quality
from slimbench.harness.store.partial import Journal, Part
from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth import exits
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.depth.router import Router
from slimbench.methods.formats.depth.rows import run_block
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.policy import Policy
from tests.support.policies import sharp
from tests.support.policies import under as installed
from tests.unit.measure.test_lies import Silent, step_overrides

BLOCKS, VOCABULARY = 4, 64


@pytest.fixture(scope="module")
def base() -> Any:
    return sharp(num_hidden_layers=BLOCKS, vocab_size=VOCABULARY)


def under(base: Any, policy: Policy) -> TransformersModel:
    loaded = installed(base, policy)
    loaded.slots = [policy.slot]
    return loaded


def windows(count: int = 3, tokens: int = 40) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(4))


def routers() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {f"{block}.weight": torch.randn(64, generator=draw) / 4 for block in (1, 2)} | {
        f"{block}.bias": torch.zeros(1) for block in (1, 2)
    }


def while_scored(model: TransformersModel, ids: Tensor, part: Part | None = None) -> tuple[ScoredWork | None, list[str]]:
    counting = scored.counting(model, part or Part())
    assert counting is not None
    for window in ids.split(1):
        kept = counting.once(window.numpy().tobytes(), 1, lambda window=window: {"nll": float(model.token_logprobs(window).mean())})
        assert "nll" in kept
    return counting.result()


def one_by_one(model: TransformersModel, ids: Tensor) -> list[tuple[int, int]]:
    """Blocks and products of each token, which goes through the cache alone."""
    ran = []
    for window in ids.split(1):
        state = None
        for token in window.split(1, 1):
            with counted(model.module) as count:
                _, state = model.extend(token, state)
            ran.append((count.blocks, count.products))
    return ran


POLICIES = [EarlyExit("maximum", 0.2, (1, 2, 3)), EarlyExit("state", 0.5, (1, 3)), Router(0.5, routers())]


@pytest.mark.parametrize("policy", POLICIES, ids=["maximum", "state", "router"])
def test_whole_windows_are_counted_as_their_tokens_one_by_one(base: Any, policy: Policy) -> None:
    found, flags = while_scored(under(base, policy), windows())
    ran = one_by_one(under(base, policy), windows())
    blocks = [count for count, _ in ran]
    assert found and flags == [] and found.tokens == 3 * 40 == len(ran) and len(set(blocks)) > 1
    assert found.by_blocks == {str(count): amount for count, amount in sorted(Counter(blocks).items())}
    assert found.blocks == pytest.approx(np.mean(blocks))
    assert [found.blocks_p5, found.blocks_p95] == pytest.approx(np.percentile(blocks, [5, 95]).tolist())
    assert found.active_parameters == pytest.approx(np.mean([products for _, products in ran]))


def test_tokens_that_were_scored_and_tokens_that_were_written_run_otherwise(base: Any) -> None:
    """The work of one population says nothing of the perplexity of the other."""
    apart = []
    for threshold in (0.1, 0.2, 0.3, 0.4):
        model = under(base, EarlyExit("maximum", threshold, (1, 2, 3)))
        written = work.measure(model, windows(2, 20), None, lambda *_: None)
        found, _ = while_scored(model, windows())
        assert found and written.blocks
        apart.append(found.blocks - written.blocks.mean)
    assert max(map(abs, apart)) > 0.2


def test_an_attempt_that_was_cut_off_counts_all_of_its_windows(base: Any) -> None:
    policy, ids = POLICIES[0], windows(4)
    whole, _ = while_scored(under(base, policy), ids)
    first = Journal("counted-while-scored", {})
    while_scored(under(base, policy), ids[:2], first.part("text", "windows"))
    again = Journal("counted-while-scored", {})
    model = under(base, policy)
    assert while_scored(model, ids, again.part("text", "windows"))[0] == whole
    assert sum(model.module.model.exits.left.values()) == 2 * 40, "two windows were not scored again"


def test_windows_of_which_nobody_counted_what_ran_are_scored_again(base: Any) -> None:
    ids = windows(1)
    Journal("scored-alone", {}).part("text", "windows").once(ids.numpy().tobytes(), 1, lambda: {"nll": 0.0})
    found, _ = while_scored(under(base, POLICIES[0]), ids, Journal("scored-alone", {}).part("text", "windows"))
    assert found and found.tokens == 40


def test_a_policy_that_says_less_than_what_ran_is_told(base: Any) -> None:
    model = under(base, EarlyExit("maximum", 1e9, (1,)))
    model.module.model.exits.tokens_by_blocks = lambda: {1: 10 * next(calls)}
    calls = iter(range(100))
    found, flags = while_scored(model, windows(1))
    assert found and found.blocks == BLOCKS and found.by_blocks == {} and found.blocks_p5 is None
    assert flags == ["claims 1 blocks a token, ran 4 where texts were scored"]


def test_an_exit_that_is_chosen_after_all_blocks_have_run_is_told(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense compute behind a mask: the same logits and the same word of the policy at a threshold that some reach, and no block saved."""

    def everything(block: Any, hidden: Tensor, active: Tensor, *more: Any) -> Tensor:
        made = run_block(block, hidden, torch.arange(hidden.shape[1]), *more)
        return hidden.index_copy(1, active, made[:, active])

    policy, ids = POLICIES[0], windows(1)
    honest = under(base, policy)
    wanted, (found, none) = honest.logits(ids), while_scored(honest, ids)
    monkeypatch.setattr(exits, "run_block", everything)
    lie = under(base, policy)
    torch.testing.assert_close(lie.logits(ids), wanted, rtol=1e-4, atol=1e-4)
    masked, flags = while_scored(lie, ids)
    assert found and masked and none == [] and found.blocks < masked.blocks == BLOCKS
    assert flags == [f"claims {found.blocks:.4g} blocks a token, ran {BLOCKS} where texts were scored"]


def test_where_every_token_runs_the_same_nothing_is_watched(base: Any) -> None:
    assert scored.counting(under(base, Lookup(3, 2)), Part()) is None
    model = under(base, POLICIES[0])
    while_scored(model, windows(1))
    assert all(not layer._forward_hooks for layer in model.module.model.layers.modules()), "hooks are gone after it"


@dataclass(frozen=True)
class Leaves(Method):
    """A dense model whose tokens leave behind the first block where that is sure enough."""

    name, family, produces = "leaves", "test", "policy"
    citation = Citation("none", 2024)

    threshold: float = 0.5

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        policies.save(EarlyExit("maximum", self.threshold, (1,)), dense, out)
        return Claim("policy")


def test_the_stage_counts_the_windows_of_its_first_corpus(overrides: list[str]) -> None:
    found = {}
    for threshold in (0.0, 1e9):
        config = resolve([*overrides, *step_overrides([f"{__name__}.Leaves(threshold={threshold})"])])
        compress.run(config, f"leaves-{threshold}", Silent())
        result = quality.run(config, f"leaves-{threshold}", None, Silent())
        assert result.work and result.work.scored
        found[threshold] = result.work.scored
        assert result.work.scored.tokens == sum(len(text.window_nll) * (text.labels_per_window + 1) for text in result.perplexity[:1])
    assert found[0.0].blocks == 1 == found[0.0].blocks_p95 and found[1e9].blocks > 1 and len(found[1e9].by_blocks) == 1
    assert found[0.0].active_parameters < found[1e9].active_parameters
