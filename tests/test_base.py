"""The base in 8 and 4 bits: formats, operators, bits, layouts, loading, and the ratio of every family on every base."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import flux2_parts
import pytest
import safetensors.torch
import tiny_qwen
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from mteditflow_kernels import quantise_rows
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from mteditflow.config import (
    Config,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from mteditflow.config.command import train
from mteditflow.data import held_out_tasks
from mteditflow.distributed import Ranks
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.policy.published import FLUX_KONTEXT, KLEIN_4B, QWEN_IMAGE_EDIT
from mteditflow.profile.base_error import Linears, measure_base_error
from mteditflow.profile.random_kontext import _make_quantised
from mteditflow.record.metrics import read_lines
from mteditflow.rollout import sample_rollout
from mteditflow.transformer import base
from mteditflow.transformer.base import QuantisedLinear, dequantise, frozen_linear, linears_to_quantise, quantise
from mteditflow.types import EditTask
from mteditflow.update import update

KINDS: tuple[base.Kind, ...] = ("float8", "int8", "nf4")
SMALL = Config(evaluation=EvaluationConfig(num_sessions=2, num_sessions_short=2, num_strips=1))
CPU, ONE_RANK = torch.device("cpu"), Ranks(rank=0, world_size=1, device=torch.device("cpu"))
BF16 = 2**-8  # half a step of bfloat16, relative
# bitsandbytes 0.48's codebook and layout (backends/default/ops.py)
BITSANDBYTES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(kind: base.Kind, num_inputs: int = 128, num_outputs: int = 48) -> tuple[nn.Linear, QuantisedLinear]:
    plain = nn.Linear(num_inputs, num_outputs).requires_grad_(False)
    plain.weight.copy_(draw(num_outputs, num_inputs) * torch.logspace(-2, 1, num_outputs)[:, None])
    plain.bias.copy_(draw(num_outputs, seed=1))
    return plain, QuantisedLinear(plain.bfloat16(), kind, CPU)


def weight_of(linear: QuantisedLinear) -> Tensor:
    """The weight that the operators stand for, float64."""
    weight = dequantise(linear.weight, linear.scale, torch.bfloat16).double()
    return weight * linear.scale.double() if linear.weight.dtype == torch.float8_e4m3fn else weight


@pytest.mark.parametrize(("kind", "limit"), [("float8", 2**-4), ("int8", 0.5 / 127), ("nf4", 0.16)])
def test_formats(kind: base.Kind, limit: float) -> None:
    """e4m3 has 3 bits behind the point: half a step is 1/16 of a number. int8: half of 1/127 of the row's largest. nf4:
    half the widest gap of the codebook (0.304), times the block's largest. Each and its scale are rounded to bfloat16.
    """
    plain, quantised = linear_of(kind)
    weight, found = plain.weight.double(), weight_of(quantised)
    if kind == "float8":  # below 2^-6 of 448 steps are even: 2^-10 of the scale
        allowed = limit * weight.abs() + quantised.scale.double() * 2**-10
    else:
        blocks = weight.unflatten(1, (-1, 64 if kind == "nf4" else 128))
        allowed = (limit * blocks.abs().amax(-1, keepdim=True)).expand(blocks.shape).flatten(1) * (1 + 2**-7)
        allowed = allowed + weight.abs() * 2 * BF16
        if kind == "int8":  # a scale that was rounded down cuts the largest
            allowed = allowed + blocks.abs().amax(-1).expand(weight.shape) * BF16
    assert ((found - weight).abs() <= allowed).all()
    assert (found - weight).abs().max() > 0.3 * (allowed - weight.abs() * BF16).max()  # no finer than it should be


def test_nf4_is_bitsandbytes_format() -> None:
    """16 values to the bit; of a block the nearest code times its largest magnitude; the first of a pair is high."""
    assert torch.equal(torch.tensor(base.NF4), torch.tensor(BITSANDBYTES))
    _, quantised = linear_of("nf4")
    weight = linear_of("nf4")[0].weight.float().unflatten(1, (-1, 64))
    scale = weight.abs().amax(-1, keepdim=True)  # of bfloat16 numbers: exact
    nearest = (weight[..., None] / scale[..., None] - torch.tensor(BITSANDBYTES)).abs().argmin(-1).flatten(1)
    assert torch.equal(quantised.weight, (nearest[:, ::2] * 16 + nearest[:, 1::2]).to(torch.uint8))
    assert torch.equal(quantised.scale, scale[..., 0].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradient(kind: base.Kind) -> None:
    """Against float64. Forward: float32 sums of exact products, one rounding. int8 and nf4 add bfloat16's products."""
    _, linear = linear_of(kind)
    x = draw(2, 5, 128, seed=2).bfloat16().requires_grad_()
    y = linear(x)
    seen = x.detach()
    if kind == "float8":
        rows, scale = quantise_rows(seen)
        seen = rows.double() * scale.double()
    assert linear.bias is not None
    expected = seen.double() @ weight_of(linear).T + linear.bias.double()
    size = seen.double().abs() @ weight_of(linear).T.abs() + linear.bias.double().abs()
    assert ((y.double() - expected).abs() <= BF16 * expected.abs() + 128 * 2**-24 * size).all()
    gradient = draw(2, 5, 48, seed=3).bfloat16()
    y.backward(gradient)
    assert x.grad is not None
    expected = gradient.double() @ weight_of(linear)
    size = gradient.double().abs() @ weight_of(linear).abs()
    # with float8 the gradient is rounded once more, with its scales
    assert ((x.grad.double() - expected).abs() <= BF16 * expected.abs() + (BF16 + 48 * 2**-24) * size).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind: base.Kind) -> None:
    """A row's bits depend neither on its companions, nor on gradients, nor on the compiler; nothing but the quantised
    weight is kept for the backward pass.
    """
    _, linear = linear_of(kind)
    x, other = draw(7, 128, seed=2).bfloat16(), draw(7, 128, seed=4).bfloat16() * 100
    with torch.no_grad():
        sampled = linear(x)
        assert torch.equal(linear(torch.cat([x[:3], other[3:]]))[:3], sampled[:3])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        trained = linear(x.clone().requires_grad_())
    assert torch.equal(trained, sampled)
    assert {id(t) for t in kept} <= {id(linear.weight), id(linear.scale)}
    compiled: Any = torch.compile(linear, fullgraph=True, backend="aot_eager")
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    y = compiled(leaf)
    assert torch.equal(y, sampled)
    y.float().square().sum().backward()
    linear(again).float().square().sum().backward()
    assert leaf.grad is not None and again.grad is not None and torch.equal(leaf.grad, again.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_registered_right(kind: base.Kind) -> None:
    _, linear = linear_of(kind)
    x = draw(6, 128).bfloat16().requires_grad_()
    utils = ["test_autograd_registration", "test_faketensor"]
    utils += ["test_schema"] if kind != "float8" else []  # which multiplies what it is given: not in e4m3
    torch.library.opcheck(frozen_linear, (x, linear.weight, linear.scale, linear.bias), test_utils=utils)


def test_layouts_on_a_gpu() -> None:
    """CUDA wants the second operand column-major, which the CPU's kernel does not check; fake CUDA tensors do."""
    with FakeTensorMode():
        x = torch.empty(32, 128, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(48, 128, device="cuda", dtype=torch.float8_e4m3fn)
        scale, bias = torch.empty(48, 1, device="cuda"), torch.empty(48, device="cuda", dtype=torch.bfloat16)
        y = base.float8_product(x, weight, scale, bias)
        assert (y.shape, y.dtype, y.device.type) == ((32, 48), torch.bfloat16, "cuda")
        weight = torch.empty(128, 48, device="cuda", dtype=torch.float8_e4m3fn).t()  # it lies the other way
        with pytest.raises(RuntimeError, match="col"):
            base.float8_product(x, weight, scale, bias)


def test_which_linears() -> None:
    """Of the published transformers: blocks as asked, modulation int8, what is embedded and put out as it was; float8
    has 0.51 of bfloat16's bytes.
    """
    for kind, sizes in (("Flux", FLUX_KONTEXT), ("Flux2", KLEIN_4B), ("QwenImage", QWEN_IMAGE_EDIT)):
        with torch.device("meta"):
            model: Any = getattr(diffusers, f"{kind}Transformer2DModel").from_config(sizes)
        found = {name: stored for name, (_, stored) in linears_to_quantise(model, "float8").items()}
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        whole = {name for name in names if name not in found}
        assert whole and all("embed" in n or n in ("proj_out", "img_in", "txt_in") for n in whole)
        assert all((stored == "int8") == ("norm" in n or "mod" in n) for n, stored in found.items())
        bytes_of = {name: base.num_bytes(model, name) for name in ("float32", "bfloat16", *KINDS)}
        assert bytes_of["float32"] == 2 * bytes_of["bfloat16"]
        assert bytes_of["float8"] <= 0.51 * bytes_of["bfloat16"] and bytes_of["int8"] <= 0.51 * bytes_of["bfloat16"]
        assert bytes_of["nf4"] < 0.35 * bytes_of["bfloat16"]


def test_what_a_format_cannot_take_is_int8() -> None:
    assert base.kind_of("blocks.0.ff", nn.Linear(32, 40), "float8") == "int8"
    assert base.kind_of("blocks.0.ff", nn.Linear(40, 32), "float8") == "int8"
    assert base.kind_of("blocks.0.ff", nn.Linear(32, 64), "nf4") == "int8"
    assert base.kind_of("blocks.0.ff", nn.Linear(64, 40), "nf4") == "nf4"
    assert base.kind_of("x_embedder", nn.Linear(64, 64), "nf4") is None


TINY_FLUX: dict[str, Any] = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that live on the meta device, which stands for the GPU here, and the most that ever did."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.device.type == "meta":
                self.storages[value.untyped_storage()] = value.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_never_stands_on_the_gpu(kind: base.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quantised, one weight once more while its parts are put together, and temporaries of one part."""
    monkeypatch.setattr(base, "ROWS_AT_A_TIME", 64)
    blocks = [nn.ModuleDict({"ff": nn.Linear(256, 1024, dtype=torch.bfloat16)}) for _ in range(8)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)}).requires_grad_(False)
    with LiveBytes() as live:
        quantise(model, kind, torch.device("meta"))
    whole, quantised = 8 * 1024 * (256 + 1) * 2, sum(t.nbytes for t in [*model.buffers(), *model.parameters()])
    assert quantised < 0.52 * whole and quantised < live.peak < whole
    assert (
        live.peak < quantised * 9 / 8 + 24 * 64 * 256
    )  # bfloat16, two of float32, codes of int32 and what they become


def test_random_weights_are_quantised_as_they_are_made() -> None:
    with LiveBytes() as live:
        model = _make_quantised(lambda: FluxTransformer2DModel(**TINY_FLUX), "nf4", CPU)
    assert live.peak > 0  # the whole, on the meta device alone
    weights = [*model.parameters(), *model.buffers()]
    assert not any(weight.is_meta for weight in weights) and all(w.float().isfinite().all() for w in weights)
    assert {m.weight.dtype for m in model.modules() if isinstance(m, QuantisedLinear)} == {torch.int8, torch.uint8}


def test_a_gpu_without_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A40")
    with pytest.raises(ValueError, match=r"'float8': NVIDIA A40 has compute capability 8\.6.* take int8"):
        base.check_float8("float8", torch.device("cuda"))
    base.check_float8("int8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    base.check_float8("float8", torch.device("cuda"))


@pytest.fixture(scope="module")
def folders(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModelConfig]]:
    root = tmp_path_factory.mktemp("families")
    small: dict[str, Any] = {"height": 32, "width": 32}
    with pytest.MonkeyPatch.context() as patch:
        tiny_qwen.without_torchvision(patch)
        qwen = tiny_qwen.save("2511", tiny_qwen.PROMPTS, root / "qwen")
        klein, tokens = flux2_parts.save_tiny(root / "klein", "klein"), flux2_parts.MAX_TEXT_TOKENS["klein"]
        yield {
            "kontext": ModelConfig(path=str(tiny_pipeline_folder), max_text_tokens=TINY_MAX_TEXT_TOKENS, **small),
            "klein": ModelConfig(path=str(klein), max_text_tokens=tokens, cfg_scale=3.0, **small),
            "qwen": ModelConfig(path=str(qwen), max_text_tokens=40, vision_pixels=4096, **small),
        }


def config_of(model: ModelConfig, kind: Any, kl_beta: float = 0.0) -> Config:
    return Config(
        model=replace(model, base=kind),
        lora=LoraConfig(rank=2, alpha=4, targets=()),
        rollout=RolloutConfig(num_tasks=1, group_size=2, num_steps=2, window_size=0, microbatch_size=2),
        objective=ObjectiveConfig(name="grpo", kl_beta=kl_beta),
        optimizer=OptimizerConfig(weight_decay=0.0, microbatch_size=2),
    )


def task_of() -> EditTask:
    return replace(held_out_tasks(SMALL)[0], source=draw(3, 32, 32).clamp(-1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["kontext", "klein", "qwen"])
def test_the_ratio_is_one(folders: dict[str, ModelConfig], family: str, kind: str) -> None:
    """Rollout, training and the reference run on one base: before the first update the ratio is 1, to the bit."""
    config = config_of(folders[family], kind, kl_beta=0.01)
    policy, objective = build_policy(config.model, config.lora, 0, has_old=False), build_objective(config)
    transformer = policy.pipeline.transformer
    assert transformer.dtype == torch.bfloat16 and not policy.originals
    stored = {m.weight.dtype for m in transformer.modules() if isinstance(m, QuantisedLinear)}
    assert stored == {torch.int8} | {base.FLOAT8 if kind == "float8" else torch.uint8 if kind == "nf4" else torch.int8}
    state = policy.adapters.state("current")
    moved = {key: w + 0.05 * draw(*w.shape, seed=i) for i, (key, w) in enumerate(state.items())}
    policy.adapters.load("current", moved)
    of_one_turn = replace(config, data=replace(config.data, num_turns=1))
    rollout = sample_rollout(policy, objective, [task_of()], of_one_turn, 0)
    optimizer = torch.optim.SGD([weight for _, weight in policy.adapters.trainable], lr=1e-3)
    figures = update(policy, optimizer, objective, rollout, torch.tensor([[1.0], [-1.0]]), config, ONE_RANK)
    assert figures["update/first_ratio_error"] == 0 and figures["update/grad_norm"] > 0


def test_the_probe_computes_with_the_originals(folders: dict[str, ModelConfig]) -> None:
    """What the quantised base is held against is the bfloat16 policy's velocity, to the bit."""
    config = config_of(folders["kontext"], "int8")
    plain = build_policy(replace(config.model, base="bfloat16"), config.lora, 0, has_old=False)
    policy = build_policy(config.model, config.lora, 0, has_old=False, keeps_originals=True)
    assert len(policy.originals) == sum(isinstance(m, QuantisedLinear) for m in policy.pipeline.transformer.modules())
    seen: list[tuple[Any, Tensor]] = []
    velocity = policy.velocity
    watched: Any = lambda *given: seen.append((given, velocity(*given))) or seen[-1][1]  # noqa: E731
    policy.velocity = watched
    error = measure_base_error(policy, build_objective(config), task_of(), config)
    assert not policy.originals
    (given, quantised), (_, original) = seen[-2:]
    with torch.no_grad():
        assert torch.equal(original, plain.velocity(*given)) and not torch.equal(original, quantised)
    errors = [((q - o).norm() / o.norm()).item() for (_, q), (_, o) in zip(seen[-4::2], seen[-3::2], strict=True)]
    assert error.figures["base/velocity"] == pytest.approx(sum(errors) / 2, rel=1e-6)
    assert error.figures["base/log_prob"] > 0 and 1e-4 < error.figures["base/linear"] < 0.1
    assert "clip ranges" in str(error) and error.worst["base/linear"] in str(error)


def test_an_outlier_channel_is_found() -> None:
    """A channel 1e6 times as large takes the others' bits where a row has one scale: what they carry is lost."""
    _, linear = linear_of("float8")
    x, linears = draw(64, 128).bfloat16(), Linears()
    linears.see("plain", x, linear(x), x @ weight_of(linear).bfloat16().T + linear.bias)
    x[:, 5] *= 1e6
    linear.weight[:, 5] = 0
    linears.see("spoilt", x, linear(x), x @ weight_of(linear).bfloat16().T + linear.bias)
    assert linears.outlier["plain"] < 3 and 5e5 < linears.outlier["spoilt"] < 2e6
    assert linears.error["plain"] < 0.05 < 0.4 < linears.error["spoilt"]


def test_text_encoders_in_8_bits(folders: dict[str, ModelConfig]) -> None:
    """Embeddings within int8's error of what they were, and the same whatever is encoded with them."""
    model, lora = folders["kontext"], LoraConfig(rank=2, alpha=4)
    whole, small = (
        build_policy(replace(model, text_encoder=where), lora, 0, has_old=False) for where in ("resident", "int8")
    )
    prompts, images = ["make the red square blue", "remove a circle"], torch.zeros(2, 3, 32, 32)
    before, after = (policy.encode_text(prompts, images, has_cfg=False) for policy in (whole, small))
    alone = build_policy(replace(model, text_encoder="int8"), lora, 0, has_old=False).encode_text(
        prompts[1:], images, has_cfg=False
    )
    for name in before:
        assert 0 < (after[name] - before[name]).norm() < 0.05 * before[name].norm()
        assert torch.equal(after[name][1:], alone[name])
    encoder = small.pipeline.text_encoder_2
    assert {m.weight.dtype for n, m in encoder.named_modules() if isinstance(m, nn.Linear)} == {torch.int8}


def test_a_run(tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on float8: its error in one line and in the first iteration's metrics, and its LoRA in a stock pipeline."""
    words = {
        "model.path": tiny_pipeline_folder, "model.max_text_tokens": 8,
        "model.base": "float8", "objective.name": "grpo", "lora.rank": 2, "lora.alpha": 4, "data.num_turns": 1,
        "rollout.num_tasks": 1, "rollout.group_size": 2, "rollout.num_steps": 2, "rollout.window_size": 0,
        "evaluation.num_sessions": 2, "evaluation.num_sessions_short": 2, "evaluation.num_strips": 1,
        "evaluation.num_steps": 1, "evaluation.every": 0, "run.num_iterations": 2, "run.folder": tmp_path,
    }  # fmt: skip
    assert train([word for name, value in words.items() for word in (f"--{name}", str(value))]) == 0
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert 0 < first["base/velocity"] < 0.2 and first["base/log_prob"] > 0 and "base/velocity" not in second
    assert "error of the base against bfloat16: velocity " in capsys.readouterr().err
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(tiny_pipeline_folder)  # pyright: ignore
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    state = safetensors.torch.load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert state and all(value.dtype == torch.float32 for value in state.values())
