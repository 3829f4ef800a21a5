"""The sections of a run's configuration; every field says what it means, its unit and its bounds.

Each class is strict: an unknown key or a wrong type is refused (:mod:`search.config.run_config` turns that into one
line).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from paretoprune.base.image_size import ImageSize, sizes_text
from paretoprune.base.stored_size import GivenSize
from paretoprune.pruning.names import (
    STRUCTURAL,
    DeployFormat,
    PrecisionName,
    RecoveryName,
    RuntimeName,
    SpanName,
    StrategyName,
)
from paretoprune.pruning.yolo.image_size import check_image_size
from paretoprune.search.config.latency_target import LatencyTarget

BY_TASK = "default_by_task"  # in a field's schema: its default depends on the model's task
CommandRuntime = Annotated[str, Field(pattern=r"^command:[a-z0-9][a-z0-9_-]{0,31}$", title="command:NAME")]
LatencyRuntime = RuntimeName | Literal["ncnn"] | CommandRuntime
DeviceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{0,15}$", title="NAME")]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of the sections: frozen, nothing unknown allowed, field docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(Section):
    """The trained model that is pruned."""

    path: str = Field(examples=["my.pt"])
    """Ultralytics checkpoint (.pt), a path or a name that Ultralytics knows."""
    imgsz: GivenSize = 640
    """Side of the input, pixels, or [height, width]; multiples of the model's largest stride, and of 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trials; "auto" takes the GPU assigned to the trial, else the CPU."""
    trust_checkpoint: bool = False
    """Load ``path`` and the checkpoints made from it even if they contain arbitrary pickled code, such as your own
    classes. This can execute code, in every process of the run."""

    @field_validator("imgsz")
    @classmethod
    def _of_whole_strides(cls, value: ImageSize) -> ImageSize:
        check_image_size(value)
        return value


class DataSection(Section):
    """The dataset that trials train and validate on."""

    path: str = Field(examples=["my/data.yaml"])
    """The dataset's data.yaml; a classifier's folder with train/ and val/."""
    classes: list[int | str] | None = Field(default=None, min_length=1)
    """Names or numbers of the classes that are kept, in the network and in the dataset (docs/families.md); none given:
    all."""
    val_batch: int = Field(default=16, ge=1)
    """Images per batch in validation."""


class SpaceSection(Section):
    """Which widths, branches, input sizes and precisions the search may choose."""

    imgsz: list[GivenSize] | None = None
    """Sizes of the input at which trials may work besides ``model.imgsz``, which is always one of them: sides of
    squares, pixels, or pairs [height, width]; none given: the sizes below it and of its shape down to 0.6 of it in
    steps of the model's largest stride, at most 5 in all. A list of ``model.imgsz`` alone (or of nothing) leaves the
    size as it is."""
    precision: list[PrecisionName] | None = None
    """Precisions that the files of trials may compute in (``deploy.format`` says in which format); none given:
    ``deploy.precision`` alone. The first is that of the unpruned model beside which all latencies are measured:
    ``deploy.precision``, where that is given."""
    depth: bool = True
    """Whether trials may also remove repeated units of a block (bottlenecks, attention blocks) whole; ``paretoprune
    layers`` lists them as branches."""
    granularity: Literal["layer", "block"] = "layer"
    """One axis per prunable group ("layer"), or one per block of the network ("block")."""
    round_to: int = Field(default=8, ge=1)
    """Round widths to a multiple of this many channels."""
    min_ratio: Ratio = 0.0
    """Minimum fraction of channels removed on every axis."""
    max_ratio: Ratio = 0.7
    """Maximum fraction of channels removed on every axis."""
    blocks: list[int] | None = None
    """Numbers of the blocks that may be pruned; none given: all."""
    exclude: list[str] = []
    """Patterns of layers that keep their width (``model.22.*``); a pattern that matches nothing is an error."""
    layer_bounds: dict[str, tuple[Ratio, Ratio]] = {}
    """Layer or pattern -> [minimum, maximum] ratio, instead of min_ratio and max_ratio. A name takes precedence over a
    pattern, a longer pattern over a shorter one, the later of two equals over the earlier."""

    @field_validator("imgsz")
    @classmethod
    def _different(cls, value: list[ImageSize] | None) -> list[ImageSize] | None:
        for size in value or ():
            check_image_size(size)
        if value and len(set(value)) != len(value):
            raise ValueError(f"every size must be given once, got {sizes_text(value)}")
        return value

    @field_validator("precision")
    @classmethod
    def _each_once(cls, value: list[PrecisionName] | None) -> list[PrecisionName] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError(f"one precision or more, each once, got {', '.join(value) or 'none'}")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> SpaceSection:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio must not be greater than max_ratio, got {self.min_ratio} and {self.max_ratio}")
        for name, (low, high) in self.layer_bounds.items():
            if low > high:
                raise ValueError(
                    f"the minimum in layer_bounds of {name} must not be greater than the maximum, got [{low}, {high}]"
                )
        return self


