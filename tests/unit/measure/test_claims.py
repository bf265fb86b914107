"""A claim is typed, joins field by field, and is read from records of any age."""

from __future__ import annotations

import dataclasses
import json

import pytest

from slimbench.harness.schema.compress import CompressResult
from slimbench.methods.base import Claim, format_of
from slimbench.methods.pruning.structured.llm_pruner import LLMPruner
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.weight.rtn import RTN
from slimbench.methods.work import Work
from tests.support.paths import ROOT

RESULT = {"files": [], "disk_bytes": 1, "dense_bytes": 1, "seconds": 1.0, "step_seconds": {}}
FULL = Claim("a", 4, 64, 0.5, "2:4", 8, True, 10, 3, {"x": 1}, 100, 5, Work(blocks=2.5), 512.0, "somebody")


def test_every_field_has_a_rule() -> None:
    assert all("then" in f.metadata for f in dataclasses.fields(Claim))


def test_a_step_that_is_silent_changes_no_field_but_the_format() -> None:
    assert FULL.then(Claim("b")) == dataclasses.replace(FULL, format="b")


def test_a_later_step_wins_where_it_says_something() -> None:
    later = Claim("b", 3, None, 0.25, "4:8", 4, False, 5, 2, {"y": 2}, 90, 4, Work(experts=1), 256.0, "else")
    joined = FULL.then(later)
    summed = {"training_tokens": 15, "trained_parameters": 5, "details": {"x": 1, "y": 2}}
    assert joined == dataclasses.replace(later, work=Work(blocks=2.5, experts=1), **summed), "of work, figure by figure"
    assert joined.then(Claim("c", work=Work())).work == Work(), "an empty one takes back what was said"


def test_bits_bring_their_whole_grid() -> None:
    assert FULL.then(Claim("b", bits=8)).group_size is None
    assert Claim("a", simulated=True).then(Claim("b", bits=8)).simulated is False
    assert Claim("a").then(Claim("b", simulated=True)).simulated is True


def test_a_claim_keeps_its_numbers_through_json() -> None:
    result = CompressResult(claim=FULL, **RESULT)
    again = CompressResult.model_validate_json(result.model_dump_json())
    assert again.claim == FULL and isinstance(again.claim.work, Work)
    assert result.model_dump_json() == again.model_dump_json()


def test_what_an_unknown_program_adds_to_a_claim_is_passed_over() -> None:
    odd = {"format": "packed", "bits": 4, "flavour": "odd"}
    assert CompressResult.model_validate(RESULT | {"claim": odd}).claim == Claim("packed", bits=4)
    with pytest.raises(ValueError, match="claim"):
        CompressResult.model_validate(RESULT | {"claim": {"format": "packed", "bits": "four"}})


def test_the_claims_of_the_committed_records_are_read_number_by_number() -> None:
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*/*/*.json")) if "compress" in path.name]
    claims = [data["compress"]["claim"] for data in found if isinstance(data, dict) and data.get("compress")]
    assert len(claims) > 50
    for claim in claims:
        read = json.loads(CompressResult(claim=claim, **RESULT).model_dump_json())["claim"]
        told = {name: read[name] for name in claim}
        if work := claim.get("work"):
            told["work"] = {name: read["work"][name] for name in work}
        assert told == claim
        assert {name: repr(value) for name, value in told.items()} == {name: repr(value) for name, value in claim.items()}


def test_the_format_of_a_pipeline() -> None:
    edits, masks, packs = LLMPruner(), Magnitude(), RTN()
    formats = [format_of(steps) for steps in ([masks], [edits, masks], [edits, masks, packs], [masks, edits], [packs])]
    assert formats == ["huggingface", "edited", "packed", "edited", "packed"]
