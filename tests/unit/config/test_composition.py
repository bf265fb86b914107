"""Which policies act together: what may not is one line before anything runs, and says why."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

from slimbench.harness.config import parse
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entries, entry
from slimbench.methods.base import Claim
from slimbench.methods.formats.policy import FORMAT, Acts
from slimbench.methods.work import Work

ACTING = {found.name: found.method for found in entries() if isinstance(found.method, Acts)}
OF = {slot: {name for name, method in ACTING.items() if method.slot == slot} for slot in ("attention", "cache", "depth", "draft")}
LINEAR = {"linear-elu", "linear-efficient", "performer", "random-features", "hedgehog", "t2r", "lolcats"}
OWN = {"streaming-llm", "window-512", "h2o", "tova", "knorm", "snapkv", "spatten", "random-eviction", "mla-128"}
ROLLING = {"streaming-llm", "window-512", "snapkv", "mla-128", "prefix-tuning"}
"""Caches that go on from several tokens in one pass as from one after the other, and can go back."""
BY_WEIGHTS = {"h2o", "tova", "snapkv", "spatten"}
BY_QUERIES = {"combiner", "sinkhorn", "hyperattention"}


def refusal(*names: str) -> str | None:
    """What a pipeline of shipped methods is refused with."""
    try:
        parse._check_order([(name, entry(name).method) for name in names])
    except ConfigError as error:
        return str(error)
    return None


REFUSED = [
    ("streaming-llm", "h2o", "both decide on the slot cache; leave one of the two out"),
    ("window-512", "kv-int8", "both decide on the slot cache; leave one of the two out"),
    ("longformer", "quest", "both decide on the slot attention; leave one of the two out"),
    ("calm", "dola", "both decide on the slot depth; leave one of the two out"),
    ("prompt-lookup", "draft-model", "both decide on the slot draft; leave one of the two out"),
    ("h2o", "prompt-lookup", "the cache 'h2o' cannot roll back a rejected draft"),
    ("random-eviction", "self-speculation", "the cache 'random-eviction' cannot roll back a rejected draft"),
    ("kv-int8", "draft-model", "the cache 'kv-int8' cannot roll back a rejected draft"),
    ("kv-kivi-2bit", "prompt-lookup", "the cache 'kv-kivi-2bit' cannot roll back a rejected draft"),
    ("calm", "self-speculation", "both decide which blocks run for a token"),
    ("skiplayer", "self-speculation", "both decide which blocks run for a token"),
    ("dola", "self-speculation", "both decide which blocks run for a token"),
    ("token-reduction", "self-speculation", "both decide which blocks run for a token"),
    ("calm", "h2o", "blocks that 'calm' skips have no attention weights, which 'h2o' needs of every token"),
    ("skiplayer", "snapkv", "blocks that 'skiplayer' skips have no attention weights, which 'snapkv' needs of every token"),
    ("calm", "sinkhorn", "blocks that 'calm' skips have no queries, which 'sinkhorn' needs of every token"),
    (
        "longformer",
        "token-reduction",
        "'longformer' counts positions by the tokens that a block holds, and 'token-reduction' leaves later blocks fewer",
    ),
    (
        "token-reduction",
        "kv-int8",
        "'token-reduction' asks for a whole prompt and an empty cache; 'kv-int8' takes a prompt in pieces, or is never empty",
    ),
    ("performer", "kv-int8", "with 'performer' there is no KV cache left"),
    ("lolcats", "h2o", "with 'lolcats' there is no KV cache left"),
    ("longformer", "streaming-llm", "each brings an attention of its own, and a layer has one"),
    ("longformer", "kv-int8", "'longformer' attends to keys and values that it keeps itself, not to those of 'kv-int8'"),
]


@pytest.mark.parametrize(("first", "second", "reason"), REFUSED, ids=lambda part: part if " " not in part else "")
def test_what_does_not_act_together_is_refused_in_one_line_whatever_the_order(first: str, second: str, reason: str) -> None:
    assert refusal(first, second) == f"'{second}' cannot follow '{first}': {reason}"
    assert refusal(second, first) == f"'{first}' cannot follow '{second}': {reason}"


ORDERS = [
    (
        ("prompt-lookup", "streaming-llm"),
        "'streaming-llm' cannot follow 'prompt-lookup': a draft guesses for all that acts, so it comes last",
    ),
    (("streaming-llm", "calm"), "'calm' cannot follow 'streaming-llm': it reads huggingface or edited, not policy"),
    (("streaming-llm", "gptq"), "'gptq' cannot follow 'streaming-llm': it reads huggingface or edited, not policy"),
    (("streaming-llm", "prompt-lookup", "gptq"), "'gptq' cannot follow 'prompt-lookup': it reads huggingface or edited, not policy"),
    (("h2o", "lora"), "'lora' cannot follow 'h2o': no weight learns with 'h2o' in force"),
    (("calm", "streaming-llm", "lora"), "'lora' cannot follow 'streaming-llm': no weight learns with 'calm' in force"),
    (("rtn-4bit", "linear-elu", "lora"), "'lora' cannot follow 'linear-elu': below the policy lies packed, whose weights do not learn"),
    (("lolcats", "prompt-lookup", "lora"), "'lora' cannot follow 'prompt-lookup': a draft guesses for all that acts, so it comes last"),
]
RIGHT = [
    ("streaming-llm", "prompt-lookup"),
    ("calm", "streaming-llm"),
    ("gptq", "streaming-llm"),
    ("gptq", "streaming-llm", "prompt-lookup"),
    ("lora", "h2o"),
    ("lora", "calm", "streaming-llm"),
    ("lora", "rtn-4bit", "linear-elu"),
    ("lolcats", "lora", "prompt-lookup"),
]


@pytest.mark.parametrize(("steps", "what", "right"), [(*order, right) for order, right in zip(ORDERS, RIGHT, strict=True)], ids=str)
def test_a_wrong_order_names_the_one_that_would_do(steps: tuple[str, ...], what: str, right: tuple[str, ...]) -> None:
    assert refusal(*steps) == f"{what}; write method=[{','.join(right)}]"
    assert refusal(*right) is None


@pytest.mark.parametrize(
    "steps",
    [
        ("gptq", "streaming-llm"),
        ("lolcats", "lora"),
        ("longformer", "lora", "prompt-lookup"),
        ("sparse-strided", "prompt-lookup"),
        ("performer", "self-speculation"),
        ("calm", "kv-int8"),
        ("calm", "knorm"),
        ("h2o", "dola"),
        ("skiplayer", "quest"),
        ("dola", "draft-model"),
        ("gptq", "token-reduction", "prompt-lookup"),
        ("calm", "streaming-llm", "prompt-lookup"),
        ("layerskip", "streaming-llm", "self-speculation"),
    ],
    ids="+".join,
)
def test_what_acts_together_is_planned(steps: tuple[str, ...]) -> None:
    assert refusal(*steps) is None


def test_each_pair_of_shipped_methods_is_allowed_or_refused_as_the_table_says() -> None:
    """The table of `docs/policies.md`, stated once more, over all pairs."""
    for first, second in itertools.combinations(sorted(ACTING), 2):
        by_slot = {ACTING[name].slot: name for name in (first, second)}
        attention, cache, depth, draft = (by_slot.get(slot) for slot in OF)
        wrong = (
            len(by_slot) == 1
            or bool(attention and cache)
            or bool(cache and draft and cache not in ROLLING)
            or bool(depth and draft == "self-speculation")
            or bool(depth == "token-reduction" and (attention or cache))
            or bool(depth and depth != "dola" and (cache in BY_WEIGHTS or attention in BY_QUERIES))
        )
        reason = parse.conflict(ACTING[first].policy(), ACTING[second].policy(), (first, second))
        assert bool(reason) == wrong, f"{first}+{second}: {reason}"
        assert reason is None or ("\n" not in reason and len(reason) < 140)
        if attention and cache:
            assert (reason == f"with '{attention}' there is no KV cache left") == (attention in LINEAR)
            assert (reason == "each brings an attention of its own, and a layer has one") == (attention not in LINEAR and cache in OWN)


def test_the_slot_of_a_method_is_that_of_its_policy_and_no_other_has_one() -> None:
    for found in entries():
        method: Any = found.method
        assert isinstance(method, Acts) == (method.produces == FORMAT), found.name
        if isinstance(method, Acts):
            assert method.slot == method.policy().slot, found.name
            assert "slot" not in asdict(found.method), "it is no setting, so keys do not know it"
        else:
            assert not hasattr(method, "slot")
    assert all(OF.values()) and sum(map(len, OF.values())) == len(ACTING)
    assert OF["attention"] >= LINEAR and OF["cache"] >= OWN | ROLLING and OF["attention"] >= BY_QUERIES


def test_asking_for_a_policy_imports_no_torch() -> None:
    code = (
        "import sys\nfrom slimbench.harness.config.registry import entry\n"
        f"for name in {sorted(ACTING)}:\n    entry(name).method.policy()\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_claims_of_work_are_joined_figure_by_figure_and_an_empty_one_takes_them_back() -> None:
    earlier, cache = Claim(FORMAT, work=Work(blocks=12.5, cache_tokens=900)), Claim(FORMAT, work=Work(cache_tokens=512))
    assert earlier.then(cache).work == Work(blocks=12.5, cache_tokens=512)
    assert cache.then(Claim(FORMAT)).work == Work(cache_tokens=512) == Claim(FORMAT).then(cache).work
    assert earlier.then(Claim(FORMAT, work=Work())).work == Work()
    assert (
        Claim(FORMAT, simulated=True).then(Claim(FORMAT)).simulated
        and not Claim(FORMAT, simulated=True).then(Claim(FORMAT, bits=4)).simulated
    )