def _describe_objectives(schema: dict[str, Any]) -> None:
    """Add what only the module of the metrics knows; it is imported where the meaning is asked for."""
    from paretoprune.results.store.objectives import DIRECTIONS

    schema["description"] += f" There are {', '.join(DIRECTIONS)}, and latency_ms_NAME of latency.targets."
    schema[BY_TASK] = True


class SearchSection(Section):
    """How the space is explored."""

    trials: int = Field(default=50, ge=1)
    """Number of finished trials after which the run ends."""
    sampler: Literal["gp", "optuna-gp", "tpe", "nsga2", "random"] = "gp"
    """Proposes the plans: "gp" is paretoprune's own, for any number of trials; the others are Optuna's
    (docs/search.md)."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random in the run."""
    objectives: list[str] = Field(default=["map50_95", "latency_ms"], json_schema_extra=_describe_objectives)
    """Metrics of the front, two or three; none given: the main accuracy of the model's task (a classifier's is top1)
    and latency_ms, with ``latency.targets`` theirs, too (theirs alone where ``latency.target`` is "own")."""
    warm_start: bool = True
    """Begin with plans by sensitivity, whose cut is shared between input size and widths: the first 6 trials."""
    loggers: list[Literal["mlflow", "wandb"]] = []
    """Experiment trackers that log every trial, through Ray's own integrations."""
    initial_plans: list[str] = []
    """Plan files to evaluate first."""
    warm_start_run: str | None = None
    """Folder of another run on the same model; its trials warm-start the sampler."""
    early_stopping: bool = True
    """Stop unpromising trials early: those clearly dominated by trials of similar cost; first decided before the first
    epoch."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """About one trial in this many continues past a rung; also the factor from rung to rung: these are at 0 epochs, and
    at
    the epochs divided by its powers."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Maximum latency, ms; slower plans are not trained."""
    max_latency_ratio: float | None = Field(default=None, gt=0)
    """Maximum latency as a fraction of the unpruned model's; slower plans are not trained."""
    min_speedup: float | None = Field(default=None, gt=0)
    """Minimum speed-up over the unpruned model; slower plans are not trained."""
    max_params_m: float | None = Field(default=None, gt=0)
    """Maximum number of parameters, millions; larger plans are not trained."""
    max_gflops: float | None = Field(default=None, gt=0)
    """Maximum GFLOPs; plans with more are not trained."""
    min_map: float | None = Field(default=None, ge=0, le=1)
    """Minimum accuracy (mAP50-95, a classifier's top-1)."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop starting trials after this many wall-clock hours of this start."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """Stop starting trials after this many GPU hours of the whole run (on CPUs: hours of a trial's CPUs)."""

    @field_validator("objectives")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        from paretoprune.results.store.objectives import DIRECTIONS, is_objective

        unknown = [name for name in value if not is_objective(name)]
        if unknown:
            raise ValueError(f"objectives must be of {', '.join(DIRECTIONS)}, got {', '.join(unknown)}")
        if len(set(value)) != len(value) or not 2 <= len(value) <= 3:
            raise ValueError(f"two or three different objectives are needed, got {value}")
        return value


class RecoverSection(Section):
    """Recovery right after removal, before any label is used."""

    method: RecoveryName = "refit"
    """Nothing, batch-norm statistics, least-squares refit of the consumers, both, or a refit and then gradient steps
    towards the unpruned network's outputs on the calibration images."""
    importance: str = "reconstruction"
    """Importance criterion that chooses the channels to remove (docs/recovery.md lists them)."""
    calibration_images: int = Field(default=128, ge=1)
    """Number of training images for the refit and the criterion."""


class TrialSection(Section):
    """Pruning and short fine-tuning in a trial."""

    strategy: StrategyName = STRUCTURAL
    """How channels are removed (docs/strategies.md); sequential searches each block's first layer only."""
    epochs: int = Field(default=1, ge=0)
    """Epochs of fine-tuning; 0 evaluates a trial right after the refit."""
    steps: int = Field(default=1000, ge=0)
    """Maximum number of optimizer steps of the fine-tuning, all epochs together: of more training images an epoch takes
    a sample by class, the same for all trials; 0: no maximum."""
    val_images: int = Field(default=2000, ge=0)
    """Maximum number of validation images by which a trial is judged; of more a sample by class, the same for all
    trials. Finished networks are judged on all; 0: trials, too."""
    batch: int = Field(default=16, ge=1)
    """Images per training batch."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; none given: chosen from the number of steps."""
    workers: int = Field(default=4, ge=0)
    """Processes that load images for a GPU; on a CPU there are none."""
    distill: bool = True
    """Distil: learn the unpruned model's outputs, without labels."""
    amp: bool = True
    """Mixed precision (bf16) in trials and full fine-tuning, on a device that gains by it: most GPUs, CPUs with AMX."""

    @model_validator(mode="after")
    def _a_step_in_each_epoch(self) -> TrialSection:
        if 0 < self.steps < self.epochs:
            raise ValueError(f"steps must be 0 or at least as many as epochs, got {self.steps} and {self.epochs}")
        return self


class FinetuneSection(Section):
    """The full fine-tuning of the picks."""

    epochs: int = Field(default=50, ge=1)
    """Maximum number of epochs."""
    patience: int = Field(default=20, ge=0)
    """Stop after this many epochs without a better validation; 0: never."""
    batch: int = Field(default=16, ge=1)
    """Images per training batch."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; none given: chosen from the number of steps."""
    workers: int = Field(default=4, ge=0)
    """Processes that load images for a GPU; on a CPU there are none."""
    distill: bool = False
    """Distil: learn the unpruned model's outputs, without labels."""
    teacher: str | None = None
    """Checkpoint of a network of the same task and classes, a larger one mostly, whose outputs are learned beside the
    labels (docs/recovery.md)."""
    train: dict[str, bool | int | float | str | list[float] | None] = {}
    """Ultralytics' training arguments for augmentation and the weights of losses (``mosaic``, ``degrees``, ``box``,
    ...), instead of those of the checkpoint's own training (docs/recovery.md)."""
    gpus_per_pick: int = Field(default=1, ge=1)
    """GPUs of one machine that train a pick together, each with its share of the batch, which must be a
    multiple of them; not used without GPUs."""
    trust_checkpoint: bool = False
    """The same as ``model.trust_checkpoint`` for the teacher and --native models. A native one that is the run's model
    follows that setting."""

    @model_validator(mode="after")
    def _one_teacher(self) -> FinetuneSection:
        if self.teacher is not None and self.distill:
            raise ValueError(
                "`finetune.distill` learns the unpruned model alone: set it off (--no-distill) for a teacher"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> FinetuneSection:
        if self.batch % self.gpus_per_pick:
            raise ValueError(f"batch must be a multiple of gpus_per_pick, got {self.batch} and {self.gpus_per_pick}")
        return self


class DeploySection(Section):
    """What ships: trials and picks are judged as files of this format, run in this precision."""

    format: DeployFormat = "torch"
    """Format of Ultralytics' export (docs/export.md); torch: the network in PyTorch, timed as `latency` says."""
    precision: PrecisionName = "fp32"
    """What the file computes in; int8 is calibrated on training images."""
    calibration_images: int = Field(default=64, ge=1)
    """Number of training images for int8."""
    when: Literal["trials", "picks"] = "trials"
    """Judge every trial as what ships, or the picks alone, for formats that take long to make: trials are then judged
    in PyTorch."""

    @property
    def in_trials(self) -> bool:
        """Whether a trial's accuracy and latency are those of its file."""
        return self.format != "torch" and self.when == "trials"

    @model_validator(mode="after")
    def _a_format_for_the_precision(self) -> DeploySection:
        if self.format == "torch" and self.precision != "fp32":
            raise ValueError(f"precision {self.precision} needs a format to export to, e.g. openvino, got torch")
        return self


class DeviceSection(Section):
    """A further kind of device, whose latency is measured beside that of ``latency.target``."""

    target: str
    """Address of its agent, "http://HOST:PORT"; several of like devices, separated by commas."""
    runtime: LatencyRuntime | None = None
    """Inference runtime on it; none given: ``latency.runtime``."""
    half: bool = False
    """FP16/BF16 instead of FP32, if it supports it natively."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of an inference there; none given: as the runtime chooses."""

    @model_validator(mode="before")
    @classmethod
    def _an_address(cls, value: object) -> object:
        return {"target": value} if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _an_agent(cls, value: str) -> str:
        if not LatencyTarget.parse(value).agents:
            raise ValueError(f"a further kind of device needs an agent, http://HOST:PORT, got {value!r}")
        return value


class LatencySection(Section):
    """How latency is measured, always beside the unpruned baseline."""

    span: SpanName = "network"
    """What is timed: the network up to the decoded boxes ("network"), or Ultralytics' whole predict on validation
    images, with pre-processing and non-maximum suppression ("predict"), in PyTorch or of the file that ships
    (``deploy.format``)."""
    batch: int = Field(default=1, ge=1)
    """Images per inference."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of an inference; none given: all cores but one, at most 8."""
    max_seconds: float = Field(default=2.0, gt=0)
    """Maximum seconds per measurement; other trials on the device are paused meanwhile. Up to four times as long if the
    interval would otherwise be wider than ±10 %; the final comparison takes four times as long for each network."""
    target_halfwidth: float = Field(default=0.01, gt=0)
    """Stop measuring once the 95 % interval of the speed-up has this relative half width (0.01 is one per cent)."""
    runtime: LatencyRuntime = "torch"
    """Inference runtime (docs/latency.md); on an agent also ncnn, and "command:NAME", a command that was given at its
    start. Trials that are judged as files (``deploy.format``) are timed by the format's own where this is torch."""
    half: bool = False
    """FP16/BF16 instead of FP32, if the device supports it natively."""
    target: str = "own"
    """Where: "own" (the trial's device), "cpu:N" (its host's CPU with N threads), "node:RESOURCE" (a node of the
    cluster with that custom resource) or "http://HOST:PORT" (an agent on a device; several of like devices, separated
    by commas)."""
    targets: dict[DeviceName, DeviceSection] = {}
    """Further kinds of devices: name -> address of the agent, or {target, runtime, half, threads}. Each times every
    trial, too; its latency is the metric and objective ``latency_ms_NAME``."""
    token_file: str | None = None
    """File that holds the agent's token, where ``PARETOPRUNE_AGENT_TOKEN`` is not set."""
    wait_minutes: float = Field(default=30, ge=0)
    """How long a measurement waits for an agent that is away, minutes."""
    if_away: Literal["fail", "predict"] = "fail"
    """What becomes of a trial whose agent stays away longer: it fails, or keeps its predicted latency, marked as
    predicted."""

    @field_validator("target")
    @classmethod
    def _a_target(cls, value: str) -> str:
        LatencyTarget.parse(value)
        return value

    @model_validator(mode="after")
    def _one_number_of_threads(self) -> LatencySection:
        wanted = LatencyTarget.parse(self.target).threads
        if wanted is not None and self.threads not in (None, wanted):
            raise ValueError(f"`target` asks for {wanted} threads and `threads` for {self.threads}")
        return self

    def on(self, device: str) -> LatencySection:
        """How it is measured on a further kind of device."""
        its = self.targets[device]
        runtime = its.runtime or self.runtime
        changed = {"target": its.target, "runtime": runtime, "half": its.half, "threads": its.threads, "targets": {}}
        return self.model_copy(update=changed)

    def everywhere(self) -> dict[str, LatencySection]:
        """Name of the kind of device -> how it is measured there; the main one, ``latency.target``, is ""."""
        return {"": self, **{name: self.on(name) for name in self.targets}}


class ResourcesSection(Section):
    """Where trials run and how many at a time."""

    address: str | None = None
    """A Ray cluster to join (``auto``, ``host:6379``); none given, or "local": Ray is started on this machine."""
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """GPUs, or the fraction of one, per trial."""
    cpus_per_trial: int | None = Field(default=None, ge=1)
    """CPU cores per trial."""
    shared_storage: bool = True
    """All nodes of a joined cluster see the run folder at its path; if not, workers send their files to the driver."""
    wait_minutes: float = Field(default=30, ge=0)
    """Maximum wait, minutes, for a node that fits a trial, if a joined cluster has none yet; 0: fail at once."""
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """Maximum number of concurrent trials; none given: as many as fit. An autoscaling cluster adds nodes for more."""
