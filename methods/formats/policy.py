"""The artefact format `policy`: any base, and beside it what it asks the engine to do while it runs.

The folder holds the files of the base as they are, and `policy.json`:

    {"format": "slimbench policy", "schema": 1, "base": FORMAT, "slots": {SLOT: {"kind": KIND, …}}, "scoring": SCORING, "max_batch": N}

A slot is a part of the run that a policy decides on: `attention`, `cache`, `depth`, `experts`, `draft`, `route`; each is filled once, in
the order of the steps that fill them. Its other fields are the settings of the kind. The kinds that there are:

    cache      quantized      keys and values in few bits (`methods.formats.kv.cache.OwnCache`)
               transformers   the quantized cache of transformers (`TransformersCache`)
               prefix         virtual tokens before every text (`methods.formats.kv.prefix.Prefix`)
               window         the first tokens and the newest
               eviction       the tokens of the highest score
               latent         a vector of few numbers for all heads
    attention  strided, fixed, longformer, bigbird, blockbert     a fixed set of earlier tokens (`methods.formats.attention.patterns`)
               lsh, routing, sinkhorn                             a set that queries and keys decide on (`…content`)
               pages          the pages of the cache that can matter to a token
               hyper          blocks of alike tokens and samples, for prompts
               pooled         summaries of earlier parts of a text
               vq             codes in place of old keys
               linear         a state of constant size in place of earlier tokens
               span           each head sees as far back as it learned to
               entmax         weights of which some are exactly 0
    depth      exit           tokens leave at the first exit that is sure of them
               router         a token runs the blocks whose router lets it in
               contrast       logits against those of an early block
               reduction      tokens of a prompt that get little attention end in an early block
    draft      lookup, exit   the next tokens are guessed, from the text or by the first blocks (`methods.formats.draft.policy`)
               model          another model guesses them

Those of `attention` and the other ones of `cache` and `depth` lie in `methods.formats.attention` and `methods.formats.depth`, in modules of
their names.

Tensors that a policy brings lie in `policy.safetensors` as `SLOT.NAME`; a model that it brings is an artefact of its own in the folder
`SLOT`, of the format that its settings name.

`scoring` says by which passes a whole text may be scored with the policy in force: `exact` (in any pieces, the same numbers come out),
`chunk` (in pieces of the policy's own length), `step` (token by token), `suffix` (behind a prompt alone), `none`. `max_batch` is the
largest batch, null without a limit; of several policies the strictest hold. The base is what the loader of its format makes; the policies
are then installed on that module, in their order, which holds `slots`, `scoring` and `max_batch` from then on. `conflict` says which of
them act together.
"""

from __future__ import annotations

import importlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from slimbench.methods.base import ANY_BASE, DENSE, HUGGINGFACE, POLICY, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.formats.huggingface import link_files, link_source

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = POLICY
DESCRIPTION = "policy.json"
TENSORS = "policy.safetensors"
SCHEMA = 1
ADDED = (*ANY_BASE, FORMAT)
"""Formats that a method can follow which only adds a policy."""
Slot = Literal["attention", "cache", "depth", "experts", "draft", "route"]
Scoring = Literal["exact", "chunk", "step", "suffix", "none"]
"""From the least to the most that a policy asks: of several, that of the strictest holds."""

