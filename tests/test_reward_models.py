"""Models that score edits: stock ones of a small size in their true format, classes of the guide, and what is refused;
and that no reward's scores depend on the wave that a trajectory comes in.
"""

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import rollout_of
from tiny_judge import save_dino
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    Gemma3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mteditflow.config import Config, RewardConfig
from mteditflow.config.reward import parse_also
from mteditflow.noise import NoiseSource
from mteditflow.pictures import round_to_8_bit, to_pil
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.reward.dino import DinoConsistency
from mteditflow.reward.exact import ExactConsistency, ExactInstruction, SimulatedJudge
from mteditflow.reward.models import load_model
from mteditflow.reward.user_function import UserReward
from mteditflow.types import EditTask, Region, Rollout
from mteditflow.world.edits import make_session
from mteditflow.world.render import render

CPU = torch.device("cpu")
GUIDE = (Path(__file__).parent.parent / "docs" / "judge.md").read_text()
SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
ONE_LABEL: dict[str, Any] = {"num_labels": 1}
VISION: dict[str, Any] = SIZE | {"image_size": 24, "patch_size": 8}
# A model of two layers of width 32 in float32, whose sums are in another order: some 30 roundings of the logit, whose
# cosine is multiplied by a scale of at most 15.
TOLERANCE = 30 * 2.0**-24 * 15


def spread(model: Any) -> Any:
    """Weights far enough apart for pictures and texts to differ."""
    for weight in model.parameters():
        weight.data.mul_(8) if weight.ndim > 1 else None
    return model.eval()


def word_tokenizer() -> Any:
    """Bytes, and the special tokens of a Gemma."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=special,
    )  # fmt: skip


def save_clip(folder: Path) -> Any:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"{token}</w>": len(vocabulary) + i for i, token in enumerate(list(vocabulary))}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    text = SIZE | {
        "vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": vocabulary["<|endoftext|>"],
    }  # fmt: skip
    model = spread(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)))
    model.save_pretrained(folder)
    return model


def save_siglip(folder: Path) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    text = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    model = spread(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)))
    model.save_pretrained(folder)
    return model


def save_head(folder: Path, num_labels: int = 1) -> Any:
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    values: dict[str, Any] = VISION | {"num_labels": num_labels}
    model = spread(ViTForImageClassification(ViTConfig(**values)))
    model.save_pretrained(folder)
    return model


def save_edit_head(folder: Path) -> Any:
    """A Gemma 3 with a score head: the pictures of an edit and a text -> number."""
    tokenizer = word_tokenizer()
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4).save_pretrained(folder)
    text = SIZE | {
        "vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = SIZE | {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1}
    config: Any = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, image_token_index=tokenizer.image_token_id, **ONE_LABEL,
    )  # fmt: skip
    model = spread(Gemma3ForSequenceClassification(config))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 as it comes
    model.save_pretrained(folder)
    return model


STOCK: dict[str, tuple[Any, Any]] = {
    "clip": (CLIPImageProcessorPil, CLIPTokenizer),
    "siglip": (SiglipImageProcessorPil, PreTrainedTokenizerFast),
    "head": (ViTImageProcessorPil, None),
}
SAVE = {"clip": save_clip, "siglip": save_siglip, "head": save_head, "edit_head": save_edit_head}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A folder of each kind, and the model that was saved there."""
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, save in SAVE.items():
            folder = tmp_path_factory.mktemp(name)
            found[name] = (folder, save(folder))
    return found


@pytest.fixture
def my_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with every file of the guide."""
    for text in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        name = re.match(r"# (my_\w+\.py)\n", text)
        if name:
            (tmp_path / name[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Two tasks of the world, three turns, seven trajectories: drawings of other sessions, spoilt by counted noise."""
    sessions = [make_session(f"wave/{i}", 3, held_out=False) for i in range(2)]
    tasks = [
        EditTask(
            id=5 + i, source=picture, instructions=tuple(edit.instruction for edit in session.edits),
            edit_types=tuple(edit.edit_type for edit in session.edits), truth=session,
            untouched=((DOG, CAT), (DOG,), ()) if i else (),
        )
        for i, (session, picture) in enumerate(zip(sessions, render([s.source for s in sessions]), strict=True))
    ]  # fmt: skip
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for turn in range(3):
        clean = render([sessions[g].edits[turn].after for g in group.tolist()])
        spoilt = clean + 0.5 * torch.rand(7, 1, 1, 1, generator=generator) * torch.randn(
            clean.shape, generator=generator
        )
        pictures.append(round_to_8_bit(spoilt.clamp(-1, 1)))
    return rollout_of(tasks, torch.stack(pictures), NoiseSource(seed=3, step=6), group)


CAT, DOG = Region(name="cat", box=(0.0, 0.0, 0.5, 0.5)), Region(name="dog", box=(0.5, 0.4, 1.0, 0.9))


def part_of(rollout: Rollout, rows: list[int]) -> Rollout:
    turns = [replace(turn, image=turn.image[rows]) for turn in rollout.turns]
    return replace(rollout, turns=turns, group=rollout.group[rows], member=rollout.member[rows])


