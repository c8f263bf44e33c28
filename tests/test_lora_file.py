"""LoRAs of others: each form is read as what it adds, for each family; what is no plain LoRA is refused by its name."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import diffusers.loaders.lora_conversion_utils as converters
import peft
import pytest
import torch
from export_parts import draw
from lora_parts import FAMILIES, Drawn, ai_toolkit, comfyui, draw_originals, kohya, parts, read, save, shapes
from torch import Tensor

from mteditflow.config import LoraConfig
from mteditflow.config.cli import LORA_FILE
from mteditflow.export.comfyui import comfyui_keys
from mteditflow.export.weights import write_lora
from mteditflow.policy.lora_file import adapter_for, padded_state
from mteditflow.transformer.adapters import name_targets

FORMS = {"kohya": kohya, "comfyui": comfyui, "ai-toolkit": ai_toolkit}
ADA = "final_layer.adaLN_modulation.1"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_original_names(family: str, form: str, tmp_path: Path) -> None:
    """A, B and scale of each linear are the file's rows for it, to the bit, by ComfyUI's map of the names."""
    drawn, found = draw_originals(family), parts(family)
    lora = read(family, save(FORMS[form](drawn), tmp_path / "lora.safetensors"))
    assert lora.keys() == found.keys()
    for name, part in found.items():
        whole = drawn[part.original]
        up = whole.up[part.first : part.first + part.num_rows]
        if part.original == ADA:
            up = torch.cat([up[len(up) // 2 :], up[: len(up) // 2]])
        assert torch.equal(lora[name].down, whole.down) and torch.equal(lora[name].up, up), name
        assert lora[name].scale == (1.0 if form == "ai-toolkit" else 2.0)


def product(state: dict[str, Tensor], name: str) -> Tensor:
    return state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]


@pytest.mark.parametrize(
    ("family", "form", "converter", "without"),
    [
        ("kontext", "kohya", "_convert_kohya_flux_lora_to_diffusers", "linear1|final_layer"),  # width 3072; no alpha
        ("flux2", "kohya", "_convert_kohya_flux2_lora_to_diffusers", "adaLN|guidance|modulation"),  # not known to it
        ("flux2", "ai-toolkit", "_convert_non_diffusers_flux2_lora_to_diffusers", "adaLN"),  # not swapped, see below
        ("qwen", "kohya", "_convert_non_diffusers_qwen_lora_to_diffusers", "nothing"),
        ("qwen", "comfyui", "_convert_non_diffusers_qwen_lora_to_diffusers", "nothing"),
    ],
)
def test_the_change_is_that_of_diffusers(family: str, form: str, converter: str, without: str, tmp_path: Path) -> None:
    """To float32's rounding of three products, but for what its converters do not do. FLUX.2's last modulation they
    take over as it is, where diffusers' own conversion of the model (single_file_utils.py) swaps its halves, as here.
    """
    drawn = {name: it for name, it in draw_originals(family).items() if not re.search(without, name)}
    file = FORMS[form](drawn)
    lora = read(family, save(file, tmp_path / "lora.safetensors"))
    stock = getattr(converters, converter)(dict(file))
    stock = {key if key.startswith("transformer.") else f"transformer.{key}": weight for key, weight in stock.items()}
    assert {key.split(".lora_")[0] for key in stock} == {f"transformer.{name}" for name in lora}
    for name, it in lora.items():
        torch.testing.assert_close(it.scale * it.up @ it.down, product(stock, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_exports_come_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the bit, in both forms, with rank, alpha and modules, as file and as folder."""
    wanted = LoraConfig(rank=4, alpha=6, targets=())
    names = [name for name in shapes(family) if any(name.endswith(f".{end}") for end in FAMILIES[family][0].targets)]
    state = {}
    for i, name in enumerate(names):
        num_out, num_in = shapes(family)[name]
        state[f"{name}.lora_A.weight"] = draw(wanted.rank, num_in, seed=i).to(dtype)
        state[f"{name}.lora_B.weight"] = draw(num_out, wanted.rank, seed=1000 + i).to(dtype)
    pipeline = FAMILIES[family][0].pipelines[0]
    save(comfyui_keys(pipeline, state, alpha=wanted.alpha), tmp_path / "comfyui" / "mine.safetensors")
    write_lora(getattr(diffusers, pipeline), state, wanted, tmp_path / "diffusers")
    for word in ("comfyui/mine.safetensors", "comfyui", "diffusers", f"diffusers/{LORA_FILE}"):
        lora = read(family, tmp_path / word)
        adapter = adapter_for([lora], LoraConfig())
        assert (adapter.rank, adapter.alpha) == (wanted.rank, wanted.alpha) and {*adapter.targets} == {*names}
        zeros = {key: torch.zeros(weight.shape) for key, weight in state.items()}
        again = padded_state(lora, adapter, zeros)
        assert all(torch.equal(again[key], weight.float()) for key, weight in state.items())