_BROUGHT = "tensors"
_BESIDE = "model"
BROUGHT_MODEL = {_BESIDE: True}
"""Metadata of a field that holds the folder of a model which a policy brings; it is no setting, and None where only settings are known."""
_FORMATS = "slimbench.methods.formats"
_KINDS = {
    ("cache", "quantized"): f"{_FORMATS}.kv.cache.OwnCache",
    ("cache", "transformers"): f"{_FORMATS}.kv.cache.TransformersCache",
    ("cache", "prefix"): f"{_FORMATS}.kv.prefix.Prefix",
    ("cache", "window"): f"{_FORMATS}.attention.window.Window",
    ("cache", "latent"): f"{_FORMATS}.attention.latent.Latent",
    ("cache", "eviction"): f"{_FORMATS}.attention.eviction.Eviction",
    ("depth", "exit"): f"{_FORMATS}.depth.exit.EarlyExit",
    ("depth", "router"): f"{_FORMATS}.depth.router.Router",
    ("depth", "contrast"): f"{_FORMATS}.depth.contrast.Contrast",
    ("depth", "reduction"): f"{_FORMATS}.depth.reduction.Reduction",
    ("draft", "lookup"): f"{_FORMATS}.draft.policy.Lookup",
    ("draft", "exit"): f"{_FORMATS}.draft.policy.Exit",
    ("draft", "model"): f"{_FORMATS}.draft.policy.Model",
    ("attention", "lsh"): f"{_FORMATS}.attention.content.Lsh",
    ("attention", "routing"): f"{_FORMATS}.attention.content.Routing",
    ("attention", "sinkhorn"): f"{_FORMATS}.attention.content.Sinkhorn",
    ("attention", "hyper"): f"{_FORMATS}.attention.hyper.Hyper",
    ("attention", "pages"): f"{_FORMATS}.attention.pages.Pages",
    ("attention", "pooled"): f"{_FORMATS}.attention.pooled.Pooled",
    ("attention", "vq"): f"{_FORMATS}.attention.vq.VQ",
    ("attention", "span"): f"{_FORMATS}.attention.span.Span",
    ("attention", "entmax"): f"{_FORMATS}.attention.entmax.Entmax",
    ("attention", "linear"): f"{_FORMATS}.attention.linear.Linear",
    ("attention", "strided"): f"{_FORMATS}.attention.patterns.Strided",
    ("attention", "fixed"): f"{_FORMATS}.attention.patterns.Fixed",
    ("attention", "longformer"): f"{_FORMATS}.attention.patterns.Longformer",
    ("attention", "bigbird"): f"{_FORMATS}.attention.patterns.BigBird",
    ("attention", "blockbert"): f"{_FORMATS}.attention.patterns.BlockBert",
}


def tensors() -> Any:
    """A field of a policy that holds tensors by name; they are no settings, and none where only the settings are known."""
    return field(default_factory=dict, repr=False, compare=False, metadata={_BROUGHT: True})


class Policy(ABC):
    """What one slot does; a frozen dataclass whose fields are its settings.

    Class attributes:
        slot: The part of the run that it decides on.
        kind: Its name among those of the slot.
        attends: It computes attention in its own way, whatever the engine is told.
        shortens: Later blocks hold fewer tokens of a prompt than came, decided when it goes through an empty cache at once.
        trainable: Gradients go through what it makes of a whole text, so that the weights below can learn with it in force.
    """

    slot: ClassVar[Slot]
    kind: ClassVar[str]
    attends: ClassVar[bool] = False
    shortens: ClassVar[bool] = False
    trainable: ClassVar[bool] = False

    @property
    @abstractmethod
    def scoring(self) -> Scoring:
        """By which passes a text may be scored with it in force."""

    @property
    def max_batch(self) -> int | None:
        """The largest batch that it runs with; None without a limit."""
        return None

    @property
    def rolls_back(self) -> bool:
        """Whether what it keeps can let go of tokens that were guessed wrongly, and is then as if they had never come."""
        return True

    @property
    def reach(self) -> int | None:
        """Positions from a token back to the farthest that it attends to, both included, at most, however long the text is; None where
        they grow with it, and with them what a model was never trained on.
        """
        return None

    @property
    def reads_queries(self) -> bool:
        """Whether what it keeps depends on the queries of all tokens, so that each of them must run each block."""
        return False

    @abstractmethod
    def neutral(self) -> Policy:
        """The setting at which the base is reproduced."""

    @abstractmethod
    def check(self, shape: ModelShape) -> None:
        """Raise `Unsupported`, in one line, if it does not fit a model."""

    @abstractmethod
    def install(self, model: Any) -> None:
        """Put it in force on a loaded module."""


class Acts(ABC):
    """A method whose artefact acts while a model runs.

    Class attributes:
        slot: The part of the run that its policy decides on.
        fitted_at: Settings that nothing is fitted by, each with a value at which artefacts are made that all of its values share.
    """

    slot: ClassVar[Slot]
    fitted_at: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def policy(self) -> Policy:
        """What it asks the engine to do, as far as its settings tell: without tensors, and without what depends on the model."""

    def write_settings(self, fitted: DenseModel, out: Path) -> Claim:
        """Write the artefact of these settings from that of `fitted_at`, and claim what is not as it was; of those that have some alone."""
        raise NotImplementedError