def test_the_numbers_are_the_models_own(folders: dict[str, tuple[Path, Any]], rollout: Rollout) -> None:
    """Against the stock forward pass of each model, one edit at a time; instructions longer than 16 tokens are cut."""
    for name in ("clip", "siglip", "head"):
        folder, model = folders[name]
        found = UserReward(parse_also(f"model:{folder}"), CPU)(rollout).values
        assert found.shape == (7, 3) and found.dtype == torch.float32
        processor, tokenizer = STOCK[name]
        images, texts = processor.from_pretrained(folder), tokenizer and tokenizer.from_pretrained(folder)
        for row, turn in ((0, 0), (3, 2), (6, 1)):
            picture = to_pil(rollout.turns[turn].image[row])
            inputs = {"pixel_values": images(images=picture, return_tensors="pt")["pixel_values"]}
            if texts:
                text = rollout.tasks[int(rollout.group[row])].instructions[turn]
                padding = {"padding": "max_length"} if name == "siglip" else {}
                ids = texts([text], max_length=16, truncation=True, return_tensors="pt", **padding).input_ids
                inputs["input_ids"] = ids
            with torch.no_grad():
                output = model(**inputs)
            expected = output.logits[0, 0] if name == "head" else output.logits_per_image[0, 0]
            assert abs(found[row, turn] - expected).item() <= TOLERANCE, name
        assert found.std() > 100 * TOLERANCE


def test_the_plan_counts_their_weights(folders: dict[str, tuple[Path, Any]]) -> None:
    entries = [f"model:{folders[name][0]}" for name in ("clip", "head")]
    config = Config(reward=RewardConfig(also=(*entries, "my_models:EditHead:x", "my_rewards:sharpness")))
    num = sum(weight.numel() for name in ("clip", "head") for weight in folders[name][1].state_dict().values())
    assert memory_plan(config, read_sizes(config))["reward models"] * 2**30 == 4 * num


def test_the_guides_class(my_files: Path, folders: dict[str, tuple[Path, Any]], rollout: Rollout) -> None:
    """Each number is of its source, its text and its edit: another of any of them gives another number."""
    reward = UserReward(parse_also(f"my_models:EditHead:{folders['edit_head'][0]}=0.5"), CPU)
    reward.check(rollout.tasks, 3)
    found = reward(rollout).values
    folder, model = folders["edit_head"]
    processor: Any = Gemma3Processor.from_pretrained(folder)
    for row, turn in ((0, 0), (5, 2)):
        task = rollout.tasks[int(rollout.group[row])]
        before = task.source if turn == 0 else rollout.turns[turn - 1].image[row]
        text = "<start_of_image><start_of_image>The edit of the first image: " + task.instructions[turn]
        inputs = processor(
            text=[text], images=[[to_pil(before), to_pil(rollout.turns[turn].image[row])]], return_tensors="pt"
        )
        with torch.no_grad():
            expected = model(**inputs).logits[0, 0]
        assert abs(found[row, turn] - expected).item() <= TOLERANCE * expected.abs().item()
    tasks = [replace(task, source=task.source.flip(2)) for task in rollout.tasks]
    other = reward(replace(rollout, tasks=tasks)).values
    assert (other[:, 0] != found[:, 0]).all() and torch.equal(other[:, 1:], found[:, 1:])
    tasks = [replace(task, instructions=("paint it", *task.instructions[1:])) for task in rollout.tasks]
    other = reward(replace(rollout, tasks=tasks)).values
    assert (other[:, 0] != found[:, 0]).all() and torch.equal(other[:, 1:], found[:, 1:])


def test_the_guides_editscore(my_files: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of the package's interface, as it is remembered: this says nothing of the package."""

    class Scorer:
        def __init__(self, **values: Any) -> None:
            assert values["lora_path"] == "EditScore/EditScore-7B" and values["num_pass"] == 1

        def evaluate(self, images: list[Any], instruction: str) -> dict[str, float]:
            before, after = (torch.tensor(list(image.tobytes()), dtype=torch.float64) for image in images)
            return {"final_score": float((after - before).mean()) + len(instruction)}

    stand_in = types.ModuleType("editscore")
    stand_in.EditScore = Scorer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "editscore", stand_in)
    found = UserReward(parse_also("my_editscore:EditScore:EditScore/EditScore-7B"), CPU)(rollout).values
    levels = torch.cat([rollout.sources[None], rollout.pictures]).double().mean(dim=(2, 3, 4)) * 127.5
    lengths = torch.tensor([[len(text) for text in rollout.tasks[g].instructions] for g in rollout.group.tolist()])
    # float32 of numbers up to 100
    torch.testing.assert_close(found.double(), levels.diff(dim=0).T + lengths, rtol=2.0**-23, atol=0)


