"""What `suite=paper` and the papers' experiments ask of the hub, tiny: data sets laid out as there, of texts of our own, and an OPT.

The fields, configurations and splits are those that `tasks/corpora.yaml` and lm-eval's task definitions name.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from pyarrow import parquet

from tests.support.hub_server import HubServer

OPT = "facebook/opt-125m"
_ITEMS = 4
_NAMES, _THINGS = ("Ada", "Ben", "Cleo", "Dora"), ("lamp", "kettle", "rope", "ladder", "basket", "drum")
_DEEDS, _PLACES = ("carried", "painted", "mended", "sold", "found"), ("garden", "harbour", "kitchen", "station", "attic")

Rows = Sequence[Mapping[str, Any]]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences that a model of some thousand parameters can learn a little of."""
    draw = random.Random(seed)
    parts = ((draw.choice(_NAMES), draw.choice(_DEEDS), draw.choice(_THINGS), draw.choice(_PLACES)) for _ in range(count))
    return [f"{name} {deed} the {thing} in the {place}." for name, deed, thing, place in parts]


@dataclass(frozen=True)
class Content:
    """The folder of a repository, and where it stands on the hub."""

    kind: str
    name: str
    folder: Path
    revision: str = "main"


def make(folder: Path) -> list[Content]:
    """All data sets of suite `paper` and the tiny model, in folders below one."""
    return [*corpora(folder), *tasks(folder), Content("models", OPT, opt(folder / "opt"))]


def serve(hub: HubServer, contents: Sequence[Content]) -> None:
    for content in contents:
        hub.add(content.kind, content.name, content.folder, content.revision)


def corpora(folder: Path) -> list[Content]:
    lines = [{"text": text} for text in ("", " = A heading = \n", *(f"{s} \n" for s in sentences(400)))]
    wikitext = {"test": lines, "validation": lines[:20], "train": lines[:20]}
    tables = _tables(folder, "Salesforce/wikitext", {"wikitext-2-raw-v1": wikitext, "wikitext-103-raw-v1": {"test": lines[:5]}})
    treebank = folder / "ptb"
    rows = [{"sentence": text.lower().rstrip(".")} for text in sentences(200, 1)]
    _parquet(treebank / "penn_treebank" / "test" / "0000.parquet", rows)
    crawl = folder / "c4"
    for split, shards, count in (("train", 1024, 3000), ("validation", 8, 1200)):
        text = "".join(
            json.dumps({"text": s, "timestamp": "2019-04-25T12:57:54Z", "url": "http://example.org"}) + "\n" for s in sentences(count, 2)
        )
        file = crawl / "en" / f"c4-{split}.00000-of-{shards:05d}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode(), mtime=0))
    _card(crawl, {"en": {split: f"en/c4-{split}.*.json.gz" for split in ("train", "validation")}})
    converted = Content("datasets", "ptb-text-only/ptb_text_only", treebank, "refs/convert/parquet")
    return [tables, converted, Content("datasets", "allenai/c4", crawl)]


def tasks(folder: Path) -> list[Content]:
    """The data of lm-eval's tasks of suite `paper`."""
    return [_tables(folder, name, configurations) for name, configurations in task_rows().items()]


def task_rows() -> dict[str, dict[str, dict[str, Rows]]]:
    """Rows by data set, configuration and split."""
    texts, wrong = sentences(_ITEMS, 3), sentences(_ITEMS, 4)
    pairs = list(zip(texts, wrong, strict=True))
    piqa = [{"goal": f"To see it, {t}", "sol1": t, "sol2": w, "label": i % 2} for i, (t, w) in enumerate(pairs)]
    options = [{"text": [t, w, t[::-1], w[::-1]], "label": ["A", "B", "C", "D"]} for t, w in pairs]
    arc = [{"id": f"q{i}", "question": f"What is {i}?", "choices": o, "answerKey": "ABCD"[i]} for i, o in enumerate(options)]
    hellaswag = [
        {"ind": i, "activity_label": "Work", "ctx_a": t, "ctx_b": "then she", "ctx": f"{t} then she", "endings": [t, w, t, w]}
        | {"source_id": f"s~{i}", "split": "val", "split_type": "indomain", "label": str(i % 4)}
        for i, (t, w) in enumerate(pairs)
    ]
    winogrande = [
        {"sentence": f"{t} It was _ who was tired.", "option1": "Ada", "option2": "Ben", "answer": str(1 + i % 2)}
        for i, t in enumerate(texts)
    ]
    boolq = [{"question": "was it mended", "passage": t, "idx": i, "label": i % 2} for i, t in enumerate(texts)]
    openbook = [
        {"id": f"o{i}", "question_stem": t, "choices": o, "answerKey": "ABCD"[i]}
        for i, (t, o) in enumerate(zip(texts, options, strict=True))
    ]
    lambada = [{"text": t.rstrip(".")} for t in texts]
    splits = ("train", "validation", "test")
    return {
        "baber/piqa": {"default": dict.fromkeys(splits, piqa)},
        "allenai/ai2_arc": {name: dict.fromkeys(splits, arc) for name in ("ARC-Easy", "ARC-Challenge")},
        "Rowan/hellaswag": {"default": dict.fromkeys(splits, hellaswag)},
        "allenai/winogrande": {name: dict.fromkeys(splits, winogrande) for name in ("winogrande_xl", "winogrande_xs")},
        "aps/super_glue": {"boolq": dict.fromkeys(splits, boolq), "cb": dict.fromkeys(splits, boolq)},
        "allenai/openbookqa": {name: dict.fromkeys(splits, openbook) for name in ("main", "additional")},
        "EleutherAI/lambada_openai": {"default": {"test": lambada}, "en": {"test": lambada}},
    }


def opt(folder: Path, seed: int = 0) -> Path:
    """A two-layer OPT of one token a byte, trained for a second so that it is better than chance."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    from tests.support.tiny import save_tokenizer

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64}
    ends = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256}
    model = OPTForCausalLM(OPTConfig(vocab_size=288, max_position_embeddings=2048, dropout=0.0, **shape, **ends))
    save_tokenizer(folder)
    text = torch.tensor(AutoTokenizer.from_pretrained(folder).encode(" \n".join(sentences(600, seed))))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        ids = torch.stack([text[s : s + 64] for s in torch.randint(0, len(text) - 64, (16,)).tolist()])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.to(torch.float16).save_pretrained(folder)
    return folder


def _tables(folder: Path, name: str, configurations: Mapping[str, Mapping[str, Rows]]) -> Content:
    """A data set of Parquet files, a folder for each configuration where there are several."""
    home = folder / name.replace("/", "--")
    card: dict[str, dict[str, str]] = {}
    for configuration, splits in configurations.items():
        below = configuration if len(configurations) > 1 else "data"
        for split, rows in splits.items():
            _parquet(home / below / f"{split}-00000-of-00001.parquet", rows)
        card[configuration] = {split: f"{below}/{split}-*" for split in splits}
    _card(home, card)
    return Content("datasets", name, home)


def _parquet(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), file)


def _card(folder: Path, configurations: Mapping[str, Mapping[str, str]]) -> None:
    """The README of a data set, whose head tells configurations and splits."""
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configurations.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False)}---\n\nMade by tests.\n")
