"""Zero-shot accuracy through lm-eval's own tasks and metrics, with the model behind the engine interface."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.measure.loaded import Generates, Scores
from slimbench.harness.measure.perplexity import Diverged
from slimbench.harness.schema.quality import ZeroshotItems, ZeroshotResult
from slimbench.harness.store.partial import Part
from slimbench.tasks import data_sets, zeroshot
from slimbench.tasks.overlap import overlap


class EngineLM(TemplateLM):
    """lm-eval's model interface on top of an engine.

    Requests that share all input tokens (the one-token answers of a multiple choice) share one forward pass; batches
    are filled by length up to `batch_tokens` and to what the model runs at once. Log-softmax in float32. A likelihood that is
    not finite is `Diverged`.

    Args:
        part: Keeps the answers of each batch and each text; what it has of an earlier attempt is not asked again.
    """

    def __init__(
        self, model: Scores, tokenizer: Any, batch_tokens: int, on_progress: Callable[[int, int], None], part: Part | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.on_progress = batch_tokens, on_progress
        self.part = part or Part()
        self.forward_tokens = 0
        self.scored: dict[Any, tuple[int, int]] = {}
        """Of each text whose likelihood was asked the first position whose logits tell it, and the length."""

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self.model.check_scoring("exact", "chunk")
        by_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (text, context, continuation) in enumerate(requests):
            ids = tuple((context + continuation)[-(self.model.max_length + 1) :][:-1])
            by_input[ids].append(index)
            self.scored[text] = max(0, len(ids) - len(continuation)), len(ids)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        self.on_progress(0, len(requests))
        for batch in self._batches(sorted(by_input, key=lambda ids: (-len(ids), ids))):
            asked = [index for ids in batch for index in by_input[ids]]
            wanted = [[requests[index][2] for index in by_input[ids]] for ids in batch]
            given = self.part.once([batch, wanted], len(asked), partial(self._answers, batch, wanted))
            for index, (score, greedy) in zip(asked, given, strict=True):
                answers[index] = score, greedy
            self.forward_tokens += len(batch) * len(batch[0])
            done += len(asked)
            self.on_progress(done, len(requests))
        return answers

    def _answers(self, batch: list[tuple[int, ...]], wanted: list[list[list[int]]]) -> list[tuple[float, bool]]:
        """The score of each continuation of each input of a batch, in their order; the longest input comes first."""
        longest = max(1, *(len(continuation) for continuations in wanted for continuation in continuations))
        start = max(0, min(len(ids) for ids in batch) - longest)
        padded = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        for row, ids in enumerate(batch):
            padded[row, : len(ids)] = torch.tensor(ids)
        logits = self.model.logits(padded, start)
        rows = zip(logits, batch, wanted, strict=True)
        return [self._score(row, len(ids) - start, continuation) for row, ids, several in rows for continuation in several]

    @staticmethod
    def _score(logits: torch.Tensor, end: int, continuation: list[int]) -> tuple[float, bool]:
        target = torch.tensor(continuation, device=logits.device)
        logprobs = torch.log_softmax(logits[end - len(continuation) : end].float(), -1)
        chosen = logprobs.gather(1, target[:, None])[:, 0]
        score = float(chosen.sum())
        if not math.isfinite(score):
            raise Diverged(f"NaN or infinite likelihood of {len(continuation)} tokens in a task or document")
        return score, bool((logprobs.argmax(-1) == target).all())

    def _batches(self, inputs: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        batches: list[list[tuple[int, ...]]] = []
        most = self.model.batch(self.batch_tokens)
        for ids in inputs:
            if batches and len(batches[-1]) < most and (len(batches[-1]) + 1) * len(batches[-1][0]) <= self.batch_tokens:
                batches[-1].append(ids)
            else:
                batches.append([ids])
        return batches

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals: list[float] = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.max_length,
                context_len=1,
            )
            pairs = [(None, list(context), list(labels)) for context, labels in map(make_disjoint_window, windows)]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        self.on_progress(0, len(requests))
        for request in requests:
            context, options = request.args
            stops = [options["until"]] if isinstance(options.get("until"), str) else list(options.get("until", []))
            limit = int(options.get("max_gen_toks", 256))
            prompt = self.tok_encode(context)[-max(1, self.model.max_length - limit) :]
            text, tokens = self.part.once([prompt, stops, limit], 1, partial(self._generate, prompt, stops, limit))
            self.forward_tokens += tokens
            texts.append(text)
            self.on_progress(len(texts), len(requests))
        return texts

    def _generate(self, prompt: list[int], stops: list[str], limit: int) -> tuple[str, int]:
        """The text that follows a prompt, and the number of tokens that went through the model."""
        model = Generates.of(self.model)
        step, produced, text = model.prefill(torch.tensor([prompt]), room=limit), [], ""
        for _ in range(limit):
            token = int(step.token)
            if token == self.eot_token_id:
                break
            produced.append(token)
            text = self.tokenizer.decode(produced)
            if any(stop in text for stop in stops):
                break
            step = model.decode_step(step)
        for stop in stops:
            text = text.split(stop)[0]
        return text, len(prompt) + len(produced)


def measure(
    model: Scores,
    tokenizer: Any,
    suite: SuiteConfig,
    on_progress: Callable[[int, int], None],
    seen: Sequence[NDArray[np.integer[Any]]] | None = None,
    part: Part | None = None,
) -> tuple[list[ZeroshotResult], int]:
    """Run the zero-shot tasks of a suite.

    Args:
        seen: Tokens that the cell was calibrated with or taught, sequences of any length, to be looked for in the questions.
        part: Keeps answers (see `EngineLM`).

    Returns:
        A result for each task, and the number of tokens that went through the model, padding included.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork this process, threads, locks, handlers and all, and may wait for it forever
    folders = [str(folder) for folder in zeroshot.folders(suite.include_path, suite.tasks)]
    own = zeroshot.of_lm_eval(suite.include_path, suite.tasks)
    data_sets.fetch(own)
    manager = TaskManager(include_path=[*folders], include_defaults=bool(own))
    lm = EngineLM(model, tokenizer, suite.batch_tokens, on_progress, part)
    samples = _drawn(manager, suite)
    out = simple_evaluate(
        model=lm,
        tasks=list(suite.tasks),
        num_fewshot=suite.num_fewshot,
        limit=None if samples else suite.limit,
        samples=samples,
        task_manager=manager,
        bootstrap_iters=100,
        log_samples=True,
    )
    results = [_result(task, out, suite) for task in sorted(out["samples"])]
    for result in results:
        texts = {tuple(asked) for sample in out["samples"][result.task] for asked in sample["arguments"] if isinstance(asked[-1], str)}
        result.exact_keys = model.exact_share(lm.scored[text] for text in texts if text in lm.scored)
    if seen is not None:
        for result in results:
            questions = {sample["arguments"][0][0] for sample in out["samples"][result.task]}
            result.calibration_overlap = overlap([np.array(lm.tok_encode(text), dtype=np.int64) for text in questions], seen)
    return results, lm.forward_tokens


