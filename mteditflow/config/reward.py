"""The settings of the rewards."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mteditflow.config.ranges import Count, Range, Share, Weight, check_ranges, require

EDIVAL_DINO = "facebook/dinov3-vitb16-pretrain-lvd1689m"
SMALL = "small"
SMALL_FOLDER = Path(__file__).parent.parent / "judge" / "small"
_ALSO = re.compile(r"(?P<module>[\w.]+):(?P<function>[A-Za-z_]\w*)(=(?P<weight>.+))?")
TAKEN = re.compile(
    r"instruction|consistency|mean|std|valid_share|zero_spread_share|exposed_s|judge_s|overlap_efficiency|"
    r"(?:turn|success)_\d+"
)
"""Names that metrics have already."""


@dataclass(frozen=True, kw_only=True)
class AlsoReward:
    """An entry of reward.also: a function, by whose name the reward goes, and its weight."""

    text: str
    module: str
    function: str
    weight: float


def parse_also(text: str) -> AlsoReward:
    """Read `module:function` or `module:function=weight`. ValueError, one line: the text is neither."""
    match = _ALSO.fullmatch(text)
    remedy = "must be module:function or module:function=weight, such as my_rewards:sharpness=0.2"
    require(match is not None, "reward.also", text, remedy)
    assert match is not None
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        weight = math.nan
    require(0 <= weight < math.inf, "reward.also", text, "the weight must be a number, not negative")
    is_free = not TAKEN.fullmatch(match["function"])
    require(is_free, "reward.also", text, f"there is a {match['function']} already: rename the function")
    return AlsoReward(text=text, module=match["module"], function=match["function"], weight=weight)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What training is rewarded for. On the embedded world, evaluation always sees the exact verifier."""

    judge: Literal["exact", "simulated_thinking", "simulated_direct", "vlm"] = "exact"
    """The embedded world's verifier; a simulated judge on top of it: thinking errs at random (bias 0.1, std 0.9
    points), direct is kind (bias 0.8, std 0.3), profiles ours; or, for any images, a vision-language model (paper)."""
    scale: Literal["five", "binary"] = "five"
    """Instruction score: (answer - 1) / 4 for answers 1 to 5 (paper), or 1 from answer 4 on and else 0."""
    leniency: Weight = 0.0
    """Points that a simulated judge adds to a failed turn for each unit of corruption of its picture (0 clean, 1 the
    most): above 0, the reward can be hacked."""
    failure_rate: Share = 0.0
    """Share of trajectories that a simulated judge gives no scores."""
    vlm: str = "Qwen/Qwen3-VL-8B-Instruct"
    """VLM judge: hub name or folder (paper: Qwen3-VL-8B-Instruct), the name under which the server at url has it, or
    'small', which ships with the package and knows the embedded world alone."""
    url: str = ""
    """VLM judge: OpenAI-compatible endpoint that serves it, such as http://host:8000/v1; empty: loaded in this
    process."""
    readout: Literal["thinking", "direct", "expected"] = "thinking"
    """VLM judge: it reasons about every turn before it scores (paper's choice), scores at once, or is not asked to
    write: the expectation of its score by the probabilities of the digits 1 to 5."""
    num_retries: Annotated[int, Range(0, 9)] = 2
    """VLM judge: times that it is asked again, with another seed, where its answer cannot be read; then the trajectory
    is invalid. Ours."""
    temperature: Annotated[float, Range(0, 100)] = 0.7
    """VLM judge: of its sampling (Qwen3-VL's own is 0.7); 0: always the likeliest token."""
    max_answer_tokens: Count = 1024
    """VLM judge: longest answer, tokens; a longer one is cut and cannot be read. Ours."""
    num_parallel: Count = 16
    """VLM judge: trajectories in one batch; with url, questions on their way at once."""
    timeout_s: Annotated[float, Range(0, 86400, is_above=True)] = 120.0
    """VLM judge with url: seconds to wait for an answer."""
    overlap: Literal["off", "on", "green"] = "on"
    """Whether a wave of trajectories is scored while the next is made: by a worker with its own CUDA stream, or one
    with multiprocessors of its own (green, torch >= 2.12); off: in turn, with the same results."""
    green_sms: Annotated[int, Range(1, 1024)] = 16
    """Multiprocessors that overlap 'green' gives the judge (an H100 has 132)."""
    consistency: str = "auto"
    """What measures consistency, beside any judge: exact (the embedded world's), the hub name or folder of a DINOv2 or
    DINOv3, or none; auto: EdiVal's, DINOv3 ViT-B/16 (facebook/dinov3-vitb16-pretrain-lvd1689m), beside a VLM judge,
    else exact."""
    is_edival_compat: bool = False
    """DINO: take DINOv3's registers for patches, as EdiVal's public evaluator does."""
    also: tuple[str, ...] | str = ()
    """Further rewards, each module:function or module:function=weight (1), of your own: docs/judge.md."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("leniency", "failure_rate"):
            value = getattr(self, name)
            is_had = value == 0 or self.judge.startswith("simulated_")
            require(is_had, f"reward.{name}", value, f"judge {self.judge!r} has none: must be 0, or judge another")
        for name in ("vlm", "consistency"):
            require(getattr(self, name) != "", f"reward.{name}", "", "must be a hub name or a folder")
        is_address = self.url == "" or self.url.startswith(("http://", "https://"))
        remedy = "must begin with http:// or https://, such as http://host:8000/v1, or be empty"
        require(is_address, "reward.url", self.url, remedy)
        is_sampled = self.temperature > 0 or self.num_retries == 0
        remedy = "without sampling (temperature 0) every answer is the same: must be 0"
        require(is_sampled, "reward.num_retries", self.num_retries, remedy)
        names = [also.function for also in self.also_rewards]
        require(len(names) == len(set(names)), "reward.also", self.also, "two functions have one name: rename one")

    @property
    def vlm_path(self) -> str:
        """Folder or hub name of the VLM."""
        return str(SMALL_FOLDER) if self.vlm == SMALL else self.vlm

    @property
    def consistency_measure(self) -> str:
        """`consistency` with auto decided: 'exact', 'none', or a DINO's hub name or folder."""
        if self.consistency == "auto":
            return EDIVAL_DINO if self.judge == "vlm" else "exact"
        return self.consistency

    @property
    def also_rewards(self) -> list[AlsoReward]:
        """The entries of `also`."""
        return [parse_also(text) for text in ((self.also,) if isinstance(self.also, str) else self.also)]