class ActsByModel(Acts):
    """A method whose artefact holds another model, which guesses.

    Attributes:
        model: That of `conf/model` which it is made of, smaller and of the same tokens; None: the model itself.
    """

    model: str | None

    @abstractmethod
    def check_draft(self, shape: ModelShape) -> None:
        """Raise `Unsupported`, in one line, if the settings do not fit the model that guesses."""


LAST = "a draft guesses for all that acts, so it comes last"


def conflict(first: Policy, second: Policy, names: tuple[str, str]) -> str | None:
    """Why two policies do not act together, whatever their order, in a line; None where they do.

    Args:
        names: Of what brings each.
    """
    held: dict[str, Policy] = {policy.slot: policy for policy in (first, second)}
    name: dict[str, str] = {policy.slot: f"'{own}'" for policy, own in zip((first, second), names, strict=True)}
    if first.slot == second.slot:
        return f"both decide on the slot {first.slot}; leave one of the two out"
    if held.keys() == {"attention", "cache"}:
        if held["attention"].kind == "linear":
            return f"with {name['attention']} there is no KV cache left"
        if held["cache"].attends:
            return "each brings an attention of its own, and a layer has one"
        return f"{name['attention']} attends to keys and values that it keeps itself, not to those of {name['cache']}"
    other = next((slot for slot in ("attention", "cache") if slot in held), None)
    if held.keys() == {"depth", "draft"} and held["draft"].kind == "exit":
        return "both decide which blocks run for a token"
    if other and "depth" in held and held["depth"].shortens:
        if held[other].attends:
            return f"{name[other]} counts positions by the tokens that a block holds, and {name['depth']} leaves later blocks fewer"
        return f"{name['depth']} asks for a whole prompt and an empty cache; {name[other]} takes a prompt in pieces, or is never empty"
    if other and "depth" in held and held["depth"].attends and held[other].reads_queries:
        lost = "attention weights" if other == "cache" else "queries"
        return f"blocks that {name['depth']} skips have no {lost}, which {name[other]} needs of every token"
    if other and "draft" in held and not held[other].rolls_back:
        return f"the {other} {name[other]} cannot roll back a rejected draft"
    return None


def untrainable(base: str, acting: Mapping[str, Policy]) -> str | None:
    """Why the weights below policies cannot learn with these in force, in a line; None where they can.

    Args:
        base: Format of the weights.
        acting: The policies, each by the name of what brings it.
    """
    if base not in DENSE:
        return f"below the policy lies {base}, whose weights do not learn"
    stiff = next((name for name, policy in acting.items() if not policy.trainable), None)
    return f"no weight learns with '{stiff}' in force" if stiff else None


