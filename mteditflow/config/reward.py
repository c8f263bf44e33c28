"""The settings of the judge."""

from dataclasses import dataclass
from typing import Literal

from mteditflow.config.ranges import require as _require


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The judge that training sees. On the embedded world, evaluation always sees the exact verifier."""

    judge: Literal["exact", "thinking", "direct", "vlm"] = "exact"
    """The embedded world's verifier; a simulated judge on top of it: thinking errs at random (bias 0.1, std 0.9
    points), direct is kind (bias 0.8, std 0.3), profiles ours; or, for any images, a vision-language model (paper)."""
    scale: Literal["five", "binary"] = "five"
    """Instruction score: (answer - 1) / 4 for answers 1 to 5 (paper), or 1 from answer 4 on and else 0."""
    leniency: float = 0.0
    """Points that a simulated judge adds to a failed turn for each unit of corruption of its picture (0 clean, 1 the
    most): above 0, the reward can be hacked."""
    failure_rate: float = 0.0
    """Share of trajectories that a simulated judge gives no scores."""
    vlm: str = "Qwen/Qwen3-VL-8B-Instruct"
    """VLM judge: hub name or folder (paper: Qwen3-VL-8B-Instruct), or the name under which the server at url has it."""
    url: str = ""
    """VLM judge: OpenAI-compatible endpoint that serves it, such as http://host:8000/v1; empty: loaded in this
    process."""
    is_thinking: bool = True
    """VLM judge: it reasons about every turn before it scores (paper's choice), or scores at once."""
    num_retries: int = 2
    """VLM judge: times that it is asked again, with another seed, where its answer cannot be read; then the trajectory
    is invalid. Ours."""
    temperature: float = 0.7
    """VLM judge: of its sampling (Qwen3-VL's own is 0.7); 0: always the likeliest token."""
    max_answer_tokens: int = 1024
    """VLM judge: longest answer, tokens; a longer one is cut and cannot be read. Ours."""
    image_size: int = 512
    """VLM judge: longest side of the images that it is shown, pixels; larger ones are shrunk, smaller ones stay.
    Ours."""
    num_parallel: int = 16
    """VLM judge: trajectories in one batch; with url, questions on their way at once."""
    timeout_s: float = 120.0
    """VLM judge with url: seconds to wait for an answer."""
    consistency: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    """Beside a VLM judge: hub name or folder of the DINOv2 or DINOv3 whose features measure consistency (EdiVal's
    evaluator: DINOv3 ViT-B/16), or none."""
    is_edival_compat: bool = False
    """Beside a VLM judge: take DINOv3's registers for patches, as EdiVal's public evaluator does."""

    def __post_init__(self) -> None:
        _require(self.leniency >= 0, "reward.leniency", self.leniency, "must not be negative")
        _require(0 <= self.failure_rate <= 1, "reward.failure_rate", self.failure_rate, "must lie in [0, 1]")
        for name in ("leniency", "failure_rate"):
            value = getattr(self, name)
            is_had = value == 0 or self.judge in ("thinking", "direct")
            _require(is_had, f"reward.{name}", value, f"judge {self.judge!r} has none: must be 0, or judge another")
        _require(
            self.url == "" or self.url.startswith(("http://", "https://")),
            "reward.url",
            self.url,
            "must begin with http:// or https://, such as http://host:8000/v1, or be empty",
        )
        for name in ("vlm", "consistency"):
            _require(getattr(self, name) != "", f"reward.{name}", "", "must be a hub name or a folder")
        for name in ("max_answer_tokens", "num_parallel", "timeout_s"):
            _require(getattr(self, name) > 0, f"reward.{name}", getattr(self, name), "must be positive")
        _require(self.image_size >= 28, "reward.image_size", self.image_size, "must be at least 28")
        _require(0 <= self.num_retries <= 9, "reward.num_retries", self.num_retries, "must lie in 0 to 9")
        _require(self.temperature >= 0, "reward.temperature", self.temperature, "must not be negative")
        _require(
            self.temperature > 0 or self.num_retries == 0,
            "reward.num_retries",
            self.num_retries,
            "without sampling (temperature 0) every answer is the same: must be 0",
        )
