"""Typed, validated configuration: what one cell may say of model, methods, engine, suite, speed and device. It imports no heavy library."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from slimbench.harness.config.sections.base import NUMBER, Real, Strict, Whole
from slimbench.harness.config.sections.suite import SuiteConfig
from slimbench.harness.config.sections.teaching import TeacherConfig
from slimbench.util import durations

OnExisting = Literal["keep", "failed", "stale", "all"]
Attention = Literal["default", "eager", "sdpa", "flash", "math", "flash_attention_2"]


class ModelConfig(Strict):
    """A dense source checkpoint.

    Attributes:
        name: How records and board call it.
        source: `asset:NAME`, `hf:ORG/NAME`, `file:FOLDER` or `random`.
        revision: Commit, tag or branch of a hub model.
        track: What kind of model it is, and so what is measured: `causal-lm` or `encoder`.
        dtype: Storage and compute dtype of the dense weights.
        parameters: Number of parameters where it is known beforehand; lets a run that cannot fit be refused early.
        source_precision: Precision of the source if it is not full, such as `q4_1`; the board shows it.
        trust_remote_code: Run Python code that the checkpoint brings along.
        shape: `config.json` fields of a randomly initialised model.
    """

    name: str = Field(min_length=1, max_length=100)
    source: str
    revision: str | None = None
    track: Literal["causal-lm", "encoder"] = "causal-lm"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    parameters: Annotated[int, NUMBER] | None = Field(default=None, gt=0, le=10**15)
    source_precision: str | None = None
    trust_remote_code: bool = False
    shape: dict[str, Any] | None = None

    @property
    def is_random(self) -> bool:
        return self.source == "random"


class StepConfig(Strict):
    """One method of a pipeline.

    Attributes:
        name: In `conf/method/`.
        target: The class behind it.
        settings: Of the class.
        draft: What `conf/model/` says of the model that its setting `model` names, in the dtype of the cell's; None where it names none.
    """

    name: str
    target: str
    settings: dict[str, Any] = {}
    draft: ModelConfig | None = None


class EngineConfig(Strict):
    """What loads and runs an artefact.

    Attributes:
        name: How records and board call it.
        target: Its class.
        loaders: Each format that it loads → dotted path of the loader.
        devices: Where it runs.
        modules: Import names that must be there.
        extra: Optional dependency group of slimbench that installs them.
        environment: Name in `slimbench env list` of the environment that the stages run in; None for the harness's own.
        spreads: The formats of those that it spreads over several cards.
        attention: By what a model attends, with the same result but for rounding: `default`, as it comes; `eager`, with all scores in
            memory; `sdpa`, torch's fused operator, and that held to one kernel: `flash` in tiles, `math` as plain products;
            `flash_attention_2`, the package flash_attn, on a card.
        attentions: What of these it takes beside `default`.
        drafts: Kinds of drafts (`methods.formats.draft.policy`) that it runs by itself, on the formats that it loads, if it loads no
            policies; of each the least and the most of every setting, null without a limit.
        without: Slots of policies (`methods.formats.policy`) that it does not run, of those that it loads.
        memory: Weights on the device: the whole `model` or a `layer` at a time; None where far more is taken than sizes tell.
        draws: It draws tokens at a temperature; otherwise it writes the likeliest one alone.
        compiles: It makes code while it runs, by a compiler in its own process.
    """

    name: str
    target: str = Field(alias="_target_")
    loaders: dict[str, str]
    devices: list[Literal["cpu", "cuda"]] = ["cpu", "cuda"]
    modules: list[str] = []
    extra: str | None = None
    environment: str | None = None
    spreads: list[str] = []
    attention: Attention = "default"
    attentions: list[Attention] = []
    drafts: dict[str, dict[str, tuple[int, int | None]]] = {}
    without: list[str] = []
    memory: Literal["model", "layer"] | None = None
    draws: bool = False
    compiles: bool = False

    @property
    def label(self) -> str:
        """Its name, and after it what of its settings makes other numbers."""
        return self.name if self.attention == "default" else f"{self.name}+{self.attention}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What its class is called with; settings that are off are left out, so that a class need not know them."""
        chosen: dict[str, Any] = {"attention": self.attention} if self.attention != "default" else {}
        return {"loaders": self.loaders} | chosen | ({"drafts": self.drafts} if self.drafts else {})

    @model_validator(mode="after")
    def _takes_attention(self) -> EngineConfig:
        if self.attention not in ("default", *self.attentions):
            able = f", it takes {', '.join(self.attentions)}" if self.attentions else "; leave it out"
            raise ValueError(f"attention={self.attention}: engine {self.name} has no such setting{able}")
        return self


class SpeedPoint(Strict):
    """One point of the grid: sequences in a batch, tokens of the prompt, tokens generated after it."""

    batch: Whole = Field(default=1, ge=1)
    prompt: Whole = Field(default=128, ge=1)
    new_tokens: Whole = Field(default=32, ge=2)


