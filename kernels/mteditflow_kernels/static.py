"""What the compiler made of a kernel, without a GPU: ahead-of-time compilation, read back from the cubin.

`figures(VARIANTS[name])` compiles for bfloat16 latents of a row of 262,144 elements (1024 px) unless said otherwise.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mteditflow_kernels import triton_attend, triton_grpo, triton_nft, triton_rope, triton_rows, triton_sde
from mteditflow_kernels.triton_common import BLOCK, OPTIONS

ROWS, BLOCKS = 16, 256
NUM_HEADS, HEAD = 24, 128  # of FLUX.1 and Qwen-Image
SCALARS = {
    "i32": ("step", "num_elements", "num_blocks", "num_rows", "kl_column", "num_columns", "num_tokens", "num_splits"),
    "fp32": ("clip_range", "kl_beta", "beta", "max_advantage", "eps", "softmax_scale"),
    "*i64": ("steps", "keys", "places"),
    "*i32": ("tickets",),
    "*fp8e4nv": ("quantised",),
}
LATENTS = ("velocity", "latents", "next_latents", "ref_velocity", "old_velocity", "clean", "noise", "grad_velocity")
IN_BLOCKS = ("x", "grad", "turned", "grad_x", "weight_of_norm")  # bfloat16 too, of the transformer's blocks
IN_CACHE = ("query", "key", "value", "cached_keys", "cached_values", "query_weight", "key_weight", "cosine", "sine",
            "attended")  # fmt: skip
STRIDES = ("cache_row", "cache_head", "x_batch", "x_token", "out_batch", "grad_batch", "grad_token", "grad_head")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel and the values of its compile-time parameters."""

    kernel: Any
    constants: dict[str, int | bool]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a compiled kernel needs; `reduced`: the layouts of what it sums, in order, which fix the order of sums."""

    registers: int
    stack: int
    local: int
    instructions: int
    float64: int
    loads_128: int
    loads_narrow: int  # of latents: below 128 bits and more than one number a thread
    stores_128: int
    reduced: tuple[str, ...]

    @property
    def instructions_per_element(self) -> float:
        """Of the whole kernel, its ends included, for the elements of a thread."""
        return self.instructions / (BLOCK / (32 * OPTIONS["num_warps"]))


def _variant(kernel: Any, **constants: int | bool) -> Variant:
    given = {"BLOCK": BLOCK, "BLOCKS": BLOCKS, "ROWS": ROWS, "HAS_STEPS": True, "HAS_WEIGHT": True} | constants
    given |= {"NUM_HEADS": NUM_HEADS, "HEAD": HEAD, "HEADS": BLOCK // HEAD}
    return Variant(kernel=kernel, constants={name: given[name] for name in kernel.arg_names if name in given})


VARIANTS = {
    "noise": _variant(triton_sde._normal_kernel),
    "step, noisy": _variant(triton_sde._step_kernel, IS_SAMPLED=True, IS_NOISY=True, HAS_STEPS=False),
    "step, ODE": _variant(triton_sde._step_kernel, IS_SAMPLED=True, IS_NOISY=False, HAS_STEPS=False),
    "log-prob": _variant(triton_sde._step_kernel, IS_SAMPLED=False, IS_NOISY=False),
    "log-prob, backward": _variant(triton_sde._log_prob_backward_kernel),
    "GRPO": _variant(triton_grpo._grpo_kernel, HAS_REF=False, HAS_OLD=False),
    "GRPO, KL": _variant(triton_grpo._grpo_kernel, HAS_REF=True, HAS_OLD=False),
    "GRPO-Guard": _variant(triton_grpo._grpo_kernel, HAS_REF=False, HAS_OLD=True),
    "GRPO, backward": _variant(triton_grpo._grpo_backward_kernel, HAS_REF=False, HAS_OLD=False),
    "GRPO, KL, backward": _variant(triton_grpo._grpo_backward_kernel, HAS_REF=True, HAS_OLD=False),
    "GRPO-Guard, backward": _variant(triton_grpo._grpo_backward_kernel, HAS_REF=False, HAS_OLD=True),
    "NFT": _variant(triton_nft._nft_kernel, HAS_REF=False),
    "NFT, KL": _variant(triton_nft._nft_kernel, HAS_REF=True),
    "NFT, backward": _variant(triton_nft._nft_backward_kernel, HAS_REF=False),
    "NFT, KL, backward": _variant(triton_nft._nft_backward_kernel, HAS_REF=True),
}
BLOCK_VARIANTS = {  # what runs inside the transformer's blocks, on heads and rows of its width
    "rows to 8 bits": _variant(triton_rows._quantise_kernel),
    "norm and rope": _variant(triton_rope._norm_rope_kernel),
    "norm and rope, backward": _variant(triton_rope._norm_rope_backward_kernel),
}
CACHE_VARIANTS = {  # of a judge's answer: Qwen3-VL-8B's heads, 2,048 places
    "attention to a cache": Variant(
        kernel=triton_attend._attend_kernel,
        constants={"NUM_HEADS": 8, "GROUP": 4, "HEADS": 16, "HEAD": 128, "SPLIT": triton_attend.SPLIT,
                   "PLACES": triton_attend.PLACES},
    ),
    "attention to a cache, merged": Variant(
        kernel=triton_attend._merge_kernel, constants={"GROUP": 4, "SPLITS": 8, "HEAD": 128}
    ),
}  # fmt: skip


def _type(name: str) -> str:
    if name in (*LATENTS, *IN_BLOCKS, *IN_CACHE):
        return "*bf16"
    if name in STRIDES:
        return "i32"
    return next((kind for kind, names in SCALARS.items() if name in names), "*fp32")


def _disassembly(cubin: bytes) -> tuple[str, list[str]]:
    """Disassemble a cubin: its resource usage, and the instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line)]


def is_target(capability: int) -> bool:
    """Say whether this Triton's assembler knows that compute capability."""
    command = [get_ptxas(capability).path, "--help"]
    return f"'sm_{capability}'" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def figures(variant: Variant, capability: int = 90) -> Figures:
    """Compile for that compute capability, pointers and row length divisible by 16, and count."""
    names = variant.kernel.arg_names
    runtime = [name for name in names if name not in variant.constants]
    aligned = [
        name for name in runtime if _type(name).startswith("*") or name in ("num_elements", "num_columns", *STRIDES)
    ]
    source = ASTSource(
        variant.kernel,
        signature={name: _type(name) if name in runtime else "constexpr" for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    usage, code = _disassembly(compiled.asm["cubin"])
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in code)

    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", compiled.asm["ttgir"], flags=re.M))
    reduced = re.findall(r"\(tensor<(\d+)xf32, (#\w+)>\) -> f32", compiled.asm["ttgir"])
    return Figures(
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        instructions=len(code),
        float64=count(r"\bD(ADD|MUL|FMA|SETP)\b|F2F\.F64|\.F64\."),
        loads_128=count(r"LDG\.E\.128"),
        loads_narrow=count(r"LDG\.E\.(U16|64|U8)"),
        stores_128=count(r"STG\.E\.128"),
        reduced=tuple(f"{size} {layouts[name]}" for size, name in reduced),
    )