def test_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    """The adapter is as wide as the widest, of its alpha; the function is each file's, and the rest can be trained."""
    drawn = draw_originals("qwen", rank=2, alpha=1.0)
    wide = "transformer_blocks.1.attn.to_q"
    drawn[wide] = Drawn(down=draw(5, 32, seed=7), up=draw(32, 5, seed=8), alpha=10.0)
    lora = read("qwen", save(kohya(drawn), tmp_path / "lora.safetensors"))
    adapter = adapter_for([lora], LoraConfig())
    assert (adapter.rank, adapter.alpha) == (5, 10)
    fresh = {}
    for name, (num_out, num_in) in shapes("qwen").items():
        fresh |= {f"{name}.lora_A.weight": draw(5, num_in), f"{name}.lora_B.weight": torch.zeros(num_out, 5)}
    state = padded_state(lora, adapter, fresh)
    for name, it in lora.items():
        down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        torch.testing.assert_close(2 * up @ down, it.scale * it.up @ it.down, rtol=1e-5, atol=1e-5)
        assert name == wide or (torch.equal(down[2:], fresh[f"{name}.lora_A.weight"][2:]) and not up[:, 2:].any())


def test_what_was_put_together_comes_apart(tmp_path: Path) -> None:
    """q, k and v that were trained apart, rank 2 each, in one linear with zeros between: each has its own again."""
    downs, ups = draw(6, 32), draw(96, 2, seed=1)
    up = torch.block_diag(*ups.split(32))
    file = kohya({"double_blocks.0.img_attn.qkv": Drawn(down=downs, up=up, alpha=12.0)})
    lora = read("kontext", save(file, tmp_path / "lora.safetensors"))
    for i, letter in enumerate("qkv"):
        module = lora[f"transformer_blocks.0.attn.to_{letter}"]
        assert torch.equal(module.down, downs[2 * i : 2 * i + 2]) and torch.equal(module.up, ups[32 * i : 32 * i + 32])
        assert module.scale == 2.0


def peft_folder(folder: Path, **settings: Any) -> dict[str, peft.LoraConfig]:
    """What peft itself saves of a small Qwen-Image transformer, with B that is not 0."""
    _, transformer, config = FAMILIES["qwen"]
    chosen = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], **settings)
    model = peft.get_peft_model(transformer(**config), chosen)
    for i, (name, weight) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            weight.data = draw(*weight.shape, seed=i)
    model.save_pretrained(str(folder))
    base = model.get_base_model()
    return {name: base.get_submodule(name) for name in shapes("qwen") if name.endswith(("attn.to_q", "attn.to_v"))}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    """A, B and scale are those of peft's own layers, from its folder and from the file in it."""
    layers = peft_folder(tmp_path / "peft", **settings)
    for word in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        lora = read("qwen", word)
        assert lora.keys() == layers.keys()
        for name, layer in layers.items():
            it: Any = layer
            assert lora[name].scale == it.scaling["default"]
            assert torch.equal(lora[name].down, it.lora_A["default"].weight)
            assert torch.equal(lora[name].up, it.lora_B["default"].weight)


def test_peft_without_its_settings_is_refused(tmp_path: Path) -> None:
    """Nothing then says what alpha is; of original names, as fal's trainer saves them, it is the rank."""
    peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"no adapter_config\.json beside it, which says alpha"):
        read("qwen", tmp_path)
    file = {key.replace("diffusion_model.", "base_model.model."): weight
            for key, weight in ai_toolkit(draw_originals("kontext")).items()}  # fmt: skip
    assert {it.scale for it in read("kontext", save(file, tmp_path / "fal" / "x.safetensors")).values()} == {1.0}


