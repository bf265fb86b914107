"""A teacher in this process: a model of transformers, asked in batches.

Each answer is drawn by a seed of its own, made of what is asked; so a run that was ended anywhere goes on with the same answers, as far as
sums that are rounded otherwise beside other answers leave the same token the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slimbench.util.writing.teaching import Completion, Request, Sampling, chat_ids, without_its_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32
ROUND = 16
"""Tokens after which texts that have ended leave their batch."""


class Local:
    """A model and its tokenizer.

    Attributes:
        identity: Name and content of the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: str) -> None:
        self.identity, self._model, self._tokenizer = identity, model, tokenizer
        stated = model.generation_config.eos_token_id if model.generation_config else None
        self._ends: list[int] = [stated] if isinstance(stated, int) else list(stated or ())

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See `util.writing.teaching.Teacher`; answers come a batch at a time, in order."""
        kinds: dict[tuple[Sampling, float], list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault((request.sampling, request.weight if request.against is not None else 0.0), []).append(index)
        for (sampling, weight), indices in kinds.items():
            size = max(1, BATCH // sampling.beams)
            for first in range(0, len(indices), size):
                rows = indices[first : first + size]
                yield from zip(rows, self._batch([requests[row] for row in rows], sampling, weight), strict=True)

    def _batch(self, requests: Sequence[Request], sampling: Sampling, weight: float) -> list[Completion]:
        prompts = self._encoded([request.chat for request in requests])
        width = prompts["input_ids"].shape[1]
        processors: list[Any] = []
        if weight:
            against = self._encoded([(*request.chat[:-1], (request.chat[-1][0], request.against or "")) for request in requests])
            processors.append(Subtracted(self._model, against, weight, self._ends))
        if sampling.presence_penalty:
            processors.append(Presence(sampling.presence_penalty, width))
        if sampling.temperature:
            processors.append(Drawn([int(request.hash[:8], 16) for request in requests], sampling, self._model.device))
        lengths = prompts["attention_mask"].sum(1).tolist()
        made = self._written(prompts, sampling, processors)
        return [self._completion(ids, int(length), sampling) for ids, length in zip(made, lengths, strict=True)]

    def _written(self, prompts: dict[str, Tensor], sampling: Sampling, processors: Sequence[Any]) -> list[list[int]]:
        """What is written behind prompts; an answer that has ended takes no part in the rounds after."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._tokenizer.eos_token_id
        ends, searched = self._ends or None, {"num_beams": sampling.beams, "do_sample": False, "return_dict_in_generate": True}
        ids, mask, cache = prompts["input_ids"], prompts["attention_mask"], None
        width, left, going = ids.shape[1], sampling.max_tokens, list(range(len(ids)))
        written: dict[int, list[int]] = {}
        with torch.no_grad(), without_its_settings(self._model):
            while left and going:
                count = min(ROUND, left) if sampling.beams == 1 else left
                config = GenerationConfig(max_new_tokens=count, eos_token_id=ends, pad_token_id=pad, **searched)
                made = self._model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=config,
                    logits_processor=LogitsProcessorList(processors),
                )
                written |= zip(going, made.sequences[:, width:].tolist(), strict=True)
                left -= count
                stay = [place for place, row in enumerate(going) if self._completion(written[row], 0, sampling).finish != "stop"]
                rows = torch.tensor(stay, dtype=torch.int64, device=ids.device)
                mask = torch.cat([mask, mask.new_ones(len(mask), made.sequences.shape[1] - mask.shape[1])], 1)[rows]
                going, ids, cache = [going[place] for place in stay], made.sequences[rows], getattr(made, "past_key_values", None)
                for part in (cache, *processors) if left and going else ():
                    if part is not None:
                        part.reorder_cache(rows)
        return [written[row] for row in range(len(written))]

    def _encoded(self, chats: Sequence[tuple[tuple[str, str], ...]]) -> dict[str, Tensor]:
        """Ids and mask [chats, longest], padded on the left."""
        import torch

        each = [chat_ids(self._tokenizer, chat) for chat in chats]
        width = max(map(len, each))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in each])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in each])
        return {"input_ids": ids.to(self._model.device), "attention_mask": mask.to(self._model.device)}

    def _completion(self, ids: list[int], prompt_tokens: int, sampling: Sampling) -> Completion:
        place = next((place for place, token in enumerate(ids) if token in self._ends), None)
        text = str(self._tokenizer.decode(ids if place is None else ids[:place], skip_special_tokens=True))
        cuts = [found for stop in sampling.stop if (found := text.find(stop)) >= 0]
        ended = place is not None or bool(cuts)
        return Completion(
            text[: min(cuts)] if cuts else text,
            "stop" if ended else "length",
            prompt_tokens,
            len(ids) if place is None else place + 1,
        )


class Drawn:
    """Makes a token the likeliest that is drawn at a temperature, among those of the mass `top_p`, by a seed for each answer.

    The largest of log p − log E, with E from the exponential distribution, is a draw from p (the Gumbel-max trick).
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        import torch

        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        import torch
        from transformers import TopPLogitsWarper

        scores: Any = logits.float() / self._sampling.temperature
        if self._sampling.top_p < 1:
            scores = TopPLogitsWarper(self._sampling.top_p)(ids, scores)
        noise = [torch.empty_like(row).exponential_(generator=of) for row, of in zip(scores, self._generators, strict=True)]
        return scores - torch.stack(noise).log()

    def reorder_cache(self, rows: Tensor) -> None:
        """Leave some answers alone, as a cache of transformers does."""
        self._generators = [self._generators[row] for row in rows.tolist()]


class Presence:
    """Takes a penalty off the logits of tokens that an answer has already."""

    def __init__(self, penalty: float, width: int) -> None:
        self._penalty, self._width = penalty, width

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        answer = ids[:, self._width :]
        return logits - self._penalty * torch.zeros_like(logits).scatter_(1, answer, 1.0)

    def reorder_cache(self, rows: Tensor) -> None:
        """See `Drawn`; nothing is kept of an answer."""


class Subtracted:
    """Log-probabilities after one prompt less `weight` times those after another (SCOTT, arXiv 2305.01879, equation 3).

    Where the first prompt alone would end the answer, it ends, as in the authors' program.
    """

    def __init__(self, model: PreTrainedModel, against: dict[str, Tensor], weight: float, ends: Sequence[int]) -> None:
        self._model, self._against, self._weight, self._ends, self._cache = model, against, weight, ends, None

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        inputs, mask = self._against["input_ids"], self._against["attention_mask"]
        if self._cache is not None:
            inputs, mask = ids[:, -1:], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            self._against = self._against | {"attention_mask": mask}
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        made = self._model(input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True)
        self._cache = made.past_key_values
        found = logits.log_softmax(-1) - self._weight * made.logits[:, -1].float().log_softmax(-1)
        likeliest = logits.argmax(-1)
        for end in self._ends:
            ended = likeliest == end
            found[ended] = -torch.inf
            found[ended, end] = 0.0
        return found

    def reorder_cache(self, rows: Tensor) -> None:
        """See `Drawn`."""
        self._against = {name: value[rows] for name, value in self._against.items()}
        if self._cache is not None:
            self._cache.reorder_cache(rows)