class PromptsConfig(Strict):
    """Texts that are gone on with while speed is measured.

    Attributes:
        corpus: A name from `slimbench assets list`, `file:PATH` or `hf:PATH:CONFIG:SPLIT:FIELD`; neither the suite's nor calibration text.
        count: Prompts, over all processes.
        repeats: Pairs of runs of each prompt at least.
        seed: Draws their places in the corpus.
    """

    corpus: str = Field(min_length=1)
    count: Whole = Field(default=24, ge=2, le=1000)
    repeats: Whole = Field(default=2, ge=1)
    seed: Whole = Field(default=0, ge=0)


class SpeedConfig(Strict):
    """How speed is measured.

    Attributes:
        name: How records and board call it.
        grid: Points to measure, `{batch: …, prompt: …, new_tokens: …}`, lists for their product; the first point is the headline.
        warmup: Steady runs of each model before the first sample, uncounted; the very first call is reported apart.
        processes: How many processes measure, one after the other; the interval holds the spread between them.
        min_repeats: Counted runs of all processes at least, unless the budget ends; six carry an interval.
        max_repeats: Counted runs of all processes at most.
        target: Distance of the bounds of the 95 % interval from the median, relative to it, at which repetition stops.
        budget_s: Seconds for each point, of all processes, reference included; loading apart.
        flush_cache: Overwrite the last-level cache before each run, so that small models do not live in it.
        largest_batch: Search the largest batch that fits, up to this one; None for no search.
        prompts: Texts in place of random token ids, for what depends on them; None: one prompt of random ids.
        rows: Numbers of tokens whose pass is timed behind a prompt of the headline: what checking guesses costs; None: none.
        temperature: At which tokens are drawn, those of the reference too; None: the likeliest one is written.
        ledger: Steps of decoding that are recorded for a ledger of the headline, once all is timed, and prefills in a
            quarter of their turns; None: no ledger. No other figure depends on it.
    """

    name: str
    grid: list[SpeedPoint] = Field(min_length=1)
    warmup: Whole = Field(default=1, ge=0)
    processes: Whole = Field(default=3, ge=1, le=50)
    min_repeats: Whole = Field(default=8, ge=2)
    max_repeats: Whole = Field(default=100, ge=2)
    target: Real = Field(default=0.03, gt=0, lt=1)
    budget_s: Real = Field(default=60.0, gt=0)
    flush_cache: bool = False
    largest_batch: Whole | None = Field(default=None, ge=1)
    prompts: PromptsConfig | None = None
    rows: list[Annotated[Whole, Field(ge=1)]] | None = None
    temperature: Real | None = Field(default=None, gt=0)
    ledger: Whole | None = Field(default=None, ge=4)

    @model_validator(mode="after")
    def _all_texts(self) -> SpeedConfig:
        if (asked := self.prompts) and asked.count * asked.repeats > self.max_repeats:
            raise ValueError(f"max_repeats={self.max_repeats} ends before {asked.count} prompts have {asked.repeats} repeats each")
        if asked and asked.count < 2 * self.processes:
            raise ValueError(f"{self.processes} processes need at least {2 * self.processes} prompts, not {asked.count}")
        return self

    @field_validator("grid", mode="before")
    @classmethod
    def _product(cls, grid: Any) -> Any:
        return [point for entry in grid for point in _points(entry)] if isinstance(grid, list) else grid


def _points(entry: Any) -> list[Any]:
    """The points that an entry of a grid stands for, in the order in which its lists are written."""
    if not isinstance(entry, dict):
        return [entry]
    values = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
    if empty := [key for key, value in values.items() if not value]:
        raise ValueError(f"the list of '{empty[0]}' is empty; give at least one number")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


class DeviceConfig(Strict):
    """Where a cell runs, and whose records count.

    Attributes:
        name: Where quality and speed are measured; `auto` takes a CUDA card if torch can use one.
        index: Which card, the first of several.
        cards: Cards among which one model is spread for quality and speed, where one does not hold it; compression runs on the first.
        threads: Threads of CPU operators; None for all cores. A number that is given belongs to what speed is measured with.
        compress: Where compression runs; `auto` is the only device of its methods, else where the cell is measured.
        hardware: `this`: only records of this hardware spare a stage; `any`: compression and quality of other hardware do as well.
    """

    name: Literal["auto", "cpu", "cuda"] = "auto"
    index: Whole = Field(default=0, ge=0)
    cards: Whole = Field(default=1, ge=1)
    threads: Whole | None = Field(default=None, ge=1)
    compress: Literal["auto", "cpu", "cuda"] = "auto"
    hardware: Literal["this", "any"] = "this"


class LimitsConfig(Strict):
    """Limits of one stage, at which it is ended, and how often it is tried.

    Attributes:
        wall_s: Seconds on the clock.
        memory_gb: Resident memory in GB; None for 95 % of what the machine has.
        retries: How often a stage that was cut off by the machine's fault is tried again within one run.
        retry_pause_s: Seconds before the first of these, twice as many before the second, and so on.
    """

    wall_s: Real = Field(default=7200.0, gt=0)
    memory_gb: Real | None = Field(default=None, gt=0)
    retries: Whole = Field(default=3, ge=0)
    retry_pause_s: Real = Field(default=10.0, ge=0)