STEM = "lora_unet_transformer_blocks_0_attn_to_q"
Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{STEM}.dora_scale", "a DoRA"),
        (f"{Q}.lora_magnitude_vector", "a DoRA"),
        (f"{STEM}.lokr_w1", "a LoKr"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a", "a LoKr"),
        (f"{STEM}.hada_w1_a", "a LoHa"),
        (f"{STEM}.oft_blocks", "an OFT"),
        (f"{Q}.boft_R", "an OFT"),
        (f"{Q}.vera_lambda_b", "a VeRA"),
        (f"{STEM}.on_input", r"an \(IA\)\^3"),
        (f"{STEM}.a1.weight", "a GLoRA"),
        (f"{STEM}.lora_mid.weight", "a LoRA of convolutions"),
        (f"{Q}.lora_B.bias", "a LoRA with biases"),
        (f"{STEM}.diff", "differences of whole weights"),
        (f"{STEM}.diff_b", "differences of whole weights"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "the text encoder"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "the text encoder"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_its_name(key: str, kind: str, tmp_path: Path) -> None:
    file = kohya(draw_originals("qwen")) | {key: draw(2, 2)}
    with pytest.raises(ValueError, match=rf"has '{key}', of {kind}.*merge it into its base, and set model\.path"):
        read("qwen", save(file, tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, r"is a DoRA \(use_dora\)"),
        ({"peft_type": "LOHA"}, "is of peft_type LOHA"),
        ({"peft_type": "LOKR"}, "is of peft_type LOKR"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base that was changed with it"),
        ({"bias": "lora_only"}, "beside biases"),
        ({"modules_to_save": ["proj_out"]}, "beside whole weights"),
        ({"use_qalora": True}, "a QA-LoRA"),
        ({"layer_replication": [[0, 1]]}, "of repeated layers"),
    ],
)
def test_settings_of_peft_that_are_another_function(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    """In diffusers' metadata and in adapter_config.json alike."""
    file = {f"transformer.{name}": weight for name, weight in ai_toolkit(draw_originals("qwen")).items()}
    everything = {"lora_alpha": 3, **settings}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": it for key, it in everything.items()})}
    with pytest.raises(ValueError, match=words):
        read("qwen", save(file, tmp_path / "lora.safetensors", metadata))
    peft_folder(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(everything))
    with pytest.raises(ValueError, match=words):
        read("qwen", tmp_path / "peft")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    good = kohya(draw_originals("qwen"))
    down = f"{STEM}.lora_down.weight"
    wrong = {
        "no part of a LoRA": good | {"lora_unet_img_in.weight": draw(2, 2)},
        "do not go together": {key: weight for key, weight in good.items() if key != down},
        f"{STEM} ({STEM}.alpha) do not go together": good | {down: draw(2, 32)},
        "NaN or infinity in": good | {down: good[down] * float("inf")},
        "of torch.int8: must be floating point": good | {down: good[down].to(torch.int8)},
        "it adapts lora_unet_nowhere.": good
        | {f"lora_unet_nowhere.{k}.weight": draw(3, 3) for k in ("lora_down", "lora_up")},
        "is 40 to 32 in it and 32 to 32 in the model": good | {down: draw(3, 40)},
        "two changes of transformer_blocks.0.attn.to_q": good
        | {f"{Q}.lora_A.weight": good[down], f"{Q}.lora_B.weight": good[f"{STEM}.lora_up.weight"]},
        "holds no LoRA": {},
        f"of {STEM}x ({STEM}x.alpha) do not go together": good | {f"{STEM}x.alpha": torch.tensor(1.0)},
    }
    for line, file in wrong.items():
        with pytest.raises(ValueError) as caught:
            read("qwen", save(file, tmp_path / "lora.safetensors"))
        assert line in str(caught.value) and "\n" not in str(caught.value)
    for text in ("no JSON", "[1]", '{"transformer.lora_alpha": "much"}'):
        save({f"{Q}.lora_A.weight": draw(3, 32), f"{Q}.lora_B.weight": draw(32, 3)}, tmp_path / "lora.safetensors",
             {"lora_adapter_metadata": text})  # fmt: skip
        with pytest.raises(ValueError, match=r"is not peft's settings as JSON"):
            read("qwen", tmp_path / "lora.safetensors")


def test_where_a_lora_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, the file of a folder, or of the hub, here as it was downloaded before."""
    file = kohya(draw_originals("qwen"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for word, line in ((folder, "has no .safetensors file: give a LoRA"), (tmp_path / "gone", "does not exist: give"),
                       ("somebody/nothing", "nothing on the hub"), ("a b/c", "nothing on the hub")):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            read("qwen", word)
    (folder / "config.yaml").touch()
    with pytest.raises(ValueError, match="it is a run, whose LoRA is in its folder lora"):
        read("qwen", folder)
    for name in ("pytorch_lora_weights.bin", "lora.pt", "lora.ckpt"):
        (folder / name).write_bytes(b"code")
        with pytest.raises(ValueError, match=r"give a \.safetensors file; others may run code"):
            read("qwen", folder / name)
    save(file, folder / "a.safetensors")
    assert read("qwen", folder).keys() == shapes("qwen").keys()
    save(file, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"has 2 \.safetensors files: name one, such as a\.safetensors"):
        read("qwen", folder)
    save({key: weight * 2 if "up" in key else weight for key, weight in file.items()}, folder / LORA_FILE)
    assert torch.equal(read("qwen", folder)["img_in"].up, 2 * read("qwen", folder / "a.safetensors")["img_in"].up)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cache / "models--somebody--a-lora" / "snapshots" / ("1" * 40)
    save(file, snapshot / "mine.safetensors")
    refs = cache / "models--somebody--a-lora" / "refs"
    refs.mkdir()
    (refs / "main").write_text("1" * 40)
    monkeypatch.chdir(tmp_path)
    for word in ("somebody/a-lora", "somebody/a-lora/mine.safetensors"):
        assert read("qwen", word).keys() == shapes("qwen").keys()


def test_targets_name_what_a_lora_has() -> None:
    """Names within a block where they name no more; else whole names."""
    linears = [*shapes("kontext")]
    everywhere = [name for name in linears if name.endswith(("attn.to_q", "ff.net.2"))]
    assert name_targets(everywhere, linears) == ("attn.to_q", "ff.net.2")
    single = ["single_transformer_blocks.0.proj_out", "transformer_blocks.0.attn.to_q"]
    assert name_targets(single, linears) == ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
