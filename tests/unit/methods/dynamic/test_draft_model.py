"""A draft model: the text is the model's own, guesses are the draft's, and what it holds and runs is stored, claimed and counted."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import claims
from slimbench.harness.measure.dynamic import work
from slimbench.harness.store import artefact
from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.dynamic.draft_model import DraftModel, PrunedDraft
from slimbench.methods.formats import packed
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.draft.policy import Model
from slimbench.methods.formats.kv.cache import OwnCache
from slimbench.methods.formats.kv.scheme import Scheme
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

BLOCKS, VOCABULARY = 4, 24
CALIBRATION = Calibration(torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(5)), "random")
METHODS = [DraftModel(bits=8, group_size=32), DraftModel(tokens=5, group_size=32), PrunedDraft(blocks=1, group_size=32)]
METHODS += [PrunedDraft(blocks=3, tokens=1, bits=8, group_size=32), DraftModel(tokens=0, group_size=32)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model whose continuations are neither constant nor without repetition."""
    return written(tmp_path_factory.mktemp("models") / "dense")


def written(folder: Path, **shape: Any) -> DenseModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY, "tie_word_embeddings": False} | shape
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | shape)))
    for name, parameter in model.named_parameters():
        parameter.data.mul_(4 if "embed" not in name else 1)
    return tiny.saved(model, folder)


def made(method: DraftModel, dense: DenseModel, out: Path) -> tuple[TransformersModel, Claim]:
    out.mkdir()
    method.check(dense.shape)
    claim = method.compress(dense, CALIBRATION if method.needs.calibration else Calibration.none(), out)
    return TransformersModel(policies.load(out), "cpu"), claim


def under(dense: DenseModel, policy: Model) -> TransformersModel:
    model = dense.load()
    policy.install(model)
    return TransformersModel(model, "cpu")


def plain(dense: DenseModel) -> TransformersModel:
    return TransformersModel(dense.load(), "cpu")


def prompts(count: int = 6, tokens: int = 20) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(2))


def wrong(dense: DenseModel, folder: Path) -> Path:
    """The model with its head turned round: what it would choose last it chooses first."""
    model: Any = dense.load()
    model.lm_head.weight.data.neg_()
    return tiny.saved(model, folder).path


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_text_is_the_models_own(method: DraftModel, dense: DenseModel, tmp_path: Path) -> None:
    (model, _), alone = made(method, dense, tmp_path / "out"), plain(dense)
    for ids in prompts().split(1):
        for room in (1, 2, 30):
            assert model.generate(ids, room) == alone.generate(ids, room)
    assert torch.equal(model.logits(prompts()), alone.logits(prompts())), "drafts change no logits"


def test_passes_are_fewer_than_tokens_and_nothing_guessed_wrongly_is_left(dense: DenseModel, tmp_path: Path) -> None:
    model, _ = made(DraftModel(bits=8, group_size=32), dense, tmp_path / "out")
    passes: list[int] = []
    model.module.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    for ids in prompts().split(1):
        passes.clear()
        step = model.prefill(ids, 40)
        text = step.state
        assert text.drafter.held == 20, "the prompt went through the draft with the prompt's own pass"
        while text.room > 0:
            step = model.decode_step(step)
            assert text.drafter.cache.get_seq_length() == text.drafter.held
            own, theirs = text.cache.get_seq_length(), text.drafter.held
            assert model.cache_bytes(text) == (own + theirs) * BLOCKS * 2 * 2 * 16 * 4, "both caches: keys and values of two heads of 16"
        assert len(passes) - 1 == 39 - text.accepted < 25, "each pass gives what was accepted and one token more"
        assert text.room == 0 and text.cache.get_seq_length() == len(text.text) - 1 == 59


