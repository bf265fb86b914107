"""CTranslate2 on a CPU, in float32; a dense artefact is converted when it is loaded (nothing is kept).

What its interface does not let the harness do:

- The KV cache is out of reach: tokens cannot be processed in chunks of one's own, so the protocol `incremental` is unsupported, and
  the size of the cache is unknown.
- There is no call for one step. Decoding is the library's own greedy loop, on a thread of its own; it calls back after each token,
  and the harness holds it there until it wants the next one. So steps are timed as in every other engine, and nothing runs ahead.
- Logits are always computed for all positions.
- Which kernels run is not told; the evidence is read from the converted file.
"""

from __future__ import annotations

import queue
import re
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch

from slimbench.harness.engines.base import Engine
from slimbench.harness.engines.graph import Weight, evidence_of, read_config
from slimbench.harness.measure.loaded import LoadedModel, Step
from slimbench.harness.measure.zeros import zeros
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import ModelShape, Unsupported
from slimbench.util import files

_DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # in the order of the file format's codes
_EMBEDDING, _HEAD = "decoder/embeddings/weight", "decoder/projection/weight"
_BLOCK = re.compile(r"decoder/layer_(\d+)/")
_NONE: list[int] = []  # end tokens: the count is fixed


class _Numbers:
    """Stands for a tokenizer whose tokens are the ids in decimals: the harness has ids only, and the library wants strings."""

    bos_token = eos_token = unk_token = "0"

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.size)}


def load_dense(folder: Path, scratch: Path, trust_remote_code: bool = False) -> Path:
    """Convert a dense source into a scratch folder and return it.

    Raises:
        methods.base.Unsupported: The library has no converter for the architecture, one that does not know this transformers, or one that
            takes the width of a head from the hidden size where the config says another.
    """
    from ctranslate2.converters import TransformersConverter

    shape = ModelShape.from_config(read_config(folder))

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return _Numbers(shape.vocab_size)

        def _load(self) -> Any:
            spec = super()._load()
            usual = shape.hidden_size // shape.num_heads
            if shape.head_dim != usual and not hasattr(spec.decoder.layer[0].self_attention, "head_dim"):
                raise NotImplementedError(f"its heads are {shape.head_dim} wide, and the converter takes {usual}, hidden size / heads")
            return spec

    try:
        converter = Converter(str(folder), trust_remote_code=trust_remote_code)
        converter.convert(str(scratch / "model"), quantization="float32")
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise Unsupported(f"CTranslate2 does not convert this model: {error}") from error
    return scratch / "model"


class _Generation:
    """A greedy generation that stops after each token of the batch until the next one is wanted.

    Args:
        room: Tokens at most.
    """

    def __init__(self, generator: Any, ids: torch.Tensor, room: int) -> None:
        self._tokens: queue.SimpleQueue[list[int] | BaseException] = queue.SimpleQueue()
        self._wanted, self._stopped, self._row = threading.Semaphore(0), False, [0] * len(ids)
        arguments = (generator, [[str(i) for i in row] for row in ids.tolist()], room)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def next(self) -> torch.Tensor:
        """The next token of each sequence, int64 [B, 1]."""
        self._wanted.release()
        found = self._tokens.get()
        if isinstance(found, BaseException):
            raise found
        return torch.tensor(found).unsqueeze(1)

    def stop(self) -> None:
        """End the loop, wherever it is, and wait for it."""
        self._stopped = True
        self._wanted.release()
        self._thread.join()

    def _run(self, generator: Any, prompts: list[list[str]], room: int) -> None:
        self._wanted.acquire()
        try:
            generator.generate_batch(
                prompts,
                max_length=room,
                include_prompt_in_result=False,
                end_token=_NONE,
                callback=self._seen,
            )
            self._tokens.put(RuntimeError(f"no more than {room} tokens were asked for"))
        except BaseException as error:
            self._tokens.put(error)

    def _seen(self, result: Any) -> bool:
        self._row[result.batch_id] = result.token_id
        if result.batch_id == len(self._row) - 1:
            self._tokens.put(list(self._row))
            if not result.is_last:
                self._wanted.acquire()
        return self._stopped


class CTranslate2Model(LoadedModel):
    """A converted model. One generation runs at a time: a new prompt ends the one before it."""

    shares_vectors = True

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import ctranslate2

        self.vocab_size = config["vocab_size"]
        self.max_length = config.get("max_position_embeddings", 2048)
        self._weights = list(_weights(folder / "model.bin"))
        threads = torch.get_num_threads()
        self._generator = ctranslate2.Generator(str(folder), device="cpu", compute_type="float32", intra_threads=threads)
        self._running: _Generation | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        import ctranslate2

        tokens = np.ascontiguousarray(ids.numpy(), dtype=np.int32)
        lengths = np.full(len(ids), ids.shape[1], dtype=np.int32)
        inputs = [ctranslate2.StorageView.from_array(array) for array in (tokens, lengths)]
        found = np.array(self._generator.forward_batch(*inputs))
        return torch.from_numpy(found[:, start:])

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        raise Unsupported("CTranslate2 keeps its KV cache to itself: no protocol that goes through the cache can be measured")

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        self._stop()
        self._running = _Generation(self._generator, ids, room)
        return Step(self._running.next(), self._running)

    def decode_step(self, step: Step) -> Step:
        return Step(step.state.next(), step.state)

    def synchronize(self) -> None:
        pass

    def cache_bytes(self, state: Any) -> int | None:
        return None

    def evidence(self) -> Evidence:
        blocks = {found[1] for weight in self._weights if (found := _BLOCK.match(weight.name))}
        return evidence_of(self._weights, len(blocks))

    def _stop(self) -> None:
        if self._running:
            self._running.stop()
            self._running = None

    def __del__(self) -> None:
        if getattr(self, "_running", None):
            self._stop()


class CTranslate2Engine(Engine):
    """Loads dense sources through the library's converter."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        with files.scratch("ctranslate2") as scratch:
            return CTranslate2Model(loader(artefact, Path(scratch), trust_remote_code), read_config(artefact))


def _weights(file: Path) -> Iterator[Weight]:
    """The variables of a converted model, one after the other as they lie in its file; names that share one come at the end."""
    with file.open("rb") as stream:
        stream.seek(4)
        _text(stream)
        _, count = struct.unpack("<II", stream.read(8))
        for _ in range(count):
            name = _text(stream)
            rank = stream.read(1)[0]
            shape = struct.unpack(f"<{rank}I", stream.read(4 * rank))
            code, size = struct.unpack("<BI", stream.read(5))
            data, dtype = stream.read(size), _DTYPES[code]
            matrix = rank == 2 and name.endswith("weight")
            role = "other" if not matrix else "embedding" if name == _EMBEDDING else "head" if name == _HEAD else "linear"
            found = Weight(name, "variable", role, int(np.prod(shape)), Counter({dtype: size}))
            if matrix and dtype == "float32":
                found.zeros = zeros(torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape))
            if role in ("linear", "head"):
                found.operator, found.compute = f"ctranslate2 {dtype} product", dtype
            yield found


def _text(stream: IO[bytes]) -> str:
    (length,) = struct.unpack("<H", stream.read(2))
    return stream.read(length)[:-1].decode()