def _drawn(manager: TaskManager, suite: SuiteConfig) -> dict[str, list[int]] | None:
    """The items that are asked of each task, members of groups included; None: the first of each, or all.

    lm-eval reads the items in their order and counts through the list that it is given, so the list is ascending.
    """
    if suite.sample_seed is None or suite.limit is None:
        return None
    found = manager.load(list(suite.tasks))["tasks"]
    return {name: zeroshot.drawn(name, len(task.eval_docs), suite.limit, suite.sample_seed) for name, task in found.items()}


def _result(task: str, out: dict[str, Any], suite: SuiteConfig) -> ZeroshotResult:
    scores, samples = out["results"][task], out["samples"][task]
    metric = next((m for m in zeroshot.headline(task) if m in samples[0]), None) or next(m for m in samples[0]["metrics"])
    filter_ = samples[0]["filter"]
    choices = [len(s["arguments"]) for s in samples]
    return ZeroshotResult(
        task=task,
        version=str(out.get("versions", {}).get(task, "")),
        metric=metric,
        accuracy=float(scores[f"{metric},{filter_}"]),
        stderr=_number(scores.get(f"{metric}_stderr,{filter_}")),
        chance=sum(1 / n for n in choices) / len(choices) if min(choices) > 1 else None,
        num_fewshot=suite.num_fewshot,
        items=_items([s for s in samples if s["filter"] == filter_], metric),
    )


def _items(samples: list[dict[str, Any]], metric: str) -> ZeroshotItems:
    items = ZeroshotItems()
    for sample in samples:
        likelihoods = [r[0] for r in sample["filtered_resps"] if isinstance(r, list | tuple) and r and isinstance(r[0], float)]
        prompt = sample.get("prompt_hash") or hashlib.sha256(str(sample["arguments"]).encode()).hexdigest()
        items.add(sample["doc_id"], prompt[:16], float(sample[metric]), [round(value, 4) for value in likelihoods])
    return items


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
