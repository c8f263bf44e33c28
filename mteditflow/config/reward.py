"""The settings of the rewards."""

import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal
from urllib.parse import urlsplit

from mteditflow.config.ranges import Count, Range, Share, Weight, check_ranges, require

EDIVAL_DINO = "facebook/dinov3-vitb16-pretrain-lvd1689m"
SMALL = "small"
SMALL_FOLDER = Path(__file__).parent.parent / "judge" / "small"
_MODEL = re.compile(r"model:(?P<path>.+?)(=(?P<weight>[^=]+))?")
_ALSO = re.compile(r"(?P<module>[\w.]+):(?P<function>[A-Za-z_]\w*)(:(?P<path>.+?))?(=(?P<weight>[^=]+))?")
TAKEN = re.compile(
    r"instruction|consistency|mean|std|valid_share|zero_spread_share|exposed_s|judge_s|overlap_efficiency|"
    r"(?:turn|success)_\d+"
)
"""Names that metrics have already."""


@dataclass(frozen=True, kw_only=True)
class AlsoReward:
    """An entry of reward.also: what gives the numbers, the name by which the reward goes, and its weight."""

    text: str
    name: str
    weight: float
    module: str = ""  # a user's; empty: a model that needs none
    function: str = ""  # the function or class in the module
    path: str = ""  # hub name or folder of a model


def parse_also(text: str) -> AlsoReward:
    """Read `module:function`, `module:Class:PATH` or `model:PATH`, each with or without `=weight`.

    ValueError, one line: the text is none of them.
    """
    match = _MODEL.fullmatch(text) or _ALSO.fullmatch(text)
    remedy = (
        "must be module:function, module:Class:PATH or model:PATH, with =weight behind it or without, such as "
        "my_rewards:sharpness=0.2"
    )
    require(match is not None, "reward.also", text, remedy)
    assert match is not None
    found = {"module": "", "function": "", **match.groupdict()}
    try:
        weight = float(found["weight"] or 1)
    except ValueError:
        weight = math.nan
    require(0 <= weight < math.inf, "reward.also", text, "the weight must be a number, not negative")
    name = found["function"] or re.sub(r"\W", "_", PurePath(found["path"]).name)
    require(name != "", "reward.also", text, "the path must end in the name of a folder, by which the reward goes")
    what = "function" if found["function"] else "folder"
    require(not TAKEN.fullmatch(name), "reward.also", text, f"there is a {name} already: rename the {what}")
    return AlsoReward(
        text=text, name=name, weight=weight,
        module=found["module"], function=found["function"], path=found["path"] or "",
    )  # fmt: skip


def check_url(url: str) -> None:
    """Raise ValueError where a server's address is none, or holds what is secret."""
    if not url:
        return
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        raise ValueError("reward.url is no address: write http://host:8000/v1, or leave it empty") from None
    if "@" in url or parts.query or parts.fragment:  # not quoted: it may hold a password
        raise ValueError(
            "reward.url must hold no user, password or question mark, it is written into the run's folder: the key "
            "goes into the environment variable MTEDITFLOW_API_KEY"
        )
    is_plain = url.isascii() and url.isprintable() and " " not in url
    remedy = "must begin with http:// or https://, such as http://host:8000/v1, or be empty"
    require(is_address and is_plain, "reward.url", url, remedy)


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
    'small', the folder that ships with the package and knows the embedded world alone."""
    url: str = ""
    """VLM judge: OpenAI-compatible endpoint that serves it, such as http://host:8000/v1; empty: loaded in this
    process."""
    readout: Literal["thinking", "direct", "expected"] = "thinking"
    """VLM judge: it reasons about every turn before it scores (paper's choice), scores at once, or is not asked to
    write: the expectation of its score by the probabilities of the digits 1 to 5."""
    rubric: str = ""
    """VLM judge: text file of what it is told about scores, in the place of ours; `mteditflow judge rubric` prints that
    one. Empty: ours, after the paper's."""
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
    """VLM judge with url: seconds that a question may take there, all in all; a later answer is none. Ours."""
    max_wait_s: Annotated[float, Range(0, 86400)] = 300.0
    """VLM judge with url: seconds to wait for a server that restarts or is busy before the run ends, and for its first
    answer; under several ranks below distributed.timeout_s. Ours."""
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
    """Further rewards: module:function or module:Class:PATH of your own, or model:PATH, a CLIP or an image model with
    one number, by hub name or folder; each with =weight behind it (1): docs/judge.md."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("leniency", "failure_rate"):
            value = getattr(self, name)
            is_had = value == 0 or self.judge.startswith("simulated_")
            require(is_had, f"reward.{name}", value, f"judge {self.judge!r} has none: must be 0, or judge another")
        for name in ("vlm", "consistency"):
            require(getattr(self, name) != "", f"reward.{name}", "", "must be a hub name or a folder")
        check_url(self.url)
        remedy = f"judge {self.judge!r} reads none: must be empty, or judge 'vlm'"
        require(self.rubric == "" or self.judge == "vlm", "reward.rubric", self.rubric, remedy)
        is_sampled = self.temperature > 0 or self.num_retries == 0
        remedy = "without sampling (temperature 0) every answer is the same: must be 0"
        require(is_sampled, "reward.num_retries", self.num_retries, remedy)
        names = [also.name for also in self.also_rewards]
        require(len(names) == len(set(names)), "reward.also", self.also, "two rewards have one name: rename one")

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