@pytest.mark.parametrize("method", [METHODS[1], METHODS[2]], ids=str)
def test_guesses_are_those_of_the_draft_alone(method: DraftModel, dense: DenseModel, tmp_path: Path) -> None:
    """Also after some were wrong, which the draft's cache then has to let go of."""
    model, _ = made(method, dense, tmp_path / "out")
    alone, agreed = TransformersModel(packed.load(tmp_path / "out" / "draft"), "cpu"), set[int]()
    for ids in prompts(3).split(1):
        text = model.prefill(ids, 40).state
        inner = text.drafter.guess_and_check

        def watched(before: list[int], cache: Any, most: int, inner: Any = inner) -> Any:
            guesses, chosen = inner(before, cache, most)
            assert guesses == (alone.generate(torch.tensor([before]), len(guesses))[0] if guesses else [])
            assert len(guesses) == min(method.tokens, most)
            agreed.add(next((place for place, guess in enumerate(guesses) if chosen[place] != guess), len(guesses)))
            return guesses, chosen

        text.drafter.guess_and_check = watched
        while text.room > 0:
            text.next()
    assert len(agreed) >= 2, "some were wrong, some were not"


def test_a_draft_that_is_the_model_is_always_right_and_one_turned_round_never(dense: DenseModel, tmp_path: Path) -> None:
    right, never = (under(dense, Model(3, "huggingface", path)) for path in (dense.path, wrong(dense, tmp_path / "wrong")))
    for ids in prompts(3).split(1):
        texts = []
        for model in (right, never):
            step = model.prefill(ids, 21)
            while step.state.room > 0:
                step = model.decode_step(step)
            texts.append(step.state)
        assert texts[0].text == texts[1].text == ids[0].tolist() + plain(dense).generate(ids, 21)[0]
        assert texts[0].accepted == texts[0].drafted == 15, "four tokens a pass, five passes"
        assert texts[1].accepted == 0 and texts[1].drafted == 17 * 3 + 2 + 1, "three guesses a pass, as far as tokens are wanted"


