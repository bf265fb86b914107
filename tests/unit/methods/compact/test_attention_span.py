"""Spans that learn: the loss, where they go, and what the artefact keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.compact.attention_span import AdaptiveSpan, Bounded, start
from slimbench.methods.core.learning import trained
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.span import Span
from tests.support import tiny

METHOD = AdaptiveSpan(ramp=8, steps=10, batch_size=4, length=32)
CALIBRATION = Calibration(tiny.tokens(samples=8, length=32).ids, "tiny")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model with sharp attentions, in float32."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny.save_model(folder / "plain", "float32").load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return tiny.saved(model, folder / "sharp")


def compressed(method: AdaptiveSpan, dense: DenseModel, out: Path) -> tuple[Any, Any]:
    out.mkdir()
    claim = method.compress(dense, CALIBRATION, out)
    return claim, policies.read(out)[0][0]


def test_the_loss_is_that_of_the_model_with_spans_and_their_price(dense: DenseModel) -> None:
    model: Any = trained.load(dense)
    method, ids = replace(METHOD, price=0.25, loss="nll"), CALIBRATION.ids[:2]
    spans = start(model, 10)
    spans["1.span"].data = torch.tensor([1.0, 2.0, 3.0, 20.0])
    Span(8, spans).install(model)
    loss = method._loss(model, spans, dense)(ids)
    with torch.no_grad():
        logs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    text = -logs[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert float(loss.detach()) == pytest.approx(float(text) + 0.25 * (10 + 26 / 4), rel=1e-5)
    plain = trained.load(dense)(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(plain.double().log_softmax(-1), logs, atol=1e-2), "spans are in force"
    loss.backward()
    assert all(span.grad is not None and (span.grad != 0).all() for span in spans.values())
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "operator" not in name)


def test_a_price_shortens_spans_and_the_loss_moves_them_apart(dense: DenseModel, tmp_path: Path) -> None:
    dear, policy = compressed(replace(METHOD, price=1.0), dense, tmp_path / "dear")
    cheap, learned = compressed(replace(METHOD, price=0.0, steps=3), dense, tmp_path / "cheap")
    assert policy.ramp == 8 and set(policy.spans) == {"0.span", "1.span"}
    assert dear.details["span_mean"] < 16 and dear.details["span_mean"] < cheap.details["span_mean"]
    assert len({float(z) for span in learned.spans.values() for z in span}) > 1, "heads differ"
    assert cheap.details["training"]["loss_after"] < cheap.details["training"]["loss_before"]
    assert dear.trained_parameters == 8 and dear.training_tokens == 10 * 4 * 32
    model = trained.load(dense)
    assert dear.parameters == sum(p.numel() for p in model.parameters()) + 8


def test_the_artefact_keeps_what_it_claims(dense: DenseModel, tmp_path: Path) -> None:
    claim, policy = compressed(replace(METHOD, price=1.0, steps=30), dense, tmp_path / "out")
    longest = [int(torch.ceil(span.max() + 8)) - 1 for span in policy.spans.values()]
    assert claim.details["tokens_kept"] == longest and claim.work.cache_tokens == max(longest) < 32
    model = TransformersModel(policies.load(tmp_path / "out"), "cpu")
    step = model.prefill(tiny.tokens(samples=1, length=60).ids)
    step = model.decode_step(step)
    assert model.cache_bytes(step.state) == sum(longest) * 2 * 2 * 16 * 4


def test_a_head_whose_ramp_leaves_the_texts_gets_the_longest_span(dense: DenseModel, tmp_path: Path) -> None:
    claim, policy = compressed(replace(METHOD, price=0.0, start=1.0, steps=1, longest=300), dense, tmp_path / "far")
    assert all((span == 300).all() for span in policy.spans.values()) and claim.details["longest_spans"] == 8
    assert claim.work.cache_tokens == 307, "more than the 32 tokens of a text"
    assert METHOD.told(torch.tensor([0.0, 24.0, 24.5, 32.0]), 32).tolist() == [0, 24, 2048, 2048]
    near, _ = compressed(replace(METHOD, price=0.0, start=0.25, steps=1), dense, tmp_path / "near")
    assert near.details["longest_spans"] == 0


def test_the_texts_of_training_are_long_and_the_longest_span_is_longer() -> None:
    method = AdaptiveSpan()
    assert method.length == 512 and method.longest == 2048
    with pytest.raises(ValueError, match="longest must be at least the length of 512 tokens, not 100"):
        AdaptiveSpan(longest=100)


def test_spans_stay_between_nothing_and_the_length() -> None:
    spans = {"0.span": torch.nn.Parameter(torch.tensor([-3.0, 5.0, 99.0]))}
    Bounded(spans, 32).after_step(0, torch.optim.SGD(spans.values(), lr=1.0))
    assert spans["0.span"].tolist() == [0, 5, 32]


@pytest.mark.parametrize("settings", [{"ramp": 0}, {"price": -1.0}, {"start": 1.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        AdaptiveSpan(**settings)
