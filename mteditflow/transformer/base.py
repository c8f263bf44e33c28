"""The frozen base in 8 or 4 bits: linears that keep a quantised weight and have a gradient to their input alone.

    float8  e4m3 with one float32 scale per output row. The input is quantised too, row by row, and the product is taken
            in 8 bits (H100 and newer, RTX 40 and newer); elsewhere it is emulated: exact products of e4m3 numbers,
            float32 sums.
    int8    one bfloat16 scale per output row; bfloat16 product with the weight dequantised.
    nf4     QLoRA's 4 bits (arXiv 2305.14314): 16 quantiles of a normal, a bfloat16 scale per 64 inputs; product as
            int8's.

A row's bits depend on no other row, since every scale of an input is its row's; and they are the same with a gradient
and without, since one operator computes both. It is opaque to the compiler, so compiled bits are eager bits. The
gradient to the input is taken with the dequantised weight, one bfloat16 temporary of one linear at a time: autograd
keeps the quantised weight only. e4m3 is exact in bfloat16, and its scales are folded into the incoming gradient.

Why our own: torchao's linear that keeps an FP8 weight has no backward, its import slows every start, and bitsandbytes'
4 bits cannot be run without a GPU. The operators below are what either does with a frozen weight (docs/log.md).

Which linears (measured, docs/precision.md): those of the blocks are quantised as asked; modulation, whose input
has one row per picture, is int8 in every case, a quarter of FLUX.1's weights at no loss; embedders and the output's
projection, less than 1 % of the weights and up to three times the error of all blocks, stay in bfloat16.
"""

import re
from functools import cache
from typing import Any, Literal

import torch
from mteditflow_kernels import quantise_rows
from torch import Tensor, nn

Kind = Literal["float8", "int8", "nf4"]

FLOAT8 = torch.float8_e4m3fn
FLOAT8_STEP = 16  # the 8-bit product wants inputs and outputs in multiples of it
NF4_BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ROWS_AT_A_TIME = 2048  # of a weight while it is quantised: what bounds the float32 temporaries
BLOCK = re.compile(r"\.\d+\.")  # in names of modules of a repeated block
MODULATION = re.compile(r"norm|_mod\b|_modulation")  # in names of linears whose input has a row per picture


def _int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (N, K) in [-127, 127] and scales (N, 1), bfloat16."""
    scale = (rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127).bfloat16()
    return (rows.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def _nf4_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of 4-bit codes (N, K / 2), the first in the high half, and scales (N, K / 64), bfloat16."""
    blocks = rows.float().unflatten(-1, (-1, NF4_BLOCK))  # (N, K / 64, 64)
    scale = blocks.abs().amax(-1).clamp(min=1e-12).bfloat16()
    values = torch.tensor(NF4, device=rows.device)
    codes = torch.bucketize(blocks / scale.float()[..., None], (values[1:] + values[:-1]) / 2, out_int32=True)
    high, low = codes.flatten(1).unflatten(-1, (-1, 2)).unbind(-1)
    return (high * 16 + low).to(torch.uint8), scale


QUANTISE = {"float8": quantise_rows, "int8": _int8_rows, "nf4": _nf4_rows}


@cache
def _nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Both values (256, 2) of a byte."""
    values = torch.tensor(NF4, device=device, dtype=torch.float32).to(dtype)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`; of float8 without its scales, which makes it exact."""
    if weight.dtype == FLOAT8:
        return weight.to(dtype)
    if weight.dtype == torch.int8:
        return weight * scale.to(dtype)
    values = nn.functional.embedding(weight.int(), _nf4_pairs(weight.device, dtype)).flatten(1)
    return (values.unflatten(-1, (-1, NF4_BLOCK)) * scale.to(dtype)[..., None]).flatten(1)


def float8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, K) times weight (M, K) transposed, both in e4m3: (N, M) in x's dtype, summed in float32."""
    rows, row_scale = quantise_rows(x)
    if x.device.type == "cuda":
        # the second operand is column-major, as the tensor cores want it; row-wise scales allow bfloat16 results only
        product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows, weight.t(), scale_a=row_scale, scale_b=scale.t(), bias=None if bias is None else bias.bfloat16(),
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return product.to(x.dtype)
    product = (rows.float() @ weight.float().t()) * row_scale * scale.t()
    return (product if bias is None else product + bias.float()).to(x.dtype)


@torch.library.custom_op("mteditflow::frozen_linear", mutates_args=())
def frozen_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Put rows x (N, in) through a quantised linear: (N, out), in x's dtype. Differentiable in x alone.

    Rows, since what an operator returns may be added to in place only where it is no view.
    """
    if weight.dtype == FLOAT8:
        return float8_product(x, weight, scale, bias)
    return nn.functional.linear(x, dequantise(weight, scale, x.dtype), bias)


@torch.library.custom_op("mteditflow::frozen_linear_backward", mutates_args=())
def frozen_linear_backward(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient (N, in) to the input, of one (N, out) to the output."""
    if weight.dtype == FLOAT8:
        # multiplied in float32, rounded where it is stored: no float32 copy of the gradient
        gradient = torch.mul(gradient, scale.t(), out=torch.empty_like(gradient))
    return gradient @ dequantise(weight, scale, gradient.dtype)


