"""Which kernels compute the trained transformer's attention. Its GPU is a stand-in: what is asked of it is noted, and
what it would compute runs on the CPU, where torch's flash kernels have a backward too.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from cpu_attention import attention_on_cpu
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from flux2_parts import TRANSFORMER
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.policy import FAMILIES, Policy, build_policy
from mteditflow.transformer import attention
from mteditflow.transformer.attention import BACKENDS, choose_attention
from mteditflow.types import Condition

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIZES: dict[str, Any] = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16}


def transformer(family: str = "flux") -> Any:
    match family:
        case "flux":
            small: dict[str, Any] = {"num_single_layers": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
            return FluxTransformer2DModel(**SIZES, **small, axes_dims_rope=(4, 6, 6))
        case "flux2":
            return Flux2Transformer2DModel(**TRANSFORMER)
        case _:
            return QwenImageTransformer2DModel(**SIZES, out_channels=4, joint_attention_dim=8, axes_dims_rope=(4, 6, 6))


def backends(model: Any) -> list[object]:
    """What the processors of a model, or of a policy's transformer, are set to."""
    found: list[Any] = [getattr(module, "processor", None) for module in model.modules()]
    return [processor._attention_backend for processor in found if hasattr(processor, "_attention_backend")]


def choose(
    model: Any, wanted: Any, device: torch.device = CUDA, dtype: Any = torch.bfloat16, masked: Any = False
) -> str:
    return choose_attention(model, wanted, dtype=dtype, device=device, is_masked=masked)


@pytest.fixture(autouse=True)
def backends_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's choice puts into diffusers' table is gone after a test."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", {**_AttentionBackendRegistry._backends})


@pytest.fixture
def kernels() -> Iterator[list[str]]:
    """A GPU's kernels of attention on the CPU. In each, another thread attends in float32 as only torch's plain kernel
    can; the list is what came of that: "" or the error.
    """
    found = list[str]()

    def attend_beside() -> str:
        query = torch.ones(1, 1, 4, 8)
        try:
            scaled_dot_product_attention(query, query, torch.ones(1, 1, 4, 5))  # a width of its own: no other takes it
        except RuntimeError as error:
            return str(error)
        return ""

    def within() -> None:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(attend_beside).result())

    with attention_on_cpu(within):
        yield found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, kernels: list[str]) -> Any:
    """An H100 with both FlashAttentions installed; `broken` are the backends that refuse to run."""
    state = SimpleNamespace(
        capability=(9, 0), packages={"flash_attn_interface", "flash_attn.cute"}, active=[], broken={}
    )
    real = attention._run_once

    def run_once(name: Any, head_size: int, dtype: Any, device: Any, is_masked: bool) -> None:
        if name in state.broken:
            raise RuntimeError(state.broken[name])
        real("native" if name == "cudnn" else name, head_size, dtype, CPU, is_masked)

    monkeypatch.setattr(attention, "_run_once", run_once)
    monkeypatch.setattr(attention, "_is_installed", lambda module: module in state.packages)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", state.active.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda **_: state.active.clear())
    return state


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen"])
def test_every_processor_has_it_and_no_other_model(family: str, gpu: Any) -> None:
    model, other, before = transformer(family), transformer(), _AttentionBackendRegistry.get_active_backend()[0]
    assert choose(model, "cudnn") == "cudnn"
    assert backends(model) == [AttentionBackendName._NATIVE_CUDNN] * (1 if family == "qwen" else 2)
    assert backends(other) == [None, None]
    assert _AttentionBackendRegistry.get_active_backend()[0] == before


def test_flash_is_activated_in_torch(gpu: Any) -> None:
    for wanted, name in (("flash3", "FA3"), ("flash4", "FA4")):
        gpu.active.clear()
        assert choose(model := transformer(), wanted) == wanted
        assert gpu.active == [name] and set(backends(model)) == {AttentionBackendName._NATIVE_FLASH}


def test_auto(gpu: Any) -> None:
    assert choose(transformer(), "auto") == "cudnn" and not gpu.active
    assert choose(transformer("qwen"), "auto", masked=True) == "cudnn"
    assert choose(transformer(), "auto", dtype=torch.float32) == "native"
    assert choose(transformer(), "auto", device=CPU, dtype=torch.float32) == "native"
    gpu.broken["cudnn"] = "No available kernel."
    assert choose(model := transformer(), "auto") == "native"
    assert set(backends(model)) == {AttentionBackendName.NATIVE}


