"""What runs for a token, as hooks count it, against torch's counter of operations, and claims that say less than what ran."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import written
from slimbench.harness.measure.dynamic.hooks import Count, counted, matrices_of
from slimbench.harness.measure.dynamic.work import differences, measure, shared, spread, tokens_of_passes
from slimbench.harness.measure.dynamic.written import Guessed, Held, changes, held, repeated, unlikely
from slimbench.harness.measure.evidence import experts
from slimbench.harness.schema.work import Spread, WorkResult
from slimbench.methods.formats.attention.eviction import Eviction
from slimbench.methods.formats.attention.operators.interface import KeptCache
from slimbench.methods.formats.attention.pages import Pages
from slimbench.methods.formats.attention.patterns import Strided
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.draft.policy import Exit, Lookup
from slimbench.methods.formats.draft.speculation import LookupDrafter, ModelDrafter
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work
from tests.support import tiny
from tests.support.architectures import make
from tests.support.policies import fitted

BLOCKS, WIDTH = 4, 16


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | {"num_hidden_layers": BLOCKS, "vocab_size": 64}))).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def under(base: Any, policy: Policy | None) -> TransformersModel:
    model = copy.deepcopy(base)
    if policy:
        policy.install(model)
    return TransformersModel(model, "cpu")


def text(tokens: int = 60) -> Tensor:
    return torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(1))


POLICIES = [
    None,
    Window(2, 20),
    Eviction("knorm", 24),
    Eviction("random", 24),
    Pages(16, 4, 1),
    Strided(8),
    EarlyExit("maximum", 0.1, (1, 2)),
    Lookup(4, 2),
    Exit(3, 2),
]


class Pairs(TorchFunctionMode):
    """Queries times keys of each call of torch's attention, those that a mask takes out among them, as products; and the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.keys = 0, list[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.products += 2 * query.numel() * key.shape[2]
            self.keys.append(key.shape[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_hooks_count_what_torch_counts(base: Any, policy: Policy | None) -> None:
    """Passes of one token, and of a guess and what is checked with it."""
    model, compared = under(base, policy), list[int]()
    step = model.prefill(torch.cat([torch.tensor([[5, 6, 7, 8]]).repeat(1, 12), text()], 1), 40)
    for _ in range(30):
        # torch counts products of matrices, but not those inside the fused attention of a CPU
        with sdpa_kernel(SDPBackend.MATH), counted(model.module) as count, Pairs() as pairs, FlopCounterMode(display=False) as flops:
            step = model.decode_step(step)
        rows = sum(count.passes)
        assert (rows == 0) == (count.products == 0) == (flops.get_total_flops() == 0)
        assert count.reads == pairs.keys
        if rows:
            assert 2 * (count.products + pairs.products) == pytest.approx(flops.get_total_flops(), rel=1e-3)
            compared.append(rows)
    assert len(compared) >= 10
    assert (max(compared) > 1) == isinstance(policy, Lookup | Exit)


def test_enough_policies_are_held_against_torch() -> None:
    assert len({str(policy) for policy in POLICIES}) >= 8


def test_hooks_are_gone_after_it(base: Any) -> None:
    model = under(base, None)
    with counted(model.module):
        pass
    assert all(not module._forward_hooks for module in model.module.modules())


def test_bytes_of_the_cache_that_are_read_are_those_that_attentions_were_given(base: Any) -> None:
    token = 2 * 2 * WIDTH * 4
    pages = measure(under(base, Pages(16, 2, 1)), text(100), None, lambda *_: None)
    assert pages.cache_read_bytes and pages.cache_bytes and pages.cache_tokens
    assert pages.cache_read_bytes < pages.cache_bytes / 2, "few pages of all"
    assert pages.cache_read_bytes == pytest.approx(pages.cache_tokens.mean * BLOCKS * token, rel=1e-6)
    leaving = measure(under(base, EarlyExit("maximum", 0.0, (1, 2))), text(), None, lambda *_: None)
    assert leaving.blocks and leaving.blocks.mean < BLOCKS and leaving.cache_tokens and leaving.cache_read_bytes
    assert leaving.cache_read_bytes < leaving.cache_tokens.mean * (leaving.blocks.mean + 0.01) * token, "none in blocks that do not run"
    assert measure(under(base, Lookup(4, 2)), text(), None, lambda *_: None).cache_read_bytes is None


def test_a_window_reads_and_holds_what_it_says(base: Any) -> None:
    found = measure(under(base, Window(2, 20)), text().repeat(2, 1), Work(cache_tokens=22), lambda *_: None)
    assert found.cache_tokens == Spread(mean=23, p5=23, p50=23, p95=23), "with the token itself"
    assert found.cache_bytes == 22 * BLOCKS * 2 * 2 * WIDTH * 4
    assert found.blocks == Spread(mean=BLOCKS, p5=BLOCKS, p50=BLOCKS, p95=BLOCKS)
    assert found.flags == [] and found.tokens == 2 * 32 == found.passes and found.pass_rows == {"1": 64}
    assert found.active_parameters and found.active_parameters.mean == found.total_parameters


class Hoarder(Window):
    """A window that masks what it should drop."""

    def install(self, model: Any) -> None:
        super().install(model)
        model.new_cache = lambda: Hoard(BLOCKS)


class Hoard(KeptCache):
    """Keeps every key that it ever saw beside what its operators keep."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, 1 << 30)
        self.hoarded: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.hoarded += [key_states, value_states]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def stored_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.hoarded)


class Liar(Hoarder):
    """The same, and it tells what its operators keep alone."""

    def install(self, model: Any) -> None:
        super().install(model)
        model.new_cache = lambda: Hidden(BLOCKS)


class Hidden(Hoard):
    def stored_bytes(self) -> int:
        return KeptCache.stored_bytes(self)


class Closure(Window):
    """Keeps states of every token where no cache is looked at."""

    def install(self, model: Any) -> None:
        super().install(model)
        aside: list[Tensor] = []
        model.model.layers[0].register_forward_hook(lambda _, inputs, output: aside.append(inputs[0].clone()))
        model.model.norm.register_forward_hook(lambda *_: aside.__delitem__(slice(0, max(0, len(aside) - 64))))


@pytest.mark.parametrize("policy", [Liar(2, 20), Closure(2, 20)], ids=lambda policy: type(policy).__name__)
def test_a_cache_that_tells_less_than_it_keeps_is_told(base: Any, policy: Window) -> None:
    found = measure(under(base, policy), text(), Work(cache_tokens=22), lambda *_: None)
    (flag,) = found.flags
    assert re.fullmatch(r"holds \d+\.\d\d MB of a text, and tells \d+\.\d\d MB", flag)


def test_a_cache_that_frees_nothing_is_told(base: Any) -> None:
    found = measure(under(base, Hoarder(2, 20)), text(), Work(cache_tokens=22), lambda *_: None)
    claimed, told = found.flags
    assert claimed == "claims 22 tokens in the cache, holds the bytes of 92" and told == "holds 0.09 MB of a text, and tells 0.06 MB"


def test_attention_to_more_than_is_claimed_is_told(base: Any) -> None:
    found = measure(under(base, Window(2, 40)), text(), Work(cache_tokens=22), lambda *_: None)
    assert found.flags[0] == "claims 22 tokens in the cache, read 43"


def test_blocks_that_run_behind_a_mask_are_told(base: Any) -> None:
    """An exit that is chosen after all blocks have run."""
    found = measure(under(base, None), text(), Work(blocks=2.0, active_parameters=1000.0), lambda *_: None)
    assert found.flags[0] == "claims 2 blocks a token, ran 4"
    assert found.flags[1].startswith("claims 1,000 active parameters, multiplied ")
    honest = measure(under(base, EarlyExit("maximum", 0.0, (2,))), text(), Work(blocks=2.0), lambda *_: None)
    assert honest.flags == []


@pytest.mark.parametrize("claim", [None, Work(), Work(blocks=3.96), Work(cache_tokens=100)])
def test_slack_and_silence_are_no_lies(claim: Work | None) -> None:
    found = WorkResult(tokens=1, prompts=1, blocks=spread([4.0, 4.0]), cache_tokens=spread([101.0]), cache_bytes=1000)
    assert differences(found, claim, 10.0) == []


def test_scores_beside_narrow_keys_are_no_lie() -> None:
    found = WorkResult(tokens=1, prompts=1, cache_tokens=spread([100.0]), cache_bytes=1100)
    assert differences(found, Work(cache_tokens=100, score_bytes=1), 10.0) == []
    assert differences(found, Work(cache_tokens=100), 10.0) == ["claims 100 tokens in the cache, holds the bytes of 110"]
    assert differences(found, Work(cache_tokens=98, score_bytes=1), 10.0) != []


@pytest.mark.parametrize(
    ("claim", "bound"),
    [
        (Work(cache_tokens=10), 10),
        (Work(cache_tokens=10, keeps_written=True), 14),
        (Work(cache_tokens=10, whole_layers=0.25), 13.5),
        (Work(cache_tokens=10, whole_layers=0.25, keeps_written=True), 16.5),
    ],
)
def test_what_a_claim_of_a_cache_comes_to(claim: Work, bound: float) -> None:
    """Two texts of 20 tokens, behind each of which four were written; a token takes a hundred bytes in all layers."""
    for tokens, told in ((bound, False), (1.02 * bound + 1, True)):
        found = WorkResult(tokens=8, prompts=2, prompt_tokens=20, cache_bytes=round(100 * tokens))
        assert differences(found, claim, 100.0) == [f"claims {bound:,.0f} tokens in the cache, holds the bytes of {tokens:,.0f}"] * told
        found = WorkResult(tokens=8, prompts=2, prompt_tokens=20, cache_tokens=spread([tokens + 1.02]))
        assert differences(found, claim, 100.0) == [f"claims {bound:,.0f} tokens in the cache, read {tokens + 1.02:,.0f}"] * told


def test_a_token_that_reads_more_than_is_claimed_is_told_though_all_is_kept() -> None:
    """Of four layers one reads all, 22.5 tokens in the mean over a text: with 10 in the others 13.1. Bytes are those of all."""
    found = WorkResult(tokens=8, prompts=2, prompt_tokens=20, cache_bytes=2400, cache_tokens=spread([22.5, 10.0, 10.0, 10.0]))
    assert differences(found, Work(read_tokens=10, whole_layers=0.25), 100.0) == []
    found.cache_tokens = spread([22.5, 22.5, 10.0, 10.0])
    assert differences(found, Work(read_tokens=10, whole_layers=0.25), 100.0) == ["claims to read 13 tokens, read 16"]
    assert differences(found, Work(read_tokens=10), 100.0) == ["claims to read 10 tokens, read 22"]
    found.pass_rows = {"3": 4}
    assert differences(found, Work(read_tokens=10, whole_layers=0.25), 100.0) == [], "calls of passes of several tokens are not weighed"


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen2-moe"])
def test_experts_that_a_token_was_sent_to_are_counted(architecture: str) -> None:
    """Two of four in each block, and what is not sent anywhere runs for all; a claim of fewer is told."""
    module = make(architecture)
    ids = torch.randint(0, module.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    found = measure(TransformersModel(module, "cpu"), ids, Work(experts=2), lambda *_: None)
    assert found.experts == Spread(mean=2, p5=2, p50=2, p95=2) and found.flags == []
    one = sum(part[0].numel() for name, part in module.named_parameters() if name.rpartition(".")[0].endswith(".experts"))
    plain = sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, torch.nn.Linear))
    assert found.total_parameters == plain + 4 * one and found.active_parameters
    assert found.active_parameters.mean == plain + 2 * one
    assert found.calls == pytest.approx({"1": found.tokens})
    assert differences(found, Work(experts=1), 0.0) == ["claims 1 experts a token, ran 2"]


def test_stacks_of_matrices_that_a_policy_brings_are_no_experts(base: Any) -> None:
    """Codes, maps and projections: no token is sent to some of them."""
    plain = sum(matrix.parameters for matrix in matrices_of(base))
    for name, policy in fitted(BLOCKS, 64, 4, 2).items():
        model = under(base, policy)
        assert experts(model.module) == [] and sum(matrix.parameters for matrix in matrices_of(model.module)) >= plain, name
        assert measure(model, text(30), None, lambda *_: None).experts is None


def test_spreads_are_quantiles() -> None:
    assert spread([float(x) for x in range(101)]) == Spread(mean=50, p5=5, p50=50, p95=95)


def test_a_pass_is_shared_out_among_the_tokens_that_it_gave() -> None:
    steps = [Count(passes=[4], products=400, blocks=8), Count(), Count(passes=[1], products=100, blocks=2)]
    assert [(share.blocks, share.products) for share in shared(steps)] == [(4, 200), (4, 200), (2, 100)]


def test_passes_give_their_own_token_and_those_of_steps_that_ran_nothing() -> None:
    steps = [Count(passes=[4]), Count(), Count(), Count(passes=[4]), Count(passes=[1]), Count()]
    assert tokens_of_passes(steps) == [3, 1, 2]


@pytest.mark.parametrize("policy", [None, Lookup(4, 2), Exit(3, 2)], ids=str)
def test_passes_and_calls_add_up(base: Any, policy: Policy | None) -> None:
    """What passes gave is all tokens, and the shares of the models that ran are the products of the matrices by their rows."""
    looping = torch.tensor([[5, 6, 7, 8]]).repeat(1, 12)
    found = measure(under(base, policy), torch.cat([looping, text(48)]), None, lambda *_: None, 25)
    assert found.tokens == 2 * 24 == sum(int(tokens) * count for tokens, count in found.pass_tokens.items())
    assert sum(found.pass_tokens.values()) == found.passes
    assert found.active_parameters and found.total_parameters
    products = sum(int(rows) * share for rows, share in found.calls.items()) * found.total_parameters
    assert products == pytest.approx(found.tokens * found.active_parameters.mean)
    if policy is None:
        assert found.calls == {"1": 48.0} and found.pass_tokens == {"1": 48}
    if isinstance(policy, Exit):
        assert set(found.calls) >= {"1", "4"} and found.calls["1"] > found.passes / 2, "half of the blocks and a head guess, token by token"


def beside(base: Any, blocks: int, tokens: int = 3) -> TransformersModel:
    """The model with one of so many of its blocks beside it in half of the bytes, which guesses."""
    model = copy.deepcopy(base)
    model.draft = copy.deepcopy(base).bfloat16()
    model.draft.model.layers, model.draft.config.num_hidden_layers = model.draft.model.layers[:blocks], blocks
    model.drafter = ModelDrafter(model, tokens, model.draft)
    loaded = TransformersModel(model, "cpu")
    loaded.slots = ["draft"]
    return loaded


def test_calls_and_bytes_of_a_draft_model_are_its_own(base: Any) -> None:
    looping = torch.tensor([[5, 6, 7, 8]]).repeat(1, 12)
    found = measure(beside(base, 2), torch.cat([looping, text(48)]), None, lambda *_: None, 25)
    rows = {int(rows): count for rows, count in found.pass_rows.items()}
    assert found.passes and found.passes == sum(rows.values()) < found.tokens and found.draft_passes
    assert found.draft_passes == sum((size - 1) * count for size, count in rows.items()), "each guess is a pass of the draft"
    block = sum(parameter.numel() for parameter in base.model.layers[0].parameters() if parameter.dim() == 2)
    head = base.lm_head.weight.numel()
    assert found.part_bytes == {"model": 4 * (BLOCKS * block + head), "draft": 2 * (2 * block + head)}
    assert found.read_bytes == {
        "model": found.passes * found.part_bytes["model"],
        "draft": found.draft_passes * found.part_bytes["draft"],
    }
    assert found.calls == {str(size): pytest.approx(count) for size, count in rows.items()}, "of the model alone"
    assert found.cache_bytes and found.draft_cache_bytes
    assert found.draft_cache_bytes == pytest.approx(found.cache_bytes / 5, rel=0.1), "half of the blocks in half of the bytes"


def test_a_matrix_is_read_in_each_call_and_one_that_is_left_out_in_none(base: Any) -> None:
    found = measure(under(base, EarlyExit("maximum", 0.0, (2,))), text(), None, lambda *_: None)
    plain = measure(under(base, None), text(), None, lambda *_: None)
    assert plain.read_bytes == {"model": plain.tokens * plain.part_bytes["model"]} and plain.draft_passes is plain.draft_cache_bytes is None
    assert found.part_bytes == plain.part_bytes and found.read_bytes["model"] < 0.75 * plain.read_bytes["model"]


class Credulous(LookupDrafter):
    """Takes every guess."""

    def chosen(self, text: list[int], guesses: list[int], cache: Any, drafted: Any = None) -> list[int]:
        return [*guesses, super().chosen(text, guesses, cache)[-1]]


class Wild(Credulous):
    """Guesses the next ids, whatever the text, and takes them."""

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        guesses = [(text[-1] + step) % 64 for step in range(1, 1 + min(self.tokens, most))]
        return guesses, self.chosen(text, guesses, cache)


@pytest.mark.parametrize("beside", [None, Window(2, 20)], ids=str)
def test_a_draft_that_takes_every_guess_is_told(base: Any, beside: Policy | None) -> None:
    """Beside another policy too: the text is held against what that writes, not against dense."""

    def found(drafter: type[LookupDrafter]) -> WorkResult:
        model = copy.deepcopy(base)
        if beside:
            beside.install(model)
        model.drafter = drafter(model, 4, 2)
        loaded = TransformersModel(model, "cpu")
        loaded.slots = ["cache", "draft"] if beside else ["draft"]
        return measure(loaded, torch.cat([torch.tensor([[5, 6, 7, 8]]).repeat(1, 12), text(48)]), None, lambda *_: None, 25)

    honest, lie = found(LookupDrafter), found(Wild)
    assert honest.equal == 1 and honest.flags == [] and honest.parted_by_rounding == 0 and (honest.passes or 0) < honest.tokens
    assert lie.equal is not None and lie.equal < 0.5 and (lie.passes or 0) < lie.tokens / 3
    (flag,) = lie.flags
    told = re.fullmatch(r"guesses changed the text: (\d+\.\d)% of the tokens are none that the model would choose", flag)
    assert told and 50 < float(told[1]) <= 100 * (1 - lie.equal) + 0.1


def test_without_guesses_nothing_is_written_twice(base: Any) -> None:
    found = measure(under(base, Window(2, 20)), text(), None, lambda *_: None)
    assert found.equal is found.parted_by_rounding is None


class Told:
    """Logits of bfloat16 for four tokens, one by one and together; it is known what went before."""

    def __init__(self, *values: float, together: tuple[float, ...] | None = None) -> None:
        self.values, self.seen = torch.tensor(values, dtype=torch.bfloat16), list[int]()
        self.computes_narrower = together is not None
        self.together = self.values if together is None else torch.tensor(together, dtype=torch.bfloat16)

    def extend(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        assert len(ids) == 1 and (state is None or ids.shape[1] == 1)
        self.seen += ids[0].tolist()
        return self.values.expand(1, ids.shape[1], -1), self

    def logits(self, ids: Tensor, start: int = 0) -> Tensor:
        return self.together.expand(1, ids.shape[1] - start, -1)


@pytest.mark.parametrize(
    ("values", "chosen", "count"),
    [
        ((20.0, 19.875, 3.0, 1.0), 1, 0),
        ((20.0, 19.875, 3.0, 1.0), 2, 1),
        ((20.0, 20.0, 20.0, 1.0), 2, 0),
        ((20.0, 20.0, 19.75, 1.0), 2, 0),
        ((20.0, 20.0, 19.5, 1.0), 2, 1),
        ((20.0, 19.0, 3.0, 1.0), 1, 1),
    ],
)
def test_rounding_explains_a_token_that_is_hardly_less_likely_than_the_likeliest(
    values: tuple[float, ...], chosen: int, count: int
) -> None:
    """At 20 a unit in the last place of bfloat16 is 0.125."""
    model: Any = Told(*values)
    assert unlikely(model, torch.tensor([[7, 8]]), torch.tensor([[0, 0, chosen]]), 2) == count
    assert model.seen == [7, 8, 0, 0], "behind what both have in common"


def test_as_much_as_a_pass_of_several_tokens_rounds_otherwise_is_let_pass() -> None:
    apart = (20.0, 19.0, 3.0, 1.0)
    for together, count in (((20.0, 19.0, 3.0, 1.0), 1), ((20.0, 20.0, 3.0, 1.0), 0), ((20.0, 18.0, 3.0, 1.0), 0)):
        model: Any = Told(*apart, together=together)
        assert unlikely(model, torch.tensor([[7, 8]]), torch.tensor([[0, 1]]), 1) == count
        model.computes_narrower = False
        assert unlikely(model, torch.tensor([[7, 8]]), torch.tensor([[0, 1]]), 1) == 1, "logits of the type that it computes in"


def test_what_is_likeliest_in_a_pass_of_as_many_tokens_is_the_models_own() -> None:
    """Three tokens came by passes of 1 + 2; at 20 a unit in the last place is 0.125, and the second lies eight units below."""
    for in_passes, count in (((20.0, 20.0, 3.0, 1.0), 0), ((20.0, 19.5, 3.0, 1.0), 1), ((20.0, 19.75, 3.0, 1.0), 0)):
        model: Any = Told(20.0, 19.0, 3.0, 1.0)
        own = torch.tensor([(20.0, 19.0, 3.0, 1.0), in_passes, (20.0, 19.0, 3.0, 1.0)], dtype=torch.bfloat16)
        model.in_passes = lambda prompt, written, passes, own=own: own
        assert unlikely(model, torch.tensor([[7, 8]]), torch.tensor([[0, 1, 0]]), 1, [(1, 1), (3, 2)]) == count
        assert unlikely(model, torch.tensor([[7, 8]]), torch.tensor([[0, 1, 0]]), 1) == 1, "of unknown passes"


class Knowing(LookupDrafter):
    """It guesses what was written before, every fifth token wrongly."""

    def __init__(self, model: Any, before: list[int]) -> None:
        super().__init__(model, 6, 2)
        self.before = before

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        known = [(token + (place % 5 == 4)) % 64 for place, token in enumerate(self.before)]
        guesses = known[len(text) : len(text) + min(self.tokens, most)]
        return guesses, self.chosen(text, guesses, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, Window(2, 30)], ids=["dense", "window"])
def test_passes_that_are_made_again_choose_what_was_written(base: Any, window: Policy | None, dtype: torch.dtype) -> None:
    """To the bit, and an accepted guess that the model would not choose is seen in them."""
    model = under(copy.deepcopy(base).to(dtype), window)
    guessing, prompt = copy.deepcopy(model.module), text(24)
    guessing.drafter = Knowing(guessing, [*prompt[0].tolist(), *model.unguessed(prompt, 40)[0].tolist()])
    drafted = TransformersModel(guessing, "cpu")
    step = drafted.prefill(prompt, 40)
    steps, tokens = [], [step.token]
    for _ in range(39):
        with counted(guessing) as count:
            step = drafted.decode_step(step)
        steps.append(count)
        tokens.append(step.token)
    written, passes = torch.cat(tokens, 1), list(zip([rows for one in steps for rows in one.passes], tokens_of_passes(steps), strict=True))
    assert sum(given for _, given in passes) == 39 and max(given for _, given in passes) > 1 and any(had > given for had, given in passes)
    assert torch.equal(model.in_passes(prompt, written, passes).argmax(-1), written[0])
    other = written.clone()
    other[0, 20] = (other[0, 20] + 1) % 64
    assert model.in_passes(prompt, other, passes)[20].argmax() == written[0, 20]


def test_each_token_behind_the_first_other_one_is_looked_at(base: Any) -> None:
    """A text that parts by rounding has to be the model's own from there on, too."""
    model, prompt = under(base, None), text(6)
    own = model.unguessed(prompt, 12)
    parted = torch.cat([own[:, :5], torch.full((1, 1), int(own[0, 5]) ^ 1)], 1)
    wild = torch.cat([parted, (own[:, 6:] + 7) % 64], 1)
    with torch.inference_mode():
        goes_on = torch.cat([parted, model.unguessed(torch.cat([prompt, parted], 1), 6)], 1)
    assert unlikely(model, prompt, own, 0) == 0
    assert unlikely(model, prompt, goes_on, 5) == 1 and unlikely(model, prompt, goes_on, 6) == 0
    assert unlikely(model, prompt, wild, 6) >= 5
    assert held(model, prompt, goes_on) == Held(12 - int((goes_on != own).sum()), int((goes_on != own).sum()), 1)


class Behind(EarlyExit):
    """An exit that still runs the feed-forward parts of all blocks, past all hooks."""

    def install(self, model: Any) -> None:
        super().install(model)
        blocks, inner = list(model.model.layers), model.forward

        def forward(*given: Any, **more: Any) -> Any:
            out = inner(*given, **more)
            states = torch.ones(1, 1, model.config.hidden_size)
            for block in blocks:
                states = block.mlp.forward(states)
            return out

        model.forward = forward


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": functional.linear,
    "bmm": lambda rows, weight: torch.bmm(rows[None], weight.T[None]),
    "einsum": lambda rows, weight: torch.einsum("bth,oh->bto", rows[None], weight),
    "matmul": lambda rows, weight: rows[None, None] @ weight.T,
    "baddbmm": lambda rows, weight: torch.baddbmm(torch.zeros(1, 1, len(weight)), rows[None], weight.T[None]),
}


@dataclass(frozen=True)
class Product(Behind):
    """The same by the weights alone."""

    way: str = "linear"

    def install(self, model: Any) -> None:
        EarlyExit.install(self, model)
        weights, inner = [block.mlp.up_proj.weight for block in model.model.layers], model.forward

        def forward(*given: Any, **more: Any) -> Any:
            for weight in weights:
                WAYS[self.way](torch.ones(1, weight.shape[1]), weight)
            return inner(*given, **more)

        model.forward = forward


@pytest.mark.parametrize("way", WAYS)
def test_products_past_all_hooks_are_told(base: Any, way: str) -> None:
    honest = measure(under(base, EarlyExit("maximum", 0.0, (2,))), text(), Work(blocks=2.0), lambda *_: None)
    (flag,) = measure(under(base, Product("maximum", 0.0, (2,), way=way)), text(), Work(blocks=2.0), lambda *_: None).flags
    assert honest.flags == [] and re.fullmatch(r"multiplies by [\d,]+ weights, of which layers were called for [\d,]+", flag)


def test_blocks_that_run_past_their_own_hooks_are_told(base: Any) -> None:
    """Their layers are called, and were not claimed."""
    honest = measure(under(base, EarlyExit("maximum", 0.0, (2,))), text(), None, lambda *_: None).active_parameters
    assert honest is not None
    claim = Work(blocks=2.0, active_parameters=honest.mean)
    (flag,) = measure(under(base, Behind("maximum", 0.0, (2,))), text(), claim, lambda *_: None).flags
    assert re.fullmatch(r"claims [\d,]+ active parameters, multiplied [\d,]+", flag)


class Patient(LookupDrafter):
    """Honest up to a place, where two tokens are said to be alike, and credulous from there on."""

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        guesses = [(text[-1] + step) % 64 for step in range(1, 1 + min(self.tokens, most))]
        chosen = self.chosen(text, guesses, cache)
        return (guesses, [*guesses, chosen[-1]]) if len(text) > 58 else (guesses, chosen)


def test_a_draft_that_waits_for_a_tie_is_told(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first other token is as likely as the likeliest, those behind it are not thereby."""
    model = copy.deepcopy(base)
    model.drafter = Patient(model, 4, 2)
    loaded = TransformersModel(model, "cpu")
    loaded.slots = ["draft"]
    seen: list[int] = []
    inner = written.as_likely

    def tied(logits: Tensor, chosen: Tensor) -> Tensor:
        found = inner(logits, chosen)
        seen.append(len(found))
        return torch.cat([torch.ones_like(found[:1]), found[1:]])

    monkeypatch.setattr(written, "as_likely", tied)
    found = measure(loaded, text(48), None, lambda *_: None, 25)
    assert seen and found.parted_by_rounding == 0
    (flag,) = found.flags
    assert flag.startswith("guesses changed the text: ")


def test_texts_that_part_by_rounding_are_not_changed_by_guesses() -> None:
    assert Held(10, 30).by_rounding and not Held(35, 5, 5).by_rounding and not Held(40, 0).by_rounding
    assert changes([Held(10, 30), Held(40, 0)]) == 0
    assert changes([Held(10, 30), Held(35, 5, 4)]) == 4 / 80


class Stocked(TransformersModel):
    """Writes some tokens while it reads the prompt, and hands them out for nothing."""

    def prefill(self, ids: Tensor, room: int = 32) -> Any:
        step = super().prefill(ids, room)
        self.stock = []
        for _ in range(room // 2):
            step = super().decode_step(step)
            self.stock.append(step.token)
        self.behind = step
        return step.__class__(self.stock.pop(0), step.state)

    def decode_step(self, step: Any) -> Any:
        if self.stock:
            return step.__class__(self.stock.pop(0), step.state)
        self.behind = super().decode_step(self.behind)
        return self.behind


def test_tokens_without_a_pass_are_told(base: Any) -> None:
    model = copy.deepcopy(base)
    Window(2, 20).install(model)
    (flag,) = measure(Stocked(model, "cpu"), text(), Work(cache_tokens=22), lambda *_: None).flags
    assert flag == "15 of 32 tokens came without a pass of the model"


def test_guesses_are_counted_text_by_text_as_passes_show_them(base: Any) -> None:
    asked = torch.cat([torch.tensor([[5, 6, 7, 8]]).repeat(1, 12), text(48)])

    def found(drafter: Any) -> WorkResult:
        model = copy.deepcopy(base)
        model.drafter = drafter(model, 4, 2)
        loaded = TransformersModel(model, "cpu")
        loaded.slots = ["draft"]
        return measure(loaded, asked, None, lambda *_: None, 25)

    counted, own = found(LookupDrafter), []
    for prompt in asked.split(1):
        model = copy.deepcopy(base)
        model.drafter = LookupDrafter(model, 4, 2)
        loaded = TransformersModel(model, "cpu")
        step = loaded.prefill(prompt, 25)
        for _ in range(24):
            step = loaded.decode_step(step)
        own.append((step.state.drafted, step.state.accepted))
    assert list(zip(counted.text_drafted, counted.text_accepted, strict=True)) == own
    assert sum(counted.text_passes) == counted.passes
    assert [24 - passes for passes in counted.text_passes] == counted.text_accepted, "each pass gives one token without a guess"
    assert measure(under(base, None), asked, None, lambda *_: None).text_drafted == []
    assert Guessed.of([5, 1, 3], [3, 1, 1]) == Guessed(passes=3, drafted=6, accepted=2)


def test_what_goes_round_is_told_by_its_runs_of_four() -> None:
    assert repeated([[1, 2, 3, 4, 5, 6, 7, 8]]) == 0 and repeated([[1, 2, 3], []]) is None
    assert repeated([[1, 2] * 5]) == 5 / 7, "of seven runs the first two are new"
    assert repeated([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0, "another text says nothing"
    assert repeated([[9] * 10, list(range(10))]) == 6 / 14


def test_the_prompt_is_no_part_of_what_goes_round(base: Any) -> None:
    model = under(base, None)
    asked = torch.tensor([[5, 6, 7, 8]]).repeat(1, 12)
    (written,) = model.generate(asked, 25)
    assert measure(model, asked, None, lambda *_: None, 25).repeated_4grams == repeated([written])
