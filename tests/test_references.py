"""Sessions with reference images beside the one that is edited, as the stock pipelines take them."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from einops import rearrange
from flux2_parts import MAX_TEXT_TOKENS, pixtral_processor_class, save_tiny
from PIL import Image
from tiny_qwen import PROMPTS, draw, images
from torch import Tensor
from update_parts import as_nft, change, in_chunks

from mteditflow.config import Config, DataConfig, LoraConfig, ModelConfig, RolloutConfig
from mteditflow.config.command import check
from mteditflow.data import count_references, training_tasks
from mteditflow.data.formats import read_sessions
from mteditflow.data.images import fit_picture, read_picture
from mteditflow.distributed import alone
from mteditflow.evaluate.kept import dependencies
from mteditflow.flow import make_schedule
from mteditflow.noise import NoiseSource
from mteditflow.objective import build_objective
from mteditflow.pictures import round_to_8_bit, to_pil
from mteditflow.plan.estimate import estimate
from mteditflow.plan.flops import forward_flops
from mteditflow.plan.gpus import GPUS, Target
from mteditflow.plan.memory import TRAINING, memory_plan, read_sizes, training_pass
from mteditflow.policy import Policy, build_policy, check_references
from mteditflow.policy.encoding import stack_references
from mteditflow.reward.overlap import join
from mteditflow.reward.vlm import sample_question
from mteditflow.rollout import Sampler, sample_waves
from mteditflow.types import Condition, EditTask
from mteditflow.update import update

NUM_STEPS = 4
LORA = LoraConfig(rank=4, alpha=16, targets=())
SIZE, REFERENCES = (64, 96), ((96, 64), (64, 64))  # none is another turned, or as large

folders = tiny_qwen.folders


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("flux2")
    with pytest.MonkeyPatch.context() as patch:  # FLUX.2-dev's processor is loaded by its name
        patch.setattr(sys.modules["transformers"], "PixtralProcessor", pixtral_processor_class())
        yield {kind: save_tiny(root / kind, kind) for kind in ("klein", "dev")}


def model_of(kind: str, folders: dict[str, Path], flux2: dict[str, Path], **fields: Any) -> ModelConfig:
    """klein with true guidance, dev with its own, Qwen-Image-Edit with true guidance and a text without padding."""
    if kind in flux2:
        guidance = {"cfg_scale": 4.0} if kind == "klein" else {"guidance_scale": 2.5}
        given: dict[str, Any] = {"path": str(flux2[kind]), "max_text_tokens": MAX_TEXT_TOKENS[kind]} | guidance
    else:
        given = {"path": str(folders[kind]), "vision_pixels": 6144, "max_text_tokens": 5, "cfg_scale": 4.0}
    return ModelConfig(height=SIZE[0], width=SIZE[1], **given | fields)


def stock(model: ModelConfig, kind: str, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SIZE[0] * SIZE[1])
    patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", model.vision_pixels)
    pipeline: Any = DiffusionPipeline.from_pretrained(model.path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.requires_grad_(False)
    return pipeline


def generate(pipeline: Any, model: ModelConfig, kind: str, prompt: str, given: list[Tensor], latents: Tensor) -> Tensor:
    """The stock pipeline's image (1, 3, H, W) in [0, 1] of pictures (3, h, w) in [-1, 1], the first of them edited."""
    common = {
        "image": [to_pil(picture) for picture in given], "prompt": prompt, "height": model.height,
        "width": model.width, "num_inference_steps": NUM_STEPS, "output_type": "pt",
    }  # fmt: skip
    if kind in MAX_TEXT_TOKENS:
        scale = model.cfg_scale if kind == "klein" else model.guidance_scale
        unpacked = rearrange(latents, "n (h w) c -> n c h w", h=model.height // 16)
        more = {"latents": unpacked, "guidance_scale": scale, "max_sequence_length": model.max_text_tokens}
    else:
        more = {"latents": latents, "negative_prompt": " ", "true_cfg_scale": model.cfg_scale}
    return pipeline(**common, **more).images


def task_of(number: int, source: Tensor, references: tuple[Tensor, ...]) -> EditTask:
    return EditTask(
        id=number, source=source, references=references, instructions=PROMPTS[:2], edit_types=("unspecified",) * 2
    )


def sources() -> list[Tensor]:
    """A source, and a reference of each size, (3, h, w)."""
    return [images(2, size)[n % 2] for n, size in enumerate((SIZE, *REFERENCES))]


@pytest.mark.parametrize("kind", ["klein", "dev", "2509", "2511"])
def test_two_turns_with_references_are_two_stock_calls(
    folders: dict[str, Path], flux2: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits: the first picture is the one that the turn before made, the references stay."""
    model = model_of(kind, folders, flux2)
    source, *references = sources()
    policy = build_policy(model, LORA, seed=3, has_old=False).at((SIZE, *REFERENCES))
    pipeline, picture = stock(model, kind, monkeypatch), source[None]
    scale = model.cfg_scale
    for turn, prompt in enumerate(PROMPTS[:2]):
        latents, given = draw(1, policy.num_tokens, policy.num_channels, seed=turn), [r[None] for r in references]
        expected = generate(pipeline, model, kind, prompt, [picture[0], *references], latents)
        text = policy.encode_text([prompt], picture, has_cfg=scale != 1, references=given)
        # from a picture: in memory, channels come last
        seen = [value.contiguous(memory_format=torch.channels_last) for value in (picture, *given)]
        encoded = [policy.encode_image(seen[0], microbatch_size=1), *policy.encode_references(seen[1:], 1)]
        condition = Condition(text=text, image=torch.cat(encoded, dim=1), cfg_scale=scale)
        assert condition.image.shape[1] == policy.num_condition_tokens == 24 + 24 + 16
        edit = ode(policy, condition, latents, pipeline.scheduler.sigmas)
        assert torch.equal(edit * 0.5 + 0.5, expected)
        picture = round_to_8_bit(edit)


@torch.no_grad()
def ode(policy: Policy, condition: Condition, latents: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, sigma_next in pairwise(sigmas):
        velocity = policy.velocity(latents, sigma.expand(len(latents)), condition)
        latents = latents + velocity * (sigma_next - sigma)
    return policy.decode(latents, microbatch_size=1)


@pytest.mark.parametrize("kind", ["klein", "2511"])
def test_a_rollout_gives_every_turn_its_references(folders: dict[str, Path], flux2: dict[str, Path], kind: str) -> None:
    """Each trajectory those of its task, as they are, behind the picture that is edited; the text sees them too."""
    policy = build_policy(model_of(kind, folders, flux2), LORA, seed=3, has_old=False)
    source, *references = sources()
    tasks = [task_of(n, source, tuple(sign * r for r in references)) for n, sign in enumerate((1.0, -1.0))]
    schedule, noise = make_schedule(policy.sigmas(2)), NoiseSource(seed=0, step=0)
    sampler = Sampler(
        policy, tasks, schedule, noise, RolloutConfig(microbatch_size=2), num_turns=2, group_size=2, cfg_scale=4.0
    )
    rollout, place = sampler(torch.arange(4)), policy.at(tasks[0].shape)
    latents = torch.cat(place.encode_references(stack_references(tasks), 2), dim=1).repeat_interleave(2, dim=0)
    for turn, edited in zip(rollout.turns, (rollout.sources, rollout.turns[0].image), strict=True):
        assert torch.equal(turn.condition.image, torch.cat([place.encode_image(edited, 2), latents], dim=1))
    last, given = rollout.turns[1], [images.repeat_interleave(2, dim=0) for images in stack_references(tasks)]
    text = place.encode_text([PROMPTS[1]] * 4, rollout.turns[0].image, has_cfg=True, references=given)
    assert all(torch.equal(last.condition.text[name], value) for name, value in text.items())
    assert (last.condition.text["text"][0] == last.condition.text["text"][2]).all() == (kind == "klein")
    assert not torch.equal(last.latents[-1, 0], last.latents[-1, 2])


def test_sessions_with_and_without_references_are_learnt_from_together(flux2: dict[str, Path]) -> None:
    source, one, two = sources()
    tasks = [task_of(0, source, ()), task_of(1, source, (one,)), task_of(2, source, (one, two))]
    config = Config(
        model=model_of("klein", {}, flux2, cfg_scale=1.0), lora=replace(LORA, targets=("attn.to_q",)),
        data=DataConfig(num_turns=2), rollout=RolloutConfig(num_tasks=3, group_size=2, num_steps=2, window_size=0),
    )  # fmt: skip
    config = in_chunks(as_nft(config), 2)
    policy, objective = build_policy(config.model, config.lora, 0, has_old=True), build_objective(config)
    made = join(sample_waves(policy, objective, tasks, config, 0, alone()))
    assert [part.shape[1:] for part in made.parts] == [(), ((96, 64),), ((96, 64), (64, 64))]
    optimizer = torch.optim.SGD([weight for _, weight in policy.adapters.trainable], lr=1.0)
    advantages = torch.tensor([1.0, -1.0] * 3)[:, None].expand(6, 2)
    figures = update(policy, optimizer, objective, made, advantages, config, alone())
    assert figures["update/grad_norm"] > 0 and figures["update/num_transitions"] == 12
    assert policy.at(made.parts[2].shape).num_condition_tokens == 24 + 24 + 16


def test_what_an_evaluation_depends_on(flux2: dict[str, Path]) -> None:
    """Pixels of references count, which repr does not show."""
    config = Config(model=model_of("klein", {}, flux2))
    policy = build_policy(config.model, config.lora, 0, has_old=False)
    source, one, two = sources()
    changed = one.clone()
    changed[0, 50, 50] += 1 / 127.5
    reward = replace(config.reward, judge="vlm", vlm="small", consistency="none")
    config = replace(config, reward=reward, advantage=replace(config.advantage, consistency_weight=0.0))
    found = [dependencies(policy, [task_of(0, source, (it, two))], config) for it in (one, one.clone(), changed)]
    assert found[0] is not None and found[0] == found[1] != found[2]


def test_the_judge_sees_references() -> None:
    source, one, two = sources()
    config = Config().reward
    question = sample_question(task_of(0, source, (one, two)), 2, config)
    texts = [part for part in question.parts if isinstance(part, str)]
    assert [text.split(",")[0].split(".")[0] for text in texts[:5]] == [
        "Source image:", "Reference image", "Reference image", "Turn 1", "Turn 2",
    ]  # fmt: skip
    assert "image 2" in texts[1] and "image 3" in texts[2]
    shapes = [tuple(part.shape[1:]) for part in question.parts if isinstance(part, Tensor)]
    assert shapes == [SIZE, *REFERENCES, SIZE, SIZE]
    plain = sample_question(task_of(0, source, ()), 2, config)
    assert [part for part in plain.parts if isinstance(part, str)] == [texts[0], *texts[3:]]
    assert Image.fromarray(question.images[1].permute(1, 2, 0).numpy()).size == (64, 96)


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    """A JSONL of a session with two references, one with one, and one without; beside it held.jsonl."""
    for name, size in {"dog": (120, 80), "hat": (60, 90), "man": (80, 80), "cat": (80, 70)}.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{name}.png")
    lines = [
        {"images": ["dog.png", "hat.png", "man.png"], "instructions": ["put the hat of image 2 on the dog", "b"]},
        {"images": ["dog.png", "hat.png"], "instructions": ["a", "b"]},
        {"image": "dog.png", "instructions": ["a", "b"]},
    ]
    (tmp_path / "held.jsonl").write_text('{"image": "cat.png", "instructions": ["a", "b"]}\n')
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def small(path: Path, model: ModelConfig | None = None) -> Config:
    optimizer = replace(Config().optimizer, microbatch_size=4)
    held_out = str(path.parent / "held.jsonl")
    data = DataConfig(path=str(path), held_out=held_out, num_turns=2, buckets=("48x80",))
    return Config(
        model=model or ModelConfig(), data=data, rollout=RolloutConfig(num_tasks=3, microbatch_size=4),
        optimizer=optimizer,
    )  # fmt: skip


def test_a_session_names_its_references(sessions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each takes the bucket of its aspect; what is missing or damaged is that session's fault."""
    config = small(sessions)
    tasks = sorted(training_tasks(config, 0, alone()), key=lambda task: -len(task.references))
    assert [task.shape for task in tasks] == [((64, 64), (80, 48), (64, 64)), ((64, 64), (80, 48)), ((64, 64),)]
    hat = fit_picture(read_picture(sessions.parent / "hat.png"), height=80, width=48, fit="crop").image
    assert torch.equal(tasks[0].references[0], hat) and torch.equal(tasks[1].references[0], hat)
    assert count_references(config) == (1.0, 2)
    assert len({session.key for session in read_sessions(str(sessions)).found}) == 3
    wrong = [
        {"images": ["dog.png", "gone.png"], "instructions": ["a", "b"]},
        {"images": ["dog.png", "torn.png"], "instructions": ["a", "b"]},
        {"image": "dog.png", "images": ["hat.png"], "instructions": ["a", "b"]},
        {"images": [], "instructions": ["a", "b"]},
        {"images": ["dog.png", 3], "instructions": ["a", "b"]},
    ]
    (sessions.parent / "torn.png").write_bytes((sessions.parent / "hat.png").read_bytes()[:500])
    with sessions.open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in wrong)
    assert check([str(sessions), "--num_turns", "2"]) == 1
    said = capsys.readouterr().out
    for message in (
        "a.jsonl:4: no such file", "torn.png", "must have either image, or images", "images must be a list of paths",
        "must have images, the path of a picture",
    ):  # fmt: skip
        assert message in said, message
    assert "3 of 8 sessions usable" in said.replace("\n", " ")


def test_a_model_of_one_image_refuses(sessions: Path, folders: dict[str, Path], flux2: dict[str, Path]) -> None:
    for model in (ModelConfig(path="black-forest-labs/FLUX.1-Kontext-dev"), ModelConfig(path=str(folders["edit"]))):
        with pytest.raises(ValueError, match=r"model.path is .*have up to 3 images, and a \w+Pipeline takes one"):
            check_references(small(sessions, model))
    for path in (str(flux2["klein"]), str(folders["2509"]), "black-forest-labs/FLUX.2-dev"):
        check_references(small(sessions, ModelConfig(path=path)))
    check_references(Config())


def test_the_plan_counts_references(sessions: Path) -> None:
    """Memory of the most that a session has, time of the mean; Qwen's text encoder sees them too."""
    for path in ("black-forest-labs/FLUX.2-klein-base-4B", "Qwen/Qwen-Image-Edit-2511"):
        model = ModelConfig(path=path, height=512, width=512, max_text_tokens=512, base="bfloat16")
        paths = sessions, Path("nowhere.jsonl")
        with_two, without = (change(small(path, model), "data", buckets=()) for path in paths)
        sizes = read_sizes(with_two)
        tokens = [training_pass(config, sizes).image_tokens for config in (with_two, without)]
        assert tokens == [1024 * 4, 1024 * 2]
        more = training_pass(with_two, sizes).text_tokens - training_pass(without, sizes).text_tokens
        assert more == (2 * (384**2 // 28**2) if "Qwen" in path else 0)
        plans = [memory_plan(config, sizes) for config in (with_two, without)]
        assert plans[0][TRAINING] > 1.5 * plans[1][TRAINING]
        seconds = [estimate(config, sizes, 0.0, Target(gpu=GPUS["h200"])) for config in (with_two, without)]
        text = 512 + ("Qwen" in path) * (188 + 20)  # of the instruction, of a picture, of the template
        seen = [(1024 * 3, text + 188 * ("Qwen" in path)), (1024 * 2, text)]  # of one reference on average, and of none
        flops = [
            forward_flops(sizes.family, sizes.transformer, text_tokens=few, image_tokens=many).total
            for many, few in seen
        ]
        assert seconds[0] and seconds[1]
        assert seconds[0][0].forward / seconds[1][0].forward == pytest.approx(flops[0] / flops[1])