Minutes = Annotated[Real, BeforeValidator(lambda value: durations.seconds(value) / 60 if isinstance(value, str) else value), Field(gt=0)]


class SizeConfig(Strict):
    """What a job asks for whose stage takes at most `needs_gb` GB at its peak; None as of the launcher."""

    needs_gb: Real = Field(gt=0)
    cards: Whole | None = Field(default=None, ge=0)
    memory_gb: Real | None = Field(default=None, gt=0)
    time: Minutes | None = None


class LauncherConfig(Strict):
    """Who brings stages to where they run.

    Attributes:
        name: `local`: this machine; `slurm`: job arrays; `ray`: tasks of a Ray cluster; `workers`: whoever runs `slimbench worker`.
        slots: Stages at a time, each on a CUDA card of its own from `device.index` on; one on a CPU, where they would disturb another.
        partition: Of SLURM, where it is not the cluster's default; `account`, `qos` and `constraint` likewise.
        account: Who pays.
        qos: Quality of service.
        constraint: Features that a node must have, such as `a100`. Speed is compared on equal hardware only.
        cards: CUDA cards of a job whose stage runs on one; 0 for stages on CPUs. `device=auto` follows it.
        cpus: CPU cores of a job; None leaves it to the cluster.
        memory_gb: Main memory of a job in GB; None leaves it to the cluster.
        time: Limit of a job, in minutes or as `4h`; None for `limits.wall_s` and some minutes. What it cuts off goes on in the next job.
        sizes: Cards, memory and time by what a stage is estimated to take, in place of those above: the first large enough entry counts.
        array: Jobs at a time; None for no limit.
        extra: Further options of sbatch, such as `{reservation: NAME}`.
    """

    name: Literal["local", "slurm", "ray", "workers"] = "local"
    slots: Whole = Field(default=1, ge=1)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cards: Whole = Field(default=0, ge=0)
    cpus: Whole | None = Field(default=None, ge=1)
    memory_gb: Real | None = Field(default=None, gt=0)
    time: Minutes | None = None
    sizes: list[SizeConfig] = []
    array: Whole | None = Field(default=None, ge=1)
    extra: dict[str, str | int | float | bool] = {}

    @property
    def is_local(self) -> bool:
        """Whether stages run on the machine that plans them."""
        return self.name == "local"


class CalibrationConfig(Strict):
    """Calibration text and how it is sampled.

    Attributes:
        source: An asset of `slimbench assets list`, `file:TEXT`, `hf:PATH:CONFIG:SPLIT:FIELD`, or `self`: what the dense model writes.
        samples: Windows.
        length: Tokens of a window.
        seed: Of the draw of the windows.
    """

    source: str = Field(min_length=1)
    samples: Whole = Field(ge=1)
    length: Whole = Field(ge=8)
    seed: Whole = Field(ge=0)


class RunConfig(Strict):
    """The whole of one cell's configuration, validated.

    Attributes:
        model: The dense source checkpoint.
        pipeline: The methods, applied one after another: `method=NAME` or `method=[FIRST,SECOND]`.
        reference: The method that everything is compared with.
        engine: What loads and runs the artefact.
        suite: What quality is measured on.
        speed: How speed is measured.
        device: Where the cell runs.
        calibration: Text for the methods that read some.
        teacher: Who writes the text for the methods that train on one.
        limits: At which a stage is ended.
        launcher: Who brings stages to where they run.
        seed: Of whatever a method draws at random, beside a seed of its own.
        stages: What is measured; a later run with the rest adds it to the same rows.
        tracking: `wandb`: each finished cell becomes a W&B run, offline without a login (WANDB_PROJECT, WANDB_DIR).
        results: Folder of the records.
        on_existing: `keep` runs what is missing only; `failed`, `stale` and `all` run those again.
    """

    model: ModelConfig
    pipeline: list[StepConfig] = Field(min_length=1)
    reference: StepConfig
    engine: EngineConfig
    suite: SuiteConfig
    speed: SpeedConfig
    device: DeviceConfig
    calibration: CalibrationConfig
    teacher: TeacherConfig = TeacherConfig()
    limits: LimitsConfig = LimitsConfig()
    launcher: LauncherConfig = LauncherConfig()
    seed: Whole = Field(default=0, ge=0)
    stages: list[Literal["quality", "speed"]] = ["quality", "speed"]
    tracking: Literal["wandb"] | None = None
    results: str = Field(default="runs", min_length=1)
    on_existing: OnExisting = "keep"

    @property
    def is_reference(self) -> bool:
        return self.pipeline == [self.reference]

    def as_reference(self) -> RunConfig:
        """The same cell with the uncompressed reference in place of the pipeline, wherever that was compressed."""
        if self.is_reference:
            return self
        return self.model_copy(update={"pipeline": [self.reference], "device": self.device.model_copy(update={"compress": "auto"})})
