"""Answers written token by token: all rows of a batch at a step, over a static cache, by CUDA graph on a GPU.

transformers' `generate` launches a token's 2,500 kernels from the host, about 27 ms whatever the batch. Here a step is
a function of buffers that stay where they are, so that a graph replays it, and the host looks at what was written
every CHECK_EVERY tokens only: on a GPU one look late, by an event, while the next tokens are on their way. So at most
2 CHECK_EVERY - 1 tokens are written that nobody needs (CHECK_EVERY - 1 on a CPU). A batch ends when each of its rows
has closed the tags of all its turns, or has ended.

A token is drawn by Gumbel's trick with numbers counted by Philox from the question's key: an answer depends on its
question alone, up to the rounding of the logits, and on no global state.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mteditflow_kernels import attend_cache, counter_uniform
from torch import Tensor

from mteditflow.noise import TURN_SHIFT
from mteditflow.reward.qwen3_vl import Angles, Cache, Prompt, prefill, states

TOP_K = 20  # likeliest tokens among which one is drawn, as in Qwen3-VL's own generation config
CHECK_EVERY = 8  # tokens
LENGTH_STEP = 512  # the cache's length is a multiple of it, so that it and its graphs serve the waves that follow

IsFinished = Callable[[int, list[int]], bool]
"""Row, its tokens so far -> whether it needs no more."""


def gumbel(keys: Tensor, first: int, num: int) -> Tensor:
    """What is added to the logits of tokens `first` to `first + num` of answers: (num, B, TOP_K), float32."""
    keys = keys.repeat(num, 1, 1)  # (num, B, 5)
    keys[:, :, 2] += torch.arange(first, first + num, device=keys.device)[:, None] << TURN_SHIFT
    return -(-counter_uniform(keys.flatten(0, 1), TOP_K).log()).log().reshape(num, -1, TOP_K)


def draw(logits: Tensor, chance: Tensor | None, temperature: float) -> Tensor:
    """A token (B,) for each row of logits (B, V) float32: the likeliest, or by chance (B, TOP_K) one of the likely.

    argmax_i(logit_i / temperature - log(-log u_i)) has the distribution of softmax(logit / temperature).
    """
    if chance is None:
        return logits.argmax(1)
    top = logits.topk(min(TOP_K, logits.shape[1]))
    place = (top.values / temperature + chance[:, : top.values.shape[1]]).argmax(1, keepdim=True)
    return top.indices.gather(1, place)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """What a step reads and writes, of R rows and L places in the cache."""

    cache: Cache
    token: Tensor  # (R,) int64: which is read next
    place: Tensor  # (R,) int64: its place in the cache
    position: Tensor  # (R,) int64: its position
    chance: Tensor  # (CHECK_EVERY, R, TOP_K): for the tokens until the next look
    written: Tensor  # (CHECK_EVERY, R) int64: those tokens
    number: Tensor  # (1,) int64: how many of them there are


def _make_buffers(model: Any, num_rows: int, length: int) -> Buffers:
    text, device, dtype = model.config.text_config, model.device, model.dtype
    shape = (num_rows, text.num_key_value_heads, length, text.head_dim)
    keys, values = (
        [torch.zeros(shape, device=device, dtype=dtype) for _ in range(text.num_hidden_layers)] for _ in range(2)
    )
    whole = {"device": device, "dtype": torch.int64}
    return Buffers(
        cache=Cache(keys=keys, values=values), token=torch.zeros(num_rows, **whole),
        place=torch.zeros(num_rows, **whole), position=torch.zeros(num_rows, **whole),
        chance=torch.zeros(CHECK_EVERY, num_rows, TOP_K, device=device),
        written=torch.zeros(CHECK_EVERY, num_rows, **whole), number=torch.zeros(1, **whole),
    )  # fmt: skip


class Decoder:
    """Answers to prompts by one model, for one thread. Its buffers are as large as the largest batch so far."""

    def __init__(self, model: Any, temperature: float) -> None:
        """temperature 0: always the likeliest token."""
        self._model, self._temperature = model, temperature
        self._buffers: Buffers | None = None
        self.is_graphed = model.device.type == "cuda"
        self.num_late = int(self.is_graphed)  # looks that are still on their way while the next tokens are written
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # of the graphs' memory

    def __call__(
        self, prompts: Sequence[Prompt], keys: Tensor, num_tokens: int, is_finished: IsFinished
    ) -> list[list[int]]:
        """Answer prompts, of which those of one head are neighbours, in at most `num_tokens` tokens each; `keys` (B, 5)
        of their chance. An answer goes on a little after `is_finished` could first have said so.
        """
        keys = keys.to(self._model.device)
        logits = self._start(prompts, num_tokens)
        first = draw(logits, gumbel(keys, 0, 1)[0] if self._temperature else None, self._temperature)
        buffers, num_rows = self._buffers, len(prompts)
        assert buffers
        buffers.token[:num_rows] = first
        buffers.written[0, :num_rows] = first
        longest, count = max(len(prompt.ids) for prompt in prompts), 1
        looks = deque([self._look(1)])
        answers, open_rows = [list[int]() for _ in prompts], set(range(num_rows))
        while True:
            while len(looks) > self.num_late or (looks and count == num_tokens):
                tokens = looks.popleft()()
                for row in [*open_rows]:
                    answers[row] += tokens[:, row].tolist()
                    if is_finished(row, answers[row]):
                        open_rows.remove(row)
                if not open_rows:
                    return answers
            if count == num_tokens:
                return answers
            some = min(CHECK_EVERY, num_tokens - count)
            buffers.number.zero_()
            if self._temperature:
                buffers.chance[:some, :num_rows] = gumbel(keys, count, some)
            length = longest + count + some if keys.device.type == "cpu" else buffers.cache.keys[0].shape[2]
            for _ in range(some):
                self._replay(_power_of_two(num_rows), length)
            looks.append(self._look(some))
            count += some

    def _start(self, prompts: Sequence[Prompt], num_tokens: int) -> Tensor:
        """Read the prompts; the logits (B, V) of the first tokens."""
        lengths = [len(prompt.ids) for prompt in prompts]
        num_rows, longest = len(prompts), max(lengths)
        rows, length = _power_of_two(num_rows), _round_up(longest + num_tokens, LENGTH_STEP)
        held = self._buffers.cache.keys[0].shape[::2] if self._buffers else (0, 0)
        if held[0] < rows or held[1] < length:
            self._buffers, self._graphs = None, {}  # their memory, before more is taken
            self._buffers = _make_buffers(self._model, max(rows, held[0]), max(length, held[1]))
        buffers, device = self._buffers, self._model.device
        assert buffers
        for part in (*buffers.cache.keys, *buffers.cache.values):
            part.zero_()  # what is not read counts nothing, unless it is NaN
        buffers.place.zero_()  # of rows that only fill the batch, too
        buffers.place[:num_rows] = torch.tensor(lengths).to(device)
        buffers.position[:num_rows] = torch.stack([prompt.next_position for prompt in prompts]).to(device)
        return prefill(self._model, prompts, [[n - 1] for n in lengths], buffers.cache.rows(slice(num_rows)))

    def _look(self, num: int) -> Callable[[], Tensor]:
        """What will have been written last, `num` tokens of all rows (num, R): a function that waits for it."""
        assert self._buffers
        written = self._buffers.written[:num]
        if written.device.type == "cpu":
            tokens = written.clone()
            return lambda: tokens
        host = torch.empty(written.shape, dtype=written.dtype, pin_memory=True).copy_(written, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # waits asleep: the rollout has the core
        event.record()

        def wait() -> Tensor:
            event.synchronize()
            return host

        return wait

    def _replay(self, num_rows: int, length: int) -> None:
        """A step of the first rows, over the first places of the cache."""
        if not self.is_graphed:
            return self._step(num_rows, length)
        if graph := self._graphs.get((num_rows, length)):
            return graph.replay()
        # A graph's kernels run in the context where they were captured, so on the SMs of the stream that is current, if
        # it has some of its own; the default stream cannot be captured.
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._step(num_rows, length)  # this one eagerly, which is the capture's warm-up too
        current.wait_stream(stream)
        self._pool, graph = self._pool or torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            self._step(num_rows, length)
        self._graphs[num_rows, length] = graph

    def _step(self, num_rows: int, length: int) -> None:
        """Read the last token of each row, and write the next."""
        buffers, model = self._buffers, self._model
        assert buffers
        cache, token = buffers.cache.rows(slice(num_rows), length), buffers.token[:num_rows]
        place, position = buffers.place[:num_rows], buffers.position[:num_rows]

        def attend(number: int, attention: Any, query: Tensor, key: Tensor, value: Tensor, angles: Angles) -> Tensor:
            weights, eps = (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.variance_epsilon
            found = attend_cache(
                query[:, 0], key[:, 0], value[:, 0], cache.keys[number], cache.values[number], place, weights,
                (angles[0][:, 0], angles[1][:, 0]), eps,
            )  # fmt: skip
            return found.reshape(num_rows, 1, -1)

        x = model.model.language_model.embed_tokens(token[:, None])  # (R, 1, E)
        x = states(model, x, position.expand(3, -1)[:, :, None], attend)
        chance = buffers.chance.index_select(0, buffers.number)[0, :num_rows] if self._temperature else None
        token.copy_(draw(model.lm_head(x[:, 0]).float(), chance, self._temperature))
        buffers.written[:, :num_rows].index_copy_(0, buffers.number, token[None])
        for counter in (place, position, buffers.number):
            counter += 1


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