@frozen_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


@frozen_linear_backward.register_fake
def _(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    num_inputs = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    return gradient.new_empty(len(gradient), num_inputs)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return frozen_linear_backward(gradient, *ctx.saved_tensors), None, None, None


frozen_linear.register_autograd(_backward, setup_context=_keep)


class QuantisedLinear(nn.Linear):
    """Stands where a frozen nn.Linear stood. Weight and scales are buffers, so that a model's parameters have the dtype
    of its forward pass, which libraries read from them.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind, device: torch.device) -> None:
        """Quantise the weight of a linear on the device; the linear itself stays as it was."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        parts = [QUANTISE[kind](rows.to(device)) for rows in linear.weight.detach().split(ROWS_AT_A_TIME)]
        weight, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.stored: torch.dtype | None = None  # of the weight, where it is a parameter
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)

    def make_parameters(self) -> None:
        """Make frozen parameters of weight and scales, which is what FSDP cuts. Whole numbers pass for float8, byte by
        byte: until torch 2.12 what is cut may need a gradient for a moment, which they cannot.
        """
        self.stored = self.weight.dtype
        for name in ("weight", "scale"):
            value = getattr(self, name)
            value = value if value.is_floating_point() else value.view(FLOAT8)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of the input."""
        weight = self.weight if self.stored is None else self.weight.view(self.stored)
        rows = frozen_linear(input.flatten(0, -2), weight, self.scale, self.bias)
        return rows if input.ndim == 2 else rows.unflatten(0, input.shape[:-1])


def kind_of(name: str, linear: nn.Linear, base: Kind) -> Kind | None:
    """How a linear of that name is stored under a base; None: as it is. What a format cannot take is int8."""
    if MODULATION.search(name):
        return "int8"
    if not BLOCK.search(name):
        return None
    sizes, step = (linear.in_features, linear.out_features), FLOAT8_STEP
    is_fit = {"float8": sizes[0] % step == sizes[1] % step == 0, "int8": True, "nf4": sizes[0] % NF4_BLOCK == 0}
    return base if is_fit[base] else "int8"


def linears_to_quantise(model: nn.Module, base: Kind) -> dict[str, tuple[nn.Linear, Kind]]:
    """The linears of a model that a base stores in fewer bits, by full name, and how."""
    named = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return {name: (module, kind) for name, module in named if (kind := kind_of(name, module, base))}


def quantise(
    model: nn.Module, base: Kind, device: torch.device, *, keeps_originals: bool = False, is_returned: bool = False
) -> dict[str, Tensor]:
    """Put quantised linears on the device in the place of a model's, one by one, so that the device never holds the
    model as it was: what is quantised, and a part of one weight. Everything else stays where it is. is_returned: each
    goes back to where the linear was, for a model that does not fit quantised either.

    Returns the weights as they were, on the host by name, where they are to be kept. A model that was made quantised
    stays as it is. ValueError: nothing to quantise.
    """
    originals, found = {}, linears_to_quantise(model, base)
    if not found and not any(isinstance(module, QuantisedLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no linears in repeated blocks, so that nothing becomes {base}: set model.base "
            f"bfloat16 and model.text_encoder resident"
        )
    for name, (linear, kind) in found.items():
        if keeps_originals:
            originals[name] = linear.weight.detach()
        parent, _, leaf = name.rpartition(".")
        quantised = QuantisedLinear(linear, kind, device)
        setattr(model.get_submodule(parent), leaf, quantised.to(linear.weight.device) if is_returned else quantised)
    return originals


def check_float8(base: str, device: torch.device) -> None:
    """ValueError, naming what to take, where float8 is asked for on a GPU that cannot multiply in it."""
    if base == "float8" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < (8, 9):
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                f"model.base is 'float8': {name} has compute capability {found[0]}.{found[1]}, and products in FP8 "
                f"need 8.9 (RTX 40, L40) or 9.0 (H100): take int8, of the same size, or nf4"
            )


def stored(model: nn.Module, base: str) -> dict[str, tuple[int, int]]:
    """Rows, and bytes of a row, of each tensor of a model as a base stores it; the model may be on the meta device."""
    whole = 4 if base == "float32" else 2
    tensors = {name: (w.shape[0], whole * (w.numel() // w.shape[0])) for name, w in model.named_parameters()}
    if base in QUANTISE:
        for name, (linear, kind) in linears_to_quantise(model, base).items():  # pyright: ignore[reportArgumentType]
            rows, columns = linear.out_features, linear.in_features
            tensors[f"{name}.weight"] = rows, columns // 2 if kind == "nf4" else columns
            tensors[f"{name}.scale"] = rows, {"float8": 4, "int8": 2, "nf4": columns // NF4_BLOCK * 2}[kind]
    return tensors


def num_bytes(model: nn.Module, base: str) -> int:
    """Bytes of a model's weights as a base stores them; the model may be on the meta device."""
    return sum(rows * size for rows, size in stored(model, base).values())
