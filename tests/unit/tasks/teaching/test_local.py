"""A teacher in this process, a tiny model: the same answers however a run was cut, and draws as they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.tasks.teaching import local
from slimbench.tasks.teaching.journal import Journal
from slimbench.util.writing.teaching import Request, Sampling, chat_ids
from tests.support import tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("teacher")
    dense = tiny.save_model(folder, "float32", vocab_size=300)
    tiny.save_tokenizer(folder)
    model = dense.load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what comes next depends on what was there
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def teacher(parts: tuple[Any, Any]) -> local.Local:
    return local.Local(*parts, "tiny")


def requests(count: int, **sampling: Any) -> list[Request]:
    texts = ("say", "a longer question about nothing much", "why")
    return [Request((("user", f"{texts[n % 3]} {n}"),), Sampling(**{"max_tokens": 12, **sampling}), seed=n) for n in range(count)]


def test_greedy_answers_are_those_of_each_prompt_alone(teacher: local.Local, parts: tuple[Any, Any]) -> None:
    """Padding on the left changes nothing."""
    model, tokenizer = parts
    asked = requests(5)
    for index, answer in teacher.answers(asked):
        ids = chat_ids(tokenizer, asked[index].chat)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        prompt = len(chat_ids(tokenizer, asked[index].chat))
        assert answer.text == tokenizer.decode(ids[prompt:], skip_special_tokens=True) or 2 in ids[prompt:]
        assert answer.prompt_tokens == prompt and answer.tokens <= 12


def test_a_run_that_was_cut_gives_the_same_answers(teacher: local.Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BATCH", 4)
    asked = requests(10, temperature=1.0)
    whole = [answer.text for _, answer in teacher.answers(asked)]
    assert len(set(whole)) > 5 and whole == [answer.text for _, answer in teacher.answers(asked)]

    class Dies:
        identity = "tiny"

        def answers(self, asked: Any) -> Any:
            for place, found in enumerate(teacher.answers(asked)):
                if place == 6:
                    raise KeyboardInterrupt
                yield found

    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(KeyboardInterrupt):
        journal.ask(Dies, asked)
    again = Journal(tmp_path / "journal.jsonl")
    assert len(again) == 6, "in the middle of the second batch"
    assert [answer.text for answer in again.ask(lambda: teacher, asked)] == whole and again.asked == 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7)])
def test_tokens_are_drawn_as_likely_as_they_are(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    count = 4000
    drawn = local.Drawn(range(count), Sampling(temperature=temperature, top_p=top_p), torch.device("cpu"))
    found = drawn(torch.ones(count, 1, dtype=torch.int64), logits.expand(count, 5)).argmax(-1).bincount(minlength=5) / count
    wanted = (logits / temperature).softmax(-1)
    order = wanted.argsort(descending=True)
    kept = order[: int((wanted[order].cumsum(0) < top_p).sum()) + 1]
    wanted = torch.zeros(5).index_copy(0, kept, wanted[kept] / wanted[kept].sum())
    errors = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((found - wanted).abs() <= 4.5 * errors + 1e-9).all()), (found, wanted)


def test_settings_of_a_model_s_own_decide_on_nothing(teacher: local.Local, parts: tuple[Any, Any]) -> None:
    from transformers import GenerationConfig

    model, _ = parts
    asked = {"plain": requests(4), "drawn": requests(4, temperature=1.0), "searched": requests(2, beams=3)}
    wanted = {name: [answer.text for _, answer in teacher.answers(of)] for name, of in asked.items()}
    own = model.generation_config
    ends = {"eos_token_id": own.eos_token_id, "bos_token_id": own.bos_token_id}
    model.generation_config = GenerationConfig(
        **ends, do_sample=True, temperature=0.01, top_k=1, repetition_penalty=9.0, no_repeat_ngram_size=1, length_penalty=-9.0
    )
    try:
        assert {name: [answer.text for _, answer in teacher.answers(of)] for name, of in asked.items()} == wanted
        assert model.generation_config.repetition_penalty == 9.0
    finally:
        model.generation_config = own


def test_beams_find_the_likeliest_answer(teacher: local.Local, parts: tuple[Any, Any]) -> None:
    """Of two tokens, among all whose first is one of the forty likeliest; the likeliest token each time does not always begin it."""
    (model, tokenizer), asked, better = parts, requests(8, max_tokens=2, beams=40), 0
    for index, answer in teacher.answers(asked):
        ids = chat_ids(tokenizer, asked[index].chat)
        first = model(torch.tensor([ids])).logits[0, -1].detach().double().log_softmax(-1)
        likely = first.topk(40).indices.tolist()
        second = model(torch.tensor([[*ids, token] for token in likely])).logits[:, -1].detach().double().log_softmax(-1)
        pairs = {(token, int(row.argmax())): float(first[token] + row.max()) for token, row in zip(likely, second, strict=True)}
        best = max(pairs, key=lambda pair: pairs[pair])
        if tokenizer.eos_token_id not in likely:
            assert answer.text == tokenizer.decode(best, skip_special_tokens=True)
            better += best[0] != likely[0]
    assert better > 0


def test_an_answer_ends_before_a_stop(teacher: local.Local) -> None:
    answer = next(teacher.answers(requests(1)))[1]
    assert answer.finish == "length" and len(answer.text) > 4
    stop = answer.text[3:5]
    cut = next(teacher.answers(requests(1, stop=("never there", stop))))[1]
    assert cut.text == answer.text[: answer.text.index(stop)] and cut.finish == "stop"


@pytest.mark.parametrize("kind", ["greedy", "drawn", "subtracted", "penalty"])
def test_answers_that_have_ended_leave_the_batch_and_change_no_other(
    teacher: local.Local, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sampling: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0 if kind == "greedy" else 1.0, "stop": ("l", "c")}
    asked = requests(9, **sampling, presence_penalty=2.0 if kind == "penalty" else 0.0)
    if kind == "subtracted":
        asked = [replace(request, against=f"other {n}" * (n + 1), weight=0.5) for n, request in enumerate(asked)]
    rows: list[int] = []
    hook = parts[0].get_output_embeddings().register_forward_hook(lambda _, __, made: rows.append(len(made)))
    try:
        monkeypatch.setattr(local, "ROUND", 1000)
        whole = [(answer.text, answer.finish) for _, answer in teacher.answers(asked)]
        assert set(rows) == {9} and {finish for _, finish in whole} == {"stop", "length"}
        rows.clear()
        monkeypatch.setattr(local, "ROUND", 3)
        assert [(answer.text, answer.finish) for _, answer in teacher.answers(asked)] == whole
        assert rows[:3] == [9] * 3 and sum(finish == "length" for _, finish in whole) <= rows[-1] < 9
        assert rows == sorted(rows, reverse=True)
    finally:
        hook.remove()


@pytest.fixture
def brief(parts: tuple[Any, Any]) -> Iterator[tuple[local.Local, list[int]]]:
    """A teacher whose answers end with one of its likelier tokens, and how many texts each of its passes has."""
    model, tokenizer = parts
    before, plain = model.generation_config.eos_token_id, local.Local(model, tokenizer, "tiny")
    written = plain._written(plain._encoded([request.chat for request in requests(6)]), Sampling(max_tokens=24), ())
    likely = Counter(token for ids in written for token in ids).most_common(1)[0][0]
    model.generation_config.eos_token_id = [before, likely, written[0][7]]
    rows: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, made: rows.append(len(made)))
    yield local.Local(model, tokenizer, "tiny"), rows
    hook.remove()
    model.generation_config.eos_token_id = before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 9])
def test_answers_end_with_their_token_and_leave(
    brief: tuple[local.Local, list[int]], parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, count: int, temperature: float
) -> None:
    """Of one text, and of several that end at different places, all of them before what is allowed: nothing is computed twice."""
    teacher, rows = brief
    asked = requests(count, max_tokens=120, temperature=temperature)
    monkeypatch.setattr(local, "ROUND", 1000)
    whole = [(answer.text, answer.finish, answer.tokens) for _, answer in teacher.answers(asked)]
    rows.clear()
    monkeypatch.setattr(local, "ROUND", 5)
    seen: list[int] = []
    watch = parts[0].model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        assert [(answer.text, answer.finish, answer.tokens) for _, answer in teacher.answers(asked)] == whole
    finally:
        watch.remove()
    longest = max(tokens for *_, tokens in whole)
    assert "stop" in {finish for _, finish, _ in whole}
    assert len(rows) == longest and set(seen[1:]) <= {1}, "each pass but the first reads one token"
    for place, texts in enumerate(rows):
        assert texts == sum(tokens > place // 5 * 5 for *_, tokens in whole)


def test_presence_is_taken_off_what_the_answer_has_already() -> None:
    logits = torch.zeros(2, 5)
    ids = torch.tensor([[4, 4, 1, 1, 2], [3, 3, 0, 0, 0]])
    found = local.Presence(2.0, 2)(ids, logits)
    assert found.tolist() == [[0, -2, -2, 0, 0], [-2, 0, 0, 0, 0]], "prompts count for nothing, and a token twice for one"


def test_an_answer_ends_where_the_first_prompt_alone_would_end_it(parts: tuple[Any, Any]) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0], [0.0, 1.0, 2.0, 5.0]])
    flat = type("Flat", (), {"logits": torch.tensor([[[0.0, 0.0, 9.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]]), "past_key_values": None})
    against = {"input_ids": torch.ones(2, 1, dtype=torch.int64), "attention_mask": torch.ones(2, 1, dtype=torch.int64)}
    found = local.Subtracted(lambda **_: flat, against, 0.9, [2])(torch.ones(2, 1, dtype=torch.int64), logits)  # type: ignore[arg-type]
    assert found.argmax(-1).tolist() == [2, 3] and found[0].tolist() == [-torch.inf, -torch.inf, 0.0, -torch.inf]
    assert not bool(found[1].isinf().any()), "so that a draw of it is as sure"


def test_one_distribution_less_another_s_share_is_what_is_followed(teacher: local.Local, parts: tuple[Any, Any]) -> None:
    """SCOTT: argmax of log p(· | gold) − 0.5 log p(· | wrong), token by token, both with what was answered so far."""
    model, tokenizer = parts
    asked = [replace(request, against=f"other {n}" * (n + 1), weight=0.5) for n, request in enumerate(requests(3))]
    plain = [answer.text for _, answer in teacher.answers(requests(3))]
    different = False
    for index, answer in teacher.answers(asked):
        gold = chat_ids(tokenizer, asked[index].chat)
        wrong = chat_ids(tokenizer, (("user", asked[index].against or ""),))
        made: list[int] = []
        for _ in range(12):
            logs = [model(torch.tensor([prompt + made])).logits[0, -1].log_softmax(-1) for prompt in (gold, wrong)]
            made.append(int((logs[0] - 0.5 * logs[1]).argmax()))
        end = tokenizer.eos_token_id
        made = made[: made.index(end)] if end in made else made
        assert answer.text == tokenizer.decode(made, skip_special_tokens=True)
        different |= answer.text != plain[index]
    assert different
