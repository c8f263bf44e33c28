"""Every setting of a run. The defaults are the main job on the drifting miniature, configs/mini.yaml."""

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from mteditflow.config.distributed import DistributedConfig
from mteditflow.config.model import EMBEDDED, LoraConfig, ModelConfig
from mteditflow.config.ranges import (
    PIXELS,
    Count,
    CountOrNone,
    Range,
    Rate,
    Seed,
    Share,
    Turns,
    Weight,
    check_ranges,
    require,
)
from mteditflow.config.reward import RewardConfig

BOARDS = ("wandb", "trackio")
MIN_SESSIONS = 10
"""Held-out sessions below which no interval is given: a bootstrap of so few says next to nothing."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The tasks."""

    path: str = EMBEDDED
    """A .jsonl file of sessions, a .csv, a .parquet file, a folder, or a hub data set (docs/data.md); 'embedded' is the
    world that ships with the package."""
    allowed_folder: str = ""
    """Folder that pictures named by the data must lie in, links followed; empty: the data file's own. What is read goes
    to the judge, which may be far away."""
    held_out: str = ""
    """Sessions to evaluate on, as data.path; empty: those of a fixed share of its images."""
    held_out_share: Annotated[float, Range(0, 0.999, is_above=True)] = 0.1
    """Share of the images of data.path that is held out, by a hash of their names, where data.held_out is empty; at
    least one image."""
    fit: Literal["crop", "stretch"] = "crop"
    """How a picture becomes model.width x model.height, or one of the buckets: its largest centred part, or all of it,
    distorted (EdiVal)."""
    buckets: tuple[str, ...] = ()
    """Sizes besides model.width x model.height, WIDTHxHEIGHT in pixels, multiples of 16: a picture takes that of the
    nearest aspect; empty: none. Ours."""
    num_turns: Turns = 3
    """K, instructions per session (paper: 3); of a user's longer session the first K, shorter ones are left out."""
    seed: Seed = 0
    """Seed of the training sessions, or of their order; held-out sessions are disjoint whatever it is."""

    def __post_init__(self) -> None:
        check_ranges(self)
        is_told = self.path != ""
        require(is_told, "data.path", self.path, f"must be {EMBEDDED!r}, or where your sessions are")
        is_had = self.path != EMBEDDED or not self.held_out
        require(is_had, "data.held_out", self.held_out, "the embedded world has its own: must be empty")
        has_sizes = self.path != EMBEDDED or not self.buckets
        require(has_sizes, "data.buckets", self.buckets, "the embedded world's pictures have one size: must be empty")
        for text in self.buckets:
            require(_is_size(text), "data.buckets", text, f"must be WIDTHxHEIGHT, such as 624x416, each {PIXELS}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket."""
        return tuple((int(height), int(width)) for width, height in (text.split("x") for text in self.buckets))


def _is_size(text: str) -> bool:
    return bool(re.fullmatch(r"\d{1,5}x\d{1,5}", text, re.ASCII)) and all(
        int(side) in PIXELS for side in text.split("x")
    )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """K turns of S denoising steps by G trajectories for each of P tasks."""

    num_tasks: Count = 8
    """P, tasks per iteration, over all ranks."""
    group_size: Annotated[int, Range(2, 4096, hint="; the advantage of a trajectory is relative to its group")] = 16
    """G, trajectories per task (paper: 16); at least 2, since the advantage is relative to the group."""
    num_steps: Annotated[int, Range(2, 1000)] = 3
    """S, denoising steps per turn (paper: 12 on FLUX.1-Kontext; ours, for the miniature: 3)."""
    solver: Literal["euler", "dpm2"] = "euler"
    """How NFT's rollout solves the ODE: first order, or DPM-Solver++(2M), second order at one velocity per step."""
    rule: Literal["sde", "cps"] = "sde"
    """How a noisy step is made: Flow-GRPO's SDE or Flow-CPS."""
    noise_level: Annotated[float, Range(0, 2, is_above=True)] = 0.9
    """Scale of the noise of a step; Flow-GRPO's a (0.9 for Kontext). NFT rolls out the ODE whatever this is."""
    window_size: Annotated[int, Range(0, 999)] = 2
    """Consecutive noisy, trained steps per iteration, the others are ODE steps; 0: all steps noisy, all but the last
    trained."""
    window_placement: Literal["random", "progressive"] = "random"
    """Where the window lies: drawn per iteration (Flow-GRPO-Fast), or moving on from first to last (MixGRPO)."""
    window_range: tuple[int, ...] = ()
    """The steps that the window may lie in, from the first up to the second, as [0, 6] for the first half of 12
    (Flow-GRPO-Fast's sde_window_range); empty: all but the last, which is never trained."""
    iters_per_window: CountOrNone = 0
    """Iterations after which a progressive window moves on by one step, and from the last place back to the first
    (MixGRPO: 25, with --roll_back; there the last windows are cut, here all are whole); 0: once over the run, ours."""
    is_start_shared: bool = False
    """Whether the trajectories of a group start from the same noise in each turn, and only noisy steps tell them apart:
    GRPO alone (Flow-GRPO's same_latent, off there; MixGRPO's init_same_noise, on)."""
    last_step: Literal["noisy", "ode"] = "noisy"
    """How the last denoising step is made where all steps are noisy (window_size 0), never trained: 'ode' for FLUX.2,
    whose last step of 12 falls from sigma 0.395 to 0, so that its noise would be seen in the picture."""
    hand_off: Literal["pixels", "latents"] = "pixels"
    """What the next turn edits: the decoded 8-bit image (what a user gets), or the latents as they are. Ours."""
    microbatch_size: Count = 32
    """Trajectories per forward pass of the rollout; changes memory and, to rounding, results."""
    wave_size: Annotated[int, Range(0, 65536)] = 0
    """Trajectories that are made, and then scored, together, rounded up to whole microbatches; 0: a group's. Changes
    no result, only what of a judge's time the rollout of the next wave hides (reward.overlap)."""
    is_guided: bool = True
    """Whether training rolls out, and learns, with model.cfg_scale; false: without guidance, at half the forward
    passes. Evaluation has it in any case."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay a turn's denoising steps as one CUDA graph, with the same bits; auto: on a GPU, where launching a forward
    pass takes longer than its arithmetic."""

    def __post_init__(self) -> None:
        check_ranges(self)


TurnAggregation = Literal[
    "mean", "sum", "min", "prod", "geomean", "last", "binary_mean", "binary_all", "prefix_soft", "prefix_binary"
]
Credit = Literal["broadcast", "per_turn", "return_to_go", "early_stop"]


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """From scores to advantages (section 4 of the paper)."""

    turn_aggregation: TurnAggregation = "mean"
    """How the K instruction scores of a trajectory become one. Formulas ours; the paper names the step."""
    aggregate_at: Literal["reward", "advantage"] = "reward"
    """Aggregate rewards over turns, then normalise; or normalise each turn's reward, then average the advantages."""
    fusion: Literal["advantage", "reward"] = "advantage"
    """Where instruction following and consistency are added: after normalisation (paper's choice) or before."""
    consistency_weight: Weight = 0.3
    """Weight of the consistency reward, lambda_CC (paper: 0.3)."""
    credit: Credit = "broadcast"
    """Who gets the advantage: every turn alike (paper's choice), or one of the baselines."""
    std: Literal["group", "global"] = "global"
    """Standard deviation that divides: of the group (paper), or of the whole batch (close groups weigh less)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.aggregate_at == "advantage":
            is_mean, is_broadcast = self.turn_aggregation == "mean", self.credit == "broadcast"
            remedy = "aggregate_at 'advantage' averages over the turns: must be 'mean'"
            require(is_mean, "advantage.turn_aggregation", self.turn_aggregation, remedy)
            require(is_broadcast, "advantage.credit", self.credit, "aggregate_at 'advantage' needs 'broadcast'")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss."""

    name: Literal["grpo", "nft"] = "nft"
    """GRPO on the log-prob of noisy steps, or DiffusionNFT on noised final images."""
    clip_range: Rate = 1e-3
    """GRPO: the ratio is clipped to 1 +- this; grows as the number of latent elements falls (1e-4 at 512 px)."""
    ratio: Literal["plain", "guard"] = "plain"
    """GRPO: ratio of the log-probs, or GRPO-Guard's, centred on 1 and of one scale at all steps, with the policy term
    divided by -dt, as its code does (its clip_range: 2e-6); with rule 'cps' that is ours."""
    kl_beta: Weight = 0.0
    """Weight of the penalty for leaving the reference, the adapter off (GRPO's kl_beta, NFT's lambda_kl)."""
    kl_form: Literal["published", "exact"] = "published"
    """GRPO: divide by std_t squared (as the public code) or by the step's variance."""
    max_advantage: Annotated[float, Range(0, 1000, is_above=True)] = 5.0
    """Advantages are clamped to +- this."""
    nft_beta: Annotated[float, Range(0, 1000, is_above=True)] = 1.0
    """NFT: how far the implicit positive and negative policies stand from the old one."""
    nft_num_times: Annotated[int, Range(1, 1000)] = 1
    """NFT: training times per turn and trajectory, drawn from the schedule's sigmas."""
    nft_old_decay: Literal["on_policy", "ramp", "late_ramp"] = "on_policy"
    """NFT: decay of the old policy after an iteration: 0 | min(0.001 n, 0.5) | 0 until n = 75, then min(0.0075 (n -
    75), 0.999)."""

    def __post_init__(self) -> None:
        check_ranges(self)


IDLE = {
    "nft": (
        "rollout.rule", "rollout.noise_level", "rollout.window_size", "rollout.window_placement", "rollout.last_step",
        "objective.clip_range", "objective.ratio", "objective.kl_form",
    ),
    "grpo": ("objective.nft_beta", "objective.nft_num_times", "objective.nft_old_decay"),
}  # fmt: skip
"""Fields without effect, by `objective.name`: none of them stops a run, and a run that goes on may change them."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on the adapter."""

    learning_rate: Rate = 3e-3
    """Peak learning rate; goes with epsilon (the large editors: 3e-4)."""
    schedule: Literal["constant", "linear"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the end of the run."""
    weight_decay: Share = 1e-4
    """AdamW's decoupled weight decay."""
    epsilon: Rate = 1e-8
    """AdamW's epsilon; far above the gradient's elements (1e-4 on the miniature), a step keeps their proportions."""
    max_grad_norm: Annotated[float, Range(0, 1e6, is_above=True)] = 1.0
    """The gradient is scaled down to this norm."""
    num_updates: Annotated[int, Range(1, 2)] = 1
    """Optimizer steps per iteration, 1 or 2; the second is off-policy."""
    microbatch_size: Count = 32
    """Transitions per forward and backward pass; gradients are accumulated."""
    ema_decay: Annotated[float, Range(0, 0.99999)] = 0.8
    """Decay per optimizer step of the averaged adapter, which is evaluated and exported; 0: no averaging."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """EdiVal metrics on held-out sessions."""

    num_sessions: Annotated[int, Range(2, 1_000_000)] = 256
    """Held-out sessions of the evaluation before and after training."""
    num_turns: Annotated[int, Range(0, 10)] = 0
    """Turns of a held-out session, up to 10; 0: as many as in training, data.num_turns."""
    num_steps: Annotated[int, Range(1, 1000)] = 3
    """Denoising steps (ODE) per turn at evaluation."""
    every: CountOrNone = 20
    """Iterations between short evaluations on the first `num_sessions_short` sessions; 0: none."""
    num_sessions_short: Count = 64
    """Sessions of the short evaluation."""
    num_strips: Count = 6
    """Fixed held-out sessions drawn as strips, base above current."""
    has_true_inputs: bool = False
    """Carry out every instruction after the first on its true input too, before and after training, to tell what
    compounds on the editor's own output from instructions that are hard: K - 1 more turns a session. Ours."""

    def __post_init__(self) -> None:
        check_ranges(self)
        is_enough = self.num_strips <= self.num_sessions_short <= self.num_sessions
        name, short = "evaluation.num_sessions_short", self.num_sessions_short
        remedy = f"must lie between num_strips, {self.num_strips}, and num_sessions, {self.num_sessions}"
        require(self.num_strips <= self.num_sessions, "evaluation.num_strips", self.num_strips,
                f"must be at most num_sessions, {self.num_sessions}")  # fmt: skip
        require(is_enough, name, short, remedy)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself."""

    folder: str = "runs/mini"
    """Where everything that the run makes is written; the same command in the same folder continues it."""
    seed: Seed = 0
    """Seed of noise, adapter initialisation and window placement."""
    num_gpus: Count = 1
    """GPUs that the run is meant for: --dry_run plans for one of them; torchrun says how many there are."""
    gpu_gib: Annotated[float, Range(0, 100_000)] = 0.0
    """Memory of such a GPU that --dry_run holds the plan against, GiB; 0: what is free on this machine now."""
    num_iterations: Count = 60
    """Iterations of roll out, score, update."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of the ops: Triton kernels for CUDA tensors where triton is installed (auto), or one by name."""
    save_every: Count = 1
    """Iterations between checkpoints."""
    num_checkpoints: Annotated[int, Range(1, 1000)] = 2
    """Newest checkpoints that are kept: to fall back on, and to go back to by --resume_from."""
    num_judged: Annotated[int, Range(0, 64)] = 4
    """Sessions of an iteration, and of an evaluation, that are kept to be looked at, with pictures, scores and the
    judge's words: the worst, the best, and those that are in dispute; 0: none. Ours."""
    log_to: tuple[str, ...] = ()
    """Boards beside TensorBoard that show curves, strips and tables, of wandb and trackio, by their own clients (extras
    of the same names)."""
    patience: Annotated[int, Range(0, 1000)] = 0
    """Short evaluations in a row without a clear gain in held-out O after which training stops; the average with the
    highest O is then evaluated and exported. 0: all iterations, and the last average. Ours."""
    max_ratio_error: Weight = 0.0
    """The run stops when |ratio - 1| before the first update exceeds this; 0 holds at the same geometry on one
    device."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(self.folder != "", "run.folder", self.folder, "must be a folder, which is made if it is not there")
        is_known = set(self.log_to) <= {*BOARDS} and len({*self.log_to}) == len(self.log_to)
        require(is_known, "run.log_to", list(self.log_to), f"must be a list of some of {', '.join(BOARDS)}, each once")


def _check_window(rollout: RolloutConfig) -> None:
    """Raise ValueError where the window cannot lie, or move, as asked."""
    size, steps, last = rollout.window_size, rollout.window_range, rollout.num_steps - 1
    is_fitting = not steps or (len(steps) == 2 and size > 0 and 0 <= steps[0] <= steps[1] - size <= last - size)
    remedy = f"must be [first, end] with room for window_size, {size}, above 0, and an end of at most {last}; or empty"
    require(is_fitting, "rollout.window_range", list(steps), remedy)
    is_moving = rollout.iters_per_window == 0 or (rollout.window_placement == "progressive" and size > 0)
    remedy = "is of a window that moves: set window_placement progressive and a window_size, or 0 here"
    require(is_moving, "rollout.iters_per_window", rollout.iters_per_window, remedy)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run of mteditflow."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        rollout = self.rollout
        if "rollout.window_size" not in IDLE[self.objective.name]:
            is_shorter, remedy = (
                rollout.window_size < rollout.num_steps,
                f"must be below num_steps, {rollout.num_steps}",
            )
            require(is_shorter, "rollout.window_size", rollout.window_size, remedy)
            is_cps_right = rollout.rule == "sde" or rollout.noise_level <= 1
            require(is_cps_right, "rollout.noise_level", rollout.noise_level, "must be at most 1 with rule 'cps'")
        has_one_size = self.model.condition_size == (self.model.height, self.model.width)
        remedy = "the condition has a size of its own (model.condition_height, condition_width): must be 'pixels'"
        is_right = self.rollout.hand_off == "pixels" or has_one_size
        require(is_right, "rollout.hand_off", self.rollout.hand_off, remedy)
        is_trainable = not (self.lora.is_full and self.model.quantised)
        remedy = "lora.is_full trains the weights: must be float32 or bfloat16"
        require(is_trainable, "model.base", self.model.base, remedy)
        is_whole = self.distributed.shard == "none"
        remedy = "distributed.shard gathers weights within a forward pass: must be 'auto' or 'off'"
        require(is_whole or self.rollout.cuda_graph != "on", "rollout.cuda_graph", self.rollout.cuda_graph, remedy)
        if self.objective.name == "grpo":
            _check_window(self.rollout)
        is_apart = self.objective.name == "grpo" or not self.rollout.is_start_shared
        remedy = "NFT rolls out the ODE, where all of a group would be the same: must be false"
        require(is_apart, "rollout.is_start_shared", self.rollout.is_start_shared, remedy)
        is_scored = self.data.num_turns <= 9 or self.reward.judge != "vlm"
        require(is_scored, "data.num_turns", self.data.num_turns, "must be at most 9 for reward.judge 'vlm'")
        num_turns, is_of_world = self.num_held_out_turns, self.data.path == EMBEDDED  # whose verifier has no such limit
        is_scored = num_turns <= 9 or self.reward.judge != "vlm" or is_of_world
        require(is_scored, "evaluation.num_turns", num_turns, "must be at most 9 for reward.judge 'vlm'")
        is_evaluated = self.run.patience == 0 or self.evaluation.every > 0
        remedy = "run.patience counts short evaluations: must be above 0, or run.patience 0"
        require(is_evaluated, "evaluation.every", self.evaluation.every, remedy)
        short, remedy = self.evaluation.num_sessions_short, "run.patience goes by the interval of held-out O"
        is_enough = self.run.patience == 0 or short >= MIN_SESSIONS
        require(is_enough, "evaluation.num_sessions_short", short, f"{remedy}: must be at least {MIN_SESSIONS}")
        draws = self.objective.nft_num_times if self.objective.name == "nft" else self.rollout.window_size
        is_one = self.rollout.num_tasks * self.rollout.group_size <= self.optimizer.microbatch_size
        is_split = self.optimizer.num_updates == 1 or not is_one or self.data.num_turns * draws != 1
        remedy = "all transitions are one microbatch: must be 1, or optimizer.microbatch_size smaller"
        require(is_split, "optimizer.num_updates", self.optimizer.num_updates, remedy)
        weight = self.advantage.consistency_weight
        is_measured = weight == 0 or self.reward.consistency != "none"
        remedy = "reward.consistency is 'none', so that there is nothing to weigh: must be 0"
        require(is_measured, "advantage.consistency_weight", weight, remedy)
        group = self.rollout.group_size
        for section in ("rollout", "optimizer"):
            rows = getattr(self, section).microbatch_size
            remedy = f"with data.buckets it has trajectories of one group: must divide rollout.group_size, {group}"
            require(not self.data.buckets or group % rows == 0, f"{section}.microbatch_size", rows, remedy)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width that a picture may take: the model's, and those of data.buckets."""
        return tuple(dict.fromkeys([(self.model.height, self.model.width), *self.data.sizes]))

    def at(self, height: int, width: int) -> Self:
        """Return the config of a run in which all pictures have one of the sizes."""
        return replace(self, model=self.model.at(height, width), data=replace(self.data, buckets=()))

    @property
    def num_held_out_turns(self) -> int:
        """Turns of a held-out session."""
        return self.evaluation.num_turns or self.data.num_turns
