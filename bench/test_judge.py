"""The judge in this process at Qwen3-VL-8B's true shape with random weights: seconds of the read-out 'expected' for 48
judgements of 4 images at 512 px, and milliseconds a token of a batch of 16 by CUDA graph, without one, and by
transformers' `generate`. The tokenizer is the tests' own, with a question of about as many tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import measure
import pytest
import torch
from tiny_judge import small_processor, token_ids, without_video
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mteditflow.config import RewardConfig
from mteditflow.reward.vlm import Question
from mteditflow.reward.vlm_local import LocalVlm

GOALS = {"expected_s": measure.Goal(value=2.0), "token_ms": measure.Goal(value=8.0)}  # on one H200


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    vision: dict[str, Any]
    picture: int  # pixels
    judgements: int
    batch: int  # rows
    tokens: int  # of an answer


TRUE = Size(
    hidden=4096, layers=36, heads=32, intermediate=12288, vocab=151936, picture=512, judgements=48, batch=16,
    vision={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}, tokens=128,
)  # fmt: skip
SMALL = Size(
    hidden=512, layers=2, heads=4, intermediate=64, vocab=512, picture=64, judgements=4, batch=2, tokens=10,
    vision={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0]},
)  # fmt: skip


def build_model(size: Size, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen3-VL with random weights, made on the device."""
    config: Any = Qwen3VLConfig(
        text_config={
            "vocab_size": size.vocab, "hidden_size": size.hidden, "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
            "num_key_value_heads": max(1, size.heads // 4), "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6},
        },
        vision_config={"patch_size": 16, "spatial_merge_size": 2, "out_hidden_size": size.hidden, **size.vision},
        **token_ids(tokenizer),
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: Any = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def questions_of(size: Size) -> list[Question]:
    """Groups of a batch's size that share a source, each trajectory with three edits of its own."""

    def picture(*seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(100**i * n for i, n in enumerate(seed)))
        return torch.randint(256, (3, size.picture, size.picture), dtype=torch.uint8, generator=generator)

    instructions = ("make the jacket of the man red", "remove the car behind him", "turn the day into a rainy evening")
    return [
        Question(
            images=(picture(99, row // size.batch), *(picture(turn, row) for turn in range(3))),
            instructions=instructions, readout="direct", key=torch.tensor([0, 0, 0, row, 0]),
        )
        for row in range(size.judgements)
    ]  # fmt: skip


def seconds_of(call: Callable[[], object]) -> float:
    """On the host's clock, the device's work included."""
    is_cuda = torch.cuda.is_available()
    torch.cuda.synchronize() if is_cuda else None
    start = time.perf_counter()
    call()
    torch.cuda.synchronize() if is_cuda else None
    return time.perf_counter() - start


def time_expected(config: RewardConfig, device: torch.device, loaded: Any, questions: list[Question]) -> dict[str, Any]:
    """Seconds of all judgements, and of the pictures of one batch but for one row's, after a batch to warm up."""
    warm, vlm, encoding = (LocalVlm(config, device, loaded) for _ in range(3))
    batch = questions[: config.num_parallel]
    warm(batch)
    with torch.inference_mode():
        num_tokens = len(encoding._prompts(batch[:1])[0].ids)
        encode_s = seconds_of(lambda: encoding._prompts(batch[1:]))
    seconds = seconds_of(lambda: vlm(questions))
    return {"judgements": len(questions), "question_tokens": num_tokens, "encode_s": encode_s, "expected_s": seconds}


def token_ms(write: Callable[[int], object], tokens: int) -> float:
    """Milliseconds a token: of `tokens` and of one, what they differ in; once before, in which graphs are captured."""
    write(tokens)
    few, many = seconds_of(lambda: write(1)), seconds_of(lambda: write(tokens))
    return 1e3 * (many - few) / (tokens - 1)


def time_tokens(vlm: LocalVlm, questions: list[Question], tokens: int) -> dict[str, Any]:
    """Milliseconds a token of one batch in three ways; tokens are the same with a graph and without, to the bit."""
    decoder = vlm._decode
    assert decoder
    prompts, keys = vlm._prompts(questions), torch.stack([question.key for question in questions])

    def write(num: int) -> list[list[int]]:
        return decoder(prompts, keys, num, lambda row, tokens: False)

    inputs = vlm.prepare(questions)

    def generate(num: int) -> list[list[int]]:
        vlm._generation.max_new_tokens = vlm._generation.min_new_tokens = num
        return vlm._generate(inputs, keys)

    with torch.inference_mode():
        row: dict[str, Any] = {"rows": len(questions), "token_ms": token_ms(write, tokens)}
        graphed, decoder.is_graphed = write(tokens), False
        assert write(tokens) == graphed
        row |= {"eager_token_ms": token_ms(write, max(2, tokens // 4))}
        decoder.is_graphed = vlm.device.type == "cuda"
        return row | {"generate_token_ms": token_ms(generate, max(2, tokens // 8))}


def time_judge(size: Size) -> dict[str, Any]:
    """The row of the judge."""
    device, is_cuda = measure.device_and(True, False)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        without_video(patch)
        processor = small_processor(16, (size.picture**2 // 4, size.picture**2))
    model = build_model(size, processor.tokenizer, device, dtype)
    config = RewardConfig(judge="vlm", readout="expected", num_parallel=size.batch, temperature=0.7)
    questions, loaded = questions_of(size), (processor, model)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "dtype": str(dtype)}
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    row |= time_expected(config, device, loaded, questions)
    writer = LocalVlm(replace(config, readout="direct"), device, loaded)
    with torch.inference_mode():
        row |= time_tokens(writer, questions[: size.batch], size.tokens)
    return row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None}


def test_judge(record: measure.Record) -> None:
    row = time_judge(TRUE if torch.cuda.is_available() else SMALL)
    record.add("judge", row, GOALS)
    print(row)


def test_the_true_shape_is_that_of_8_billion_parameters() -> None:
    with pytest.MonkeyPatch.context() as patch:
        without_video(patch)
        tokenizer = small_processor(16, (64, 4096)).tokenizer
    model = build_model(TRUE, tokenizer, torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 8_767_123_696  # Qwen3-VL-8B-Instruct's