def test_what_the_draft_runs_is_counted(dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of the model has a row for each guess and one more; each guess goes through the draft, with what it had not read."""
    for further in ("untold", "uncalled"):  # they read a text again
        monkeypatch.setattr(work, further, lambda *_: None)
    found = {}
    for name, path in (("right", dense.path), ("wrong", wrong(dense, tmp_path / "wrong"))):
        model, rows = under(dense, Model(3, "huggingface", path)), []
        model.module.draft.model.norm.register_forward_hook(lambda _, args, __, rows=rows: rows.append(args[0].shape[1]))
        found[name] = work.measure(model, prompts(3), None, lambda *_: None)
        decoded = [count for count in rows if count < 20]
        assert len(rows) - len(decoded) == 3 and set(decoded) <= {1, 2}, "prompts are not decoded; of a text all but a token or two is held"
        body, head = BLOCKS * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128), 64 * VOCABULARY
        checked = sum(int(each) * count for each, count in found[name].pass_rows.items())
        assert found[name].total_parameters == 2 * (body + head)
        assert found[name].active_parameters.mean * 3 * 32 == pytest.approx(
            body * (checked + sum(decoded)) + head * (checked + len(decoded))
        )
        assert found[name].blocks.mean * 3 * 32 == pytest.approx(BLOCKS * (checked + sum(decoded)))
    alone = work.measure(plain(dense), prompts(3), None, lambda *_: None)
    assert alone.passes == found["wrong"].passes == 3 * 32 > 3 * found["right"].passes
    assert alone.active_parameters.mean < found["right"].active_parameters.mean < found["wrong"].active_parameters.mean / 3
    assert alone.total_parameters == body + head


def test_without_guesses_the_draft_does_not_run(dense: DenseModel) -> None:
    policy = Model(3, "huggingface", dense.path)
    model, calls = under(dense, policy.neutral()), list[int]()
    model.module.draft.register_forward_hook(lambda *_: calls.append(1))
    assert model.generate(prompts(1), 8) == plain(dense).generate(prompts(1), 8) and not calls
    assert under(dense, policy).generate(prompts(1), 8) and policy.neutral().tokens == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", [METHODS[1], PrunedDraft(blocks=2, group_size=32)], ids=str)
def test_the_artefact_holds_the_model_and_a_rounded_copy(method: DraftModel, tied: bool, tmp_path: Path) -> None:
    dense, out = written(tmp_path / "dense", tie_word_embeddings=tied), tmp_path / "out"
    model, claim = made(method, dense, out)
    assert (out / "model.safetensors").read_bytes() == (dense.path / "model.safetensors").read_bytes()
    assert json.loads((out / "policy.json").read_text())["slots"] == {"draft": {"kind": "model", "tokens": method.tokens, "base": "packed"}}
    stored, source = load_file(out / "draft" / "model.safetensors"), dense.load().state_dict()
    kept = claim.details["draft_blocks"]
    assert kept == ([*range(BLOCKS)] if type(method) is DraftModel else influential(dense, 2))
    copied = packed.load(out / "draft")
    for name, layer in copied.named_modules():
        if isinstance(layer, packed.PackedLinear):
            parts = ["lm_head"] if name.endswith("head") else name.split(".")
            if "layers" in parts:
                parts[2] = str(kept[int(parts[2])])
            groups = source[".".join(parts) + ".weight"].double().unflatten(1, (-1, 32))
            scale = groups.abs().amax(-1, keepdim=True) / 7.5
            steps = layer.dequantize().double().unflatten(1, (-1, 32)) / scale
            assert ((steps - groups / scale).abs() < 0.5001).all() and ((steps - steps.round()).abs() < 1e-4).all(), "to nearest"
            assert -8.001 < steps.min() < -6.9 and 6.9 < steps.max() < 7.001
    assert sum(name.endswith(".qweight") for name in stored) == 7 * len(kept) + 1, "all matrices and the head"
    assert (
        claim.details["draft_bytes"]
        == (out / "draft" / "model.safetensors").stat().st_size
        < (out / "model.safetensors").stat().st_size / 4
    )

    assert artefact.disk_bytes(out) > artefact.disk_bytes(dense.path) + claim.details["draft_bytes"]
    draft = 2 * 64 * len(kept) + 64 + VOCABULARY * 64 * (2 - tied) + len(kept) * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert claim.details["draft_parameters"] == draft and claim.parameters == draft + dense.load().num_parameters()
    evidence = claims.check(model, claim, artefact.disk_bytes(out))
    assert evidence.flags == [] and evidence.parameters == claim.parameters and evidence.blocks == BLOCKS
    held = sum(value.numel() * value.element_size() for value in stored.values())
    alone = claims.check(plain(dense), Claim("huggingface"), 0)
    assert evidence.weight_bytes == pytest.approx(alone.weight_bytes + held, rel=0.02), "the memory of the row has both"


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def lengthened(small: DenseModel, folder: Path) -> DenseModel:
    """The same model behind two further blocks that add nothing."""
    model: Any = written(folder, **SMALL | {"num_hidden_layers": 4}).load()
    states = {name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2."): t for name, t in small.load().state_dict().items()}
    model.load_state_dict(states, strict=False)
    for block in model.model.layers[:2]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder)
    return tiny.dense_model(folder, "float32")


def test_another_model_guesses_and_the_text_is_the_models_own(dense: DenseModel, tmp_path: Path) -> None:
    """What chooses as the model does is nearly always right, and another one hardly ever: guesses are its own."""
    small = written(tmp_path / "small", **SMALL)
    method, shares, size = DraftModel(bits=8, group_size=32, model="small"), list[float](), small.load().num_parameters()
    for target in (dense, lengthened(small, tmp_path / "longer")):
        out, alone = tmp_path / f"out-{len(shares)}", plain(target)
        model, claim = made(method, dataclasses.replace(target, draft=(small.path, "small 0123")), out)
        drafted = accepted = 0
        for ids in prompts(4).split(1):
            step = model.prefill(ids, 30)
            while step.state.room > 0:
                step = model.decode_step(step)
            assert step.state.text == ids[0].tolist() + alone.generate(ids, 30)[0]
            drafted, accepted = drafted + step.state.drafted, accepted + step.state.accepted
        shares.append(accepted / drafted)
        assert torch.equal(model.logits(prompts()), alone.logits(prompts()))
        told = {name: claim.details[name] for name in ("draft_model", "draft_blocks", "draft_parameters")}
        assert told == {"draft_model": "small 0123", "draft_blocks": [0, 1], "draft_parameters": size}
        assert claim.parameters == alone.module.num_parameters() + size
        evidence = claims.check(model, claim, artefact.disk_bytes(out))
        assert evidence.flags == [] and evidence.parameters == claim.parameters
        layer = model.module.draft.model.layers[1].mlp.up_proj.dequantize()
        source = small.load().model.layers[1].mlp.up_proj.weight.detach()
        assert float((layer - source).abs().max() / source.abs().max()) < 0.01
    assert shares[0] < 0.5 and shares[1] > 0.8


def test_settings_are_those_of_the_model_that_guesses(dense: DenseModel, tmp_path: Path) -> None:
    small = written(tmp_path / "small", **SMALL)
    for method, told in (
        (DraftModel(model="small"), "group_size 64 does not divide"),
        (PrunedDraft(blocks=2, model="small", group_size=32), "of 2 blocks"),
    ):
        method.check(dense.shape)
        with pytest.raises(Unsupported, match=told):
            method.check_draft(small.shape)
    method = PrunedDraft(blocks=1, bits=8, group_size=32, model="small")
    model, claim = made(method, dataclasses.replace(dense, draft=(small.path, "small 0123")), tmp_path / "out")
    assert len(claim.details["draft_blocks"]) == len(model.module.draft.model.layers) == 1
    assert model.generate(prompts(1), 12) == plain(dense).generate(prompts(1), 12)


def influential(dense: DenseModel, count: int) -> list[int]:
    """Blocks that turn the states of the calibration text most."""
    model: Any = dense.load()
    with torch.no_grad():
        found = model(CALIBRATION.ids, output_hidden_states=True, use_cache=False)
    states, last = list(found.hidden_states[:-1]), []
    model.model.layers[-1].register_forward_hook(lambda _, __, made: last.append(made))
    with torch.no_grad():
        model(CALIBRATION.ids, use_cache=False)
    states.append(last[0])
    turned = [1 - float(torch.cosine_similarity(*pair, dim=-1).mean()) for pair in pairwise(states)]
    return sorted(sorted(range(BLOCKS), key=lambda index: -turned[index])[:count])


def test_on_packed_weights_the_copy_is_of_the_first_model_and_the_text_that_of_the_packed(dense: DenseModel, tmp_path: Path) -> None:
    (base := tmp_path / "packed").mkdir()
    first = RTN(group_size=32).compress(dense, Calibration.none(), base)
    after = dataclasses.replace(dense, path=base, original=dense.path, format="packed")
    model, claim = made(DraftModel(bits=8, group_size=32), after, tmp_path / "out")
    alone = TransformersModel(packed.load(base), "cpu")
    for ids in prompts(3).split(1):
        assert model.generate(ids, 24) == alone.generate(ids, 24)
    layer = model.module.draft.model.layers[0].mlp.up_proj.dequantize()
    source = dense.load().state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert float((layer - source).abs().max() / source.abs().max()) < 0.01, "not rounded twice"
    whole = first.then(claim)
    assert whole.parameters == 2 * dense.load().num_parameters() and (whole.format, whole.bits) == ("policy", 4)


@pytest.mark.parametrize("base", [None, RTN(bits=8, group_size=None), RTN(bits=8, group_size=64)], ids=str)
def test_a_grid_is_read_from_the_models_own_layers(base: RTN | None, dense: DenseModel, tmp_path: Path) -> None:
    """A draft of four bits in groups of 32 lies beside them, and neither lends the model its grid nor hides one that is not as claimed."""
    target, claim = dense, Claim("huggingface")
    if base:
        (packs := tmp_path / "packed").mkdir()
        claim = base.compress(dense, Calibration.none(), packs)
        target = dataclasses.replace(dense, path=packs, original=dense.path, format="packed")
    model, added = made(DraftModel(bits=4, group_size=32), target, tmp_path / "out")
    evidence = claims.check(model, whole := claim.then(added), artefact.disk_bytes(tmp_path / "out"))
    assert evidence.flags == []
    alone = (TransformersModel(packed.load(target.path), "cpu") if base else plain(dense)).evidence()
    assert evidence.effective_bits == alone.effective_bits and evidence.loaded_bits == alone.loaded_bits
    by_role = {layer.role: layer for layer in evidence.layers}
    assert by_role["draft"].count == by_role["linear"].count == 7 * BLOCKS
    assert by_role["draft"].scales == {"32": by_role["draft"].parameters // 32} and "32" not in by_role["linear"].scales
    assert by_role["draft"].bits_per_weight < 6 < by_role["linear"].bits_per_weight
    if base:
        lie = dataclasses.replace(whole, group_size=32)
        assert any("claims groups of 32, has groups of" in flag for flag in claims.flags(lie, evidence)), "those of the draft are no excuse"


def test_a_draft_that_was_expanded_is_told(dense: DenseModel, tmp_path: Path) -> None:
    model, claim = made(DraftModel(bits=4, group_size=32), dense, tmp_path / "out")
    assert claims.check(model, claim, artefact.disk_bytes(tmp_path / "out")).flags == []
    model.module.draft = dense.load()
    flags = claims.check(model, claim, artefact.disk_bytes(tmp_path / "out")).flags
    assert any(re.fullmatch(rf"claims {claim.details['draft_bytes']:,} bytes of a draft, its layers hold \d+,\d+", flag) for flag in flags)


def test_what_it_cannot_do_is_refused_in_one_line(dense: DenseModel, tmp_path: Path) -> None:
    other = written(tmp_path / "other", vocab_size=30)
    with pytest.raises(Unsupported, match=r"^a draft must have the tokens of the model; it has 30, the model 24$"):
        Model(3, "huggingface", other.path).install(dense.load())
    with pytest.raises(ValueError, match="does not sit on the format 'gguf'"):
        Model(3, "gguf", dense.path).install(dense.load())
    with pytest.raises(Unsupported, match="one text at a time"):
        under(dense, Model(3, "huggingface", dense.path)).prefill(prompts(2), 4)
    model = dense.load()
    OwnCache(Scheme(), Scheme()).install(model)
    Model(3, "huggingface", dense.path).install(model)
    with pytest.raises(Unsupported, match=r"^the cache cannot take back"):
        TransformersModel(model, "cpu").prefill(prompts(1), 4)
    drafted: Any = dense.load()
    Model(3, "huggingface", dense.path).install(drafted)
    OwnCache(Scheme(), Scheme()).install(drafted.draft)
    inner = drafted.draft.forward
    drafted.draft.forward = lambda ids, past_key_values, **more: inner(ids, past_key_values=drafted.draft.new_cache(), **more)
    with pytest.raises(Unsupported, match=r"^the cache of the draft cannot take back"):
        TransformersModel(drafted, "cpu").prefill(prompts(1), 4)
    with pytest.raises(Unsupported, match=r"of 4 blocks fewer than all must guess, not 4; draft-model has them all$"):
        PrunedDraft(blocks=4, group_size=32).check(dense.shape)
    with pytest.raises(Unsupported, match="group_size 256 does not divide"):
        DraftModel(group_size=256).check(dense.shape)
    for wrong_settings, message in (({"tokens": -1}, "tokens must not be negative"), ({"blocks": 0}, "blocks must be at least 1")):
        with pytest.raises(ValueError, match=message):
            PrunedDraft(**wrong_settings)