CLASSES = """
import torch
SIZES = set()
class Tall:
    def __init__(self, path, device): pass
    def __call__(self, sources, instructions, pictures): return torch.zeros(len(pictures), 1)
class Homeless:
    def __init__(self, path, device): raise FileNotFoundError(f"no {path!r} here")
class Bare:
    def __call__(self, sources, instructions, pictures): return torch.zeros(len(pictures))
class Many(Tall):
    batch_size = 0
class Greedy:
    def __init__(self, path, device): pass
    def __call__(self, sources, instructions, pictures):
        values = pictures.mean(dim=(1, 2, 3)) - sources.mean(dim=(1, 2, 3))
        sources.zero_(), pictures.zero_(), instructions.clear()
        SIZES.add(len(values))
        return values
"""


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (
            "my_classes:Tall",
            r"gives shape \(8, 1\), must give a number, or NaN, per edit: \(M,\) = \(8,\); called with",
        ),
        ("my_classes:Homeless:a/b", r"Homeless\(path, device\) raises FileNotFoundError: no 'a/b' here \(line 8 of"),
        ("my_classes:Bare", r"Bare\(path, device\) raises TypeError: "),
        (
            "my_classes:Many",
            r"Many\(path, device\) raises ValueError: batch_size is 0, must be a whole",
        ),
    ],
)
def test_a_class_that_cannot_score(also: str, message: str, my_files: Path, rollout: Rollout) -> None:
    (my_files / "my_classes.py").write_text(CLASSES)
    with pytest.raises(ValueError, match=rf"reward\.also is '{also}': {message}") as caught:
        UserReward(parse_also(also), CPU).check(rollout.tasks, 3)
    assert "\n" not in str(caught.value)


def test_a_class_may_change_what_it_gets(my_files: Path, rollout: Rollout) -> None:
    (my_files / "my_classes.py").write_text(CLASSES)
    reward = UserReward(parse_also("my_classes:Greedy"), CPU)
    levels = torch.cat([rollout.sources[None], rollout.pictures]).mean(dim=(2, 3, 4))
    # Means of 12288 numbers below 1, differences of two.
    torch.testing.assert_close(reward(rollout).values, levels.diff(dim=0).T, rtol=0, atol=1e-5)
    assert {8} == sys.modules["my_classes"].SIZES


def test_what_cannot_be_supported_is_refused_in_one_line(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "empty").mkdir()
    save_head(tmp_path / "three", num_labels=3)
    LlamaForCausalLM(LlamaConfig(vocab_size=9, **small)).save_pretrained(tmp_path / "llama")
    save_head(tmp_path / "headless")
    body = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    body.save_pretrained(tmp_path / "body")
    (tmp_path / "headless" / "model.safetensors").write_bytes((tmp_path / "body" / "model.safetensors").read_bytes())
    save_clip(tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for name, message in {
        "empty": "cannot be loaded .*: give the folder or hub name",
        "three": "is a ViTForImageClassification of 3 labels, must be a clip or siglip or an image .* of one label",
        "llama": r"is a LlamaForCausalLM \(llama\), must be",
        "headless": "cannot be loaded .*it has no weights for classifier.bias",
        "bare": "cannot be loaded .*preprocessor_config.json",
    }.items():
        with pytest.raises(ValueError, match=f"^reward.also is 'x': {message}") as caught:
            load_model(str(tmp_path / name), CPU, "reward.also is 'x'")
        assert "\n" not in str(caught.value), name
    folder = folders["edit_head"][0]
    with pytest.raises(ValueError, match=r"is a Gemma3ForSequenceClassification \(gemma3\), .* module:Class:PATH"):
        load_model(str(folder), CPU, "reward.also is 'x'")


@pytest.mark.parametrize("size", [1, 3, 5])
def test_scores_do_not_depend_on_the_wave(
    size: int, my_files: Path, folders: dict[str, tuple[Path, Any]], rollout: Rollout, tmp_path: Path
) -> None:
    """Every reward, of waves across the border of two groups and in any order, to the bit."""
    save_dino(tmp_path, "dinov3")
    rewards: dict[str, Any] = {
        "exact": ExactInstruction(), "consistency": ExactConsistency(), "dino": DinoConsistency(str(tmp_path), CPU),
        "simulated": SimulatedJudge(RewardConfig(judge="simulated_thinking", failure_rate=0.3, leniency=1.0)),
        "function": UserReward(parse_also("my_rewards:sharpness"), CPU),
        "class": UserReward(parse_also(f"my_models:EditHead:{folders['edit_head'][0]}"), CPU),
    }  # fmt: skip
    rewards |= {name: UserReward(parse_also(f"model:{folders[name][0]}"), CPU) for name in STOCK}
    order = [6, 2, 0, 5, 3, 1, 4]
    for name, reward in rewards.items():
        whole = reward(rollout).values
        assert not reward.is_remote and whole.shape == (7, 3) and len(whole.nan_to_num().unique()) > 1
        waves = [order[start : start + size] for start in range(0, 7, size)]
        found = torch.cat([reward(part_of(rollout, rows)).values for rows in waves])
        assert torch.equal(found.nan_to_num(-9), whole[order].nan_to_num(-9)), name