@pytest.mark.parametrize(
    "wanted, change, options, message",
    [
        ("cudnn", {}, {"device": CPU}, "this machine computes on cpu, where attention is torch's native; take auto"),
        ("cudnn", {}, {"dtype": torch.float32},
         "it computes in bfloat16, and the model in float32; take auto or native"),
        ("flash3", {"capability": (8, 0)}, {},
         "it needs an H100 or H200, and this is a NVIDIA A100 of compute capability 8.0; take auto or native or cudnn"),
        ("flash3", {"packages": ()}, {},
         "it needs the package flash_attn_3, a wheel for your torch and CUDA or built from hopper/ of "
         "Dao-AILab/flash-attention; take auto or native or cudnn"),
        ("flash4", {"packages": ()}, {},
         "it needs the package flash-attn-4, pip install 'mteditflow[flash]'; take auto or native or cudnn"),
        ("flash4", {}, {"masked": True},
         "the model's text has a mask, which FlashAttention does not take; take auto or native or cudnn"),
        ("flash3", {"broken": {"flash3": "head dim 512\nis unsupported"}}, {},
         "it does not run here: head dim 512; take auto or native or cudnn"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_line(
    wanted: Any, change: dict[str, Any], options: dict[str, Any], message: str, gpu: Any
) -> None:
    for name, value in change.items():
        setattr(gpu, name, value)
    model = transformer()
    with pytest.raises(ValueError) as error:
        choose(model, wanted, **options)
    assert str(error.value) == f"model.attention is {wanted!r}: {message}"
    assert set(backends(model)) == {None} and not gpu.active


def test_a_mask_is_a_fact_of_the_family() -> None:
    assert [family.transformer for family in FAMILIES if family.is_masked] == ["QwenImageTransformer2DModel"]
    query = torch.zeros(2, 4, 2, 16)
    with pytest.raises(ValueError, match="attn_mask"):  # diffusers' own refusal
        attention.dispatch_attention_fn(query, query, query, attn_mask=query.bool(), backend=BACKENDS["flash3"])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("wanted", ["cudnn", "flash3"])
def test_another_thread_attends_while_the_editor_does(
    wanted: Any, is_compiled: bool, gpu: Any, kernels: list[str]
) -> None:
    """The editor's choice changes no switch of the process, so a judge's attention finds the kernels it needs."""
    model, native = transformer(), transformer()
    native.load_state_dict(model.state_dict())
    choose(model, wanted)
    kernels.clear()
    latents = torch.linspace(-1, 1, 2 * 8 * 16).view(2, 8, 16).requires_grad_()
    ids = torch.linspace(0, 1, 13 * 3).view(13, 3)

    def gradient(model: Any) -> Tensor:
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        velocity = called(
            latents, encoder_hidden_states=torch.ones(2, 5, 8), timestep=torch.full((2,), 0.5), img_ids=ids[5:],
            txt_ids=ids[:5], pooled_projections=torch.ones(2, 8), return_dict=False,
        )[0]  # fmt: skip
        return torch.autograd.grad(velocity.square().sum(), latents)[0]

    found = gradient(model)
    assert kernels == ["", ""]  # a double and a single block, neither run again for the gradient
    before = gradient(native)
    # a softmax over tiles is rounded in another order: 2 blocks and their gradients, sums of 13 keys
    torch.testing.assert_close(found, before, rtol=0, atol=4 * 13 * 2**-24 * float(before.abs().max()))


def test_a_mask_reaches_cudnn_as_torch_hands_it(kernels: list[str]) -> None:
    """Masked keys count for nothing, in the gradient too; without one, no sums are kept for it."""
    rows = torch.linspace(-2, 2, 3 * 2 * 6 * 2 * 16).sin().view(3, 2, 6, 2, 16)
    query, key, value = (part.clone().requires_grad_() for part in rows)
    mask = (torch.arange(6) < torch.tensor([[4], [6]]))[:, None, None]  # (B, 1, 1, S)
    own = BACKENDS["cudnn"]
    attention.hand_contiguous_gradients(own, attention.BY_NAME[own])
    attended = attention.dispatch_attention_fn(query, key, value, attn_mask=mask, backend=own)
    expected = attention.dispatch_attention_fn(query, key, value, attn_mask=mask, backend=BACKENDS["native"])
    found, wanted = (torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (attended, expected))
    assert kernels == [""] and found[1][0, 4:].abs().max() == found[2][0, 4:].abs().max() == 0
    # sums of 16 terms and of 6 keys, of which each is rounded once
    torch.testing.assert_close((attended, *found), (expected, *wanted), rtol=0, atol=2 * 16 * 6 * 2**-24)


def test_a_module_is_looked_for_without_its_package() -> None:
    assert attention._is_installed("torch.nn") and not attention._is_installed("torch.nothing")
    assert not attention._is_installed("nothing_of_this_name.interface")


def policy_of(folder: Path, lora: LoraConfig, **fields: Any) -> Policy:
    model = ModelConfig(path=str(folder), max_text_tokens=TINY_MAX_TEXT_TOKENS, **fields)
    return build_policy(model, lora, seed=0, has_old=True)


def velocity(policy: Policy, name: Any) -> Tensor:
    images = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    text = policy.encode_text(["make the red square blue", "remove the circle"], images, has_cfg=False)
    condition = Condition(text=text, image=policy.encode_image(images))
    latents = torch.linspace(-2, 2, 2 * policy.num_tokens * policy.num_channels)
    with policy.adapters.use(name), torch.no_grad():
        rows = latents.view(2, policy.num_tokens, policy.num_channels)
        return policy.velocity(rows, torch.tensor([0.9, 0.5]), condition)


@pytest.mark.parametrize("lora", [LoraConfig(rank=2, alpha=4), LoraConfig(is_full=True, targets=())])
def test_the_choice_reaches_every_copy(tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, lora: Any) -> None:
    """Adapters, and in full fine-tuning the copies of the transformer, attend by the kernels that were chosen."""
    native = policy_of(tiny_pipeline_folder, lora)
    assert native.attention == "native"
    monkeypatch.setattr(attention, "_resolve", lambda *_: "flash3")
    policy = policy_of(tiny_pipeline_folder, lora)
    calls: list[object] = []
    own = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_FLASH]
    counted = lambda **given: calls.append(0) or own(**given)  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_FLASH, counted)
    for name in ("current", "ema", "old", "off"):
        calls.clear()
        # a softmax over tiles is rounded in another order: 2 blocks, sums of 40 terms, values below 4
        torch.testing.assert_close(velocity(policy, name), velocity(native, name), rtol=0, atol=2 * 40 * 4 * 2**-24)
        assert len(calls) == 2  # a double and a single block, of this policy alone


@pytest.mark.parametrize("family", ["flux", "flux2"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_kernels_get_contiguous_gradients(family: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one stream has a part of a wider tensor to give; what comes out stays as it is, to the bit."""
    native, found = AttentionBackendName.NATIVE, []
    known, model = _AttentionBackendRegistry._backends[native], transformer(family)
    width = model.config.joint_attention_dim
    own = {"guidance": torch.ones(2)} if family == "flux2" else {"pooled_projections": torch.randn(2, 8)}
    ids = torch.randn(13, 4 if family == "flux2" else 3)
    latents = torch.randn(2, 8, model.config.in_channels, requires_grad=True)

    def noted(**arguments: Any) -> Tensor:
        attended = known(**arguments)
        attended.register_hook(lambda grad: found.append(grad.is_contiguous()))
        return attended

    def gradient() -> Tensor:
        found.clear()
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        velocity = called(
            latents, encoder_hidden_states=torch.ones(2, 5, width), timestep=torch.full((2,), 0.5), img_ids=ids[5:],
            txt_ids=ids[:5], return_dict=False, **own,
        )[0]  # fmt: skip
        return torch.autograd.grad(velocity.square().sum(), latents)[0]

    monkeypatch.setitem(_AttentionBackendRegistry._backends, native, known if is_compiled else noted)
    choose(model, "native", CPU, torch.float32)
    before, was_contiguous = gradient(), list(found)
    torch.compiler.reset()
    attention.hand_contiguous_gradients(native)
    assert torch.equal(gradient(), before)
    if not is_compiled:
        assert not all(was_contiguous) and all(found) and len(found) == len(was_contiguous)