def save(policy: Policy, dense: DenseModel, out: Path) -> None:
    """Write the base as it is, and the policy with its tensors beside it, after those that are there; a model that it brings lies in the
    folder of its slot already.

    Raises:
        Unsupported: The policy cannot be installed on a model of this kind, or does not act together with one that is there.
    """
    from safetensors.torch import save_file

    earlier: list[Policy] = []
    base, slots = dense.format, dict[str, Any]()
    if dense.format == FORMAT:
        earlier, base = read(dense.path)
        slots = json.loads((dense.path / DESCRIPTION).read_text())["slots"]
    for there in earlier:
        if reason := LAST if there.slot == "draft" else conflict(there, policy, (there.kind, policy.kind)):
            raise Unsupported(f"the policy '{policy.kind}' cannot follow '{there.kind}': {reason}")
    fits(policy, dense.path)
    every = [*earlier, policy]
    if dense.format == HUGGINGFACE:
        link_source(dense, out)
    else:
        link_files(dense.path, out, () if not earlier else (DESCRIPTION, TENSORS))
    if brought := {f"{p.slot}.{key}": value for p in every for name in _held(p, _BROUGHT) for key, value in getattr(p, name).items()}:
        save_file({key: value.detach().cpu().contiguous() for key, value in brought.items()}, out / TENSORS, metadata={"format": "pt"})
    described = {
        "format": f"slimbench {FORMAT}",
        "schema": SCHEMA,
        "base": base,
        "slots": slots | {policy.slot: _settings(policy)},
        "scoring": _strictest(every),
        "max_batch": _smallest(every),
    }
    (out / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")


def replaced(policy: Policy, dense: DenseModel, out: Path) -> None:
    """Write an artefact again, with other settings of one of its policies; its tensors are those that are there."""
    every = [policy if each.slot == policy.slot else each for each in read(dense.path)[0]]
    described = json.loads((dense.path / DESCRIPTION).read_text())
    described["slots"][policy.slot] = _settings(policy)
    link_files(dense.path, out, (DESCRIPTION,))
    described |= {"scoring": _strictest(every), "max_batch": _smallest(every)}
    (out / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")


def keep(dense: DenseModel, out: Path) -> None:
    """Put the policies of an artefact beside a base that was written again; none of them brings a model, as drafts come last."""
    for name in (DESCRIPTION, TENSORS):
        if (dense.path / name).is_file():
            shutil.copyfile(dense.path / name, out / name)


def _settings(policy: Policy) -> dict[str, Any]:
    """Kind and settings of a policy, without what it brings."""
    bare: Any = replace(policy, **{name: {} for name in _held(policy, _BROUGHT)})  # type: ignore[type-var]
    told = {name: value for name, value in asdict(bare).items() if name not in _held(policy, _BROUGHT, _BESIDE)}
    return {"kind": policy.kind} | told


def _strictest(policies: Sequence[Policy]) -> Scoring:
    """By which passes a text may be scored with all of them in force."""
    return max((policy.scoring for policy in policies), key=get_args(Scoring).index)


def _smallest(policies: Sequence[Policy]) -> int | None:
    """The largest batch that all of them run with."""
    return min((policy.max_batch for policy in policies if policy.max_batch), default=None)


def fits(policy: Policy, folder: Path) -> None:
    """Install it on the model of a folder without data; a model that brings code of its own is not tried.

    Raises:
        Unsupported: It cannot be installed there.
    """
    if not json.loads((folder / "config.json").read_text()).get("auto_map"):
        policy.install(skeleton(folder))


def skeleton(folder: Path) -> Any:
    """The model of a folder without data, under the policies that lie there."""
    from slimbench.methods.formats import storage

    model = storage.skeleton(folder)
    for policy in read(folder)[0] if (folder / DESCRIPTION).is_file() else ():
        policy.install(model)
    return model


def base_of(dense: DenseModel) -> DenseModel:
    """The model below the policies of an artefact: the same files, of the format of the base."""
    return replace(dense, format=read(dense.path)[1]) if dense.format == FORMAT else dense


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """Load the base in evaluation mode and put the policies in force, in their order.

    Raises:
        ValueError: The schema is newer than this program, or it knows no such slot, kind or base.
    """
    policies, base = read(folder)
    model = load_base(folder, base, device, trust_remote_code)
    for policy in policies:
        policy.install(model)
    model.slots = [policy.slot for policy in policies]
    model.scoring, model.max_batch = _strictest(policies), _smallest(policies)
    return model


def read(folder: Path) -> tuple[list[Policy], str]:
    """The policies of an artefact, their tensors on the CPU, and the format of its base. Errors as of `load`."""
    from safetensors.torch import load_file

    described = json.loads((folder / DESCRIPTION).read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"{FORMAT} schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    brought = load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    return [_policy(slot, brought, folder, **settings) for slot, settings in described["slots"].items()], described["base"]


def load_base(folder: Path, base: str, device: str, trust_remote_code: bool = False) -> Any:
    """The model of a folder, in evaluation mode; raises `ValueError` for a format that no policy sits on."""
    if base not in ANY_BASE:
        raise ValueError(f"a policy does not sit on the format '{base}'")
    module = HUGGINGFACE if base == "bitsandbytes" else base
    return importlib.import_module(f"{_FORMATS}.{module}").load(folder, device, trust_remote_code)


def _policy(slot: str, brought: dict[str, Tensor], folder: Path, kind: str, **settings: Any) -> Policy:
    path = _KINDS.get((slot, kind))
    if path is None:
        raise ValueError(f"there is no policy '{kind}' for the slot '{slot}'")
    module, _, name = path.rpartition(".")
    made: type[Policy] = getattr(importlib.import_module(module), name)
    own = {key.removeprefix(f"{slot}."): value for key, value in brought.items() if key.startswith(f"{slot}.")}
    beside = dict.fromkeys(_held(made, _BESIDE), folder / slot)
    return made(**settings, **dict.fromkeys(_held(made, _BROUGHT), own), **beside)


def _held(policy: Policy | type[Policy], *what: str) -> list[str]:
    """The fields of a policy that hold tensors, or a model, and no settings."""
    return [f.name for f in fields(policy) if any(f.metadata.get(kind) for kind in what)]  # type: ignore[arg-type]
