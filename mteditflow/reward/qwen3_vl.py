"""Qwen3-VL as a judge runs it: pictures encoded once, prompts read once, and a token for all rows at a step.

transformers has the weights and the vision encoder. Its language model launches about 60 kernels a layer and token,
half of them for four norms in float32; here a layer takes 15. Rows are padded on the right, where causal attention
needs no mask: it never looks there. Rows of one group begin alike, with the rubric and the source image; that part is
read once for all of them, a third of what three turns at 512 px cost.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from mteditflow.pictures import to_pil

PREFILL_TOKENS = 2**15  # read at once: the widest layer of 8 B parameters makes 2 GiB of them
PICTURES_AT_ONCE = 64  # encoded at once: half a GiB likewise, at 512 px
KEPT_SOURCES = 32  # source images that stay encoded for the next wave: 8 MiB each at 512 px and 8 B parameters

ATTENTION = "mteditflow_judge"  # by which name transformers finds that of the vision encoder

Angles = tuple[Tensor, Tensor]
"""Cosines and sines (B, T, d); the second half of each repeats the first."""
Attend = Callable[[int, nn.Module, Tensor, Tensor, Tensor, Angles], Tensor]
"""Number of a layer, its attention, queries (B, T, H, d), keys and values (B, T, h, d) as projected -> (B, T, H d)."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What the vision encoder makes of an image."""

    grid: Tensor  # (3,) int64 on the host: patches in time, down, across
    features: Tensor  # (n, E): in the place of n tokens
    deep: tuple[Tensor, ...]  # (n, E) each: added after the first layers


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question as the model reads it, or a part of one."""

    ids: Tensor  # (T,) int64 on the host; a picture's n tokens stand for it
    positions: Tensor  # (3, T) int64 on the host: in time, down, across
    pictures: tuple[Picture, ...]
    places: Tensor  # (m,) int64 on the host: the pictures' tokens among them
    head: bytes  # the same for prompts that begin alike, up to the end of the first picture
    head_length: int

    @property
    def next_position(self) -> Tensor:
        """Where the answer goes on, in all three: () int64 on the host."""
        return self.positions.max() + 1

    def followed(self, ids: Tensor) -> "Prompt":
        """The prompt with some text (t,) behind it."""
        positions = self.next_position + torch.arange(len(ids)).expand(3, -1)
        return replace(self, ids=torch.cat([self.ids, ids]), positions=torch.cat([self.positions, positions], 1))

    def parts(self) -> "tuple[Prompt, Prompt]":
        """The head, and the rest."""
        n, m = self.head_length, len(self.pictures[0].features)
        head, rest = (
            replace(self, ids=self.ids[part], positions=self.positions[:, part], pictures=pictures, places=places)
            for part, pictures, places in (
                (slice(n), self.pictures[:1], self.places[:m]),
                (slice(n, None), self.pictures[1:], self.places[m:] - n),
            )
        )
        return head, rest


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of B rows at L places, by layer: (B, h, L, d) each."""

    keys: list[Tensor]
    values: list[Tensor]

    def rows(self, rows: slice, length: int | None = None) -> "Cache":
        """Some rows and the first places, all if not given, in the same memory."""
        keys, values = ([x[rows, :, :length] for x in part] for part in (self.keys, self.values))
        return Cache(keys=keys, values=values)


class Encoder:
    """The vision encoder: each distinct picture of a call once, and a source not again in the calls that follow."""

    def __init__(self, processor: Any, model: Any) -> None:
        self._process, self._model = processor.image_processor, model
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend_picture)
        model.model.visual.config._attn_implementation = ATTENTION
        self._sources: OrderedDict[bytes, Picture] = OrderedDict()

    def __call__(self, images: Sequence[Sequence[Tensor]]) -> list[tuple[Picture, ...]]:
        """Encode the images (3, h, w) uint8 of each question, of which the first is the source."""
        keys = [[_key(image) for image in row] for row in images]
        flat = zip(chain(*keys), chain(*images), strict=True)
        distinct = {key: image for key, image in flat if key not in self._sources}
        known = self._sources | dict(zip(distinct, self._encode([*distinct.values()]), strict=True))
        for row in keys:
            self._keep(row[0], known[row[0]])
        return [tuple(known[key] for key in row) for row in keys]

    def _keep(self, key: bytes, source: Picture) -> None:
        if key not in self._sources:  # copies: a part of a tensor would keep all of it
            deep = tuple(level.clone() for level in source.deep)
            self._sources[key] = Picture(grid=source.grid, features=source.features.clone(), deep=deep)
        self._sources.move_to_end(key)
        if len(self._sources) > KEPT_SOURCES:
            self._sources.popitem(last=False)

    def _encode(self, images: Sequence[Tensor]) -> list[Picture]:
        pictures: dict[int, Picture] = {}
        by_size = sorted(range(len(images)), key=lambda i: images[i].shape)
        for _, group in groupby(by_size, key=lambda i: images[i].shape):
            places = list(group)
            for first in range(0, len(places), PICTURES_AT_ONCE):
                some = places[first : first + PICTURES_AT_ONCE]
                pictures |= zip(some, self._encode_alike([images[i] for i in some]), strict=True)
        return [pictures[i] for i in range(len(images))]

    def _encode_alike(self, images: list[Tensor]) -> list[Picture]:
        """Encode images of one size: what depends on it is made once on the host, and attention is one batch."""
        visual, device, num = self._model.model.visual, self._model.device, len(images)
        if getattr(self._process, "backend", "") == "torchvision":
            made = self._process(images, input_data_format="channels_first", device=device, return_tensors="pt")
        else:
            made = self._process([to_pil(image) for image in images], return_tensors="pt")
        grid, merge = made["image_grid_thw"][0].cpu(), visual.spatial_merge_size
        num_patches = int(grid.prod())
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid[None], num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners, spatial_merge_size=merge,
        )  # fmt: skip
        found = visual(
            made["pixel_values"].to(device, self._model.dtype), grid_thw=grid.expand(num, -1), return_dict=True,
            interp_indices=indices.to(device).repeat(num, 1), interp_weights=weights.to(device).repeat(num, 1),
            position_ids=get_vision_position_ids(grid[None], merge).to(device).repeat(num, 1),
            cu_seqlens=torch.tensor([0, num * num_patches], dtype=torch.int32), num_patches=num_patches,
        )  # fmt: skip
        features, *deep = (
            level.split(num_patches // merge**2) for level in (found.pooler_output, *found.deepstack_features)
        )
        return [Picture(grid=grid, features=features[i], deep=tuple(level[i] for level in deep)) for i in range(num)]


def _key(image: Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy().data).digest() + str(tuple(image.shape)).encode()


def make_prompt(text_ids: Sequence[int], pictures: tuple[Picture, ...], model: Any) -> Prompt:
    """The prompt of a text in which one token stands for each picture."""
    short = torch.tensor(text_ids)
    is_image = short == model.config.image_token_id
    assert int(is_image.sum()) == len(pictures), "the chat template shows each image once"
    repeats = torch.ones_like(short)
    repeats[is_image] = torch.tensor([len(picture.features) for picture in pictures])
    ids, is_image = short.repeat_interleave(repeats), is_image.repeat_interleave(repeats)
    grids = torch.stack([picture.grid for picture in pictures])
    positions, _ = model.model.get_rope_index(ids[None], is_image[None].int(), image_grid_thw=grids)
    places = is_image.nonzero()[:, 0]
    n = int(places[0]) + len(pictures[0].features)
    head = hashlib.sha256(ids[:n].numpy().data).digest() + str(id(pictures[0])).encode()
    return Prompt(ids=ids, positions=positions[:, 0], pictures=pictures, places=places, head=head, head_length=n)


def states(
    model: Any, x: Tensor, positions: Tensor, attend: Attend, deep: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """The last states (B, T, E) of embeddings x (B, T, E) at positions (3, B, T).

    deep: after each of the first layers, what is added to which of the B T states: index (m,), (m, E).
    """
    text = model.model.language_model
    angles = text.rotary_emb(x, positions)
    for number, layer in enumerate(text.layers):
        attention, y = layer.self_attn, _norm(x, layer.input_layernorm)
        shape = (*y.shape[:2], -1, attention.head_dim)
        projected = [part(y).view(shape) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        x = x + attention.o_proj(attend(number, attention, projected[0], projected[1], projected[2], angles))
        x = x + layer.mlp(_norm(x, layer.post_attention_layernorm))
        if number < len(deep):
            index, added = deep[number]
            x.view(-1, x.shape[-1]).index_add_(0, index, added)
    return _norm(x, text.norm)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """Qwen3VLTextRMSNorm as one kernel, in float32 within."""
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, norm: Any, angles: Angles) -> Tensor:
    """Queries or keys (B, T, H, d) normalised and turned: (B, H, T, d)."""
    cosine, sine = (angle.unsqueeze(2) for angle in angles)
    first, second = sine.chunk(2, -1)
    x = _norm(x, norm)
    turned = torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), torch.cat([-first, second], -1))
    return turned.transpose(1, 2)


def prefill(model: Any, prompts: Sequence[Prompt], places: Sequence[Sequence[int]], cache: Cache | None) -> Tensor:
    """Read prompts of which those of one head are neighbours: logits (M, V) float32 after the tokens at some `places`
    of each, in order. `cache` then has their keys and values from place 0 on; what it has beyond a prompt is of no use.
    """
    logits, rows = list[Tensor](), 0
    for head, group in groupby(_alone_together(prompts), key=lambda pair: pair[0]):
        some = [prompt for _, prompt in group]
        before = _read_head(model, some[0]) if head else None
        size = max(1, PREFILL_TOKENS // max(len(prompt.ids) for prompt in some))
        for first in range(0, len(some), size):
            part = slice(rows + first, rows + min(first + size, len(some)))
            logits.append(_read(model, prompts[part], places[part], before, cache and cache.rows(part)))
        rows += len(some)
    return torch.cat(logits)


def _alone_together(prompts: Sequence[Prompt]) -> list[tuple[bytes, Prompt]]:
    """Prompts with the head that they share with a neighbour, b"" where they share none."""
    shared = {head for head, rows in groupby(prompt.head for prompt in prompts) if len(list(rows)) > 1}
    return [(prompt.head if prompt.head in shared else b"", prompt) for prompt in prompts]


def _read_head(model: Any, prompt: Prompt) -> Cache:
    """Keys and values (1, h, n, d) of the part of a prompt that others share."""
    found = Cache(keys=[], values=[])

    def attend(number: int, attention: Any, query: Tensor, key: Tensor, value: Tensor, angles: Angles) -> Tensor:
        key, value = _turned(key, attention.k_norm, angles), value.transpose(1, 2)
        found.keys.append(key)
        found.values.append(value)
        return _causal(_turned(query, attention.q_norm, angles), key, value)

    _forward(model, [prompt.parts()[0]], attend)
    return found


def _read(
    model: Any, prompts: Sequence[Prompt], places: Sequence[Sequence[int]], head: Cache | None, cache: Cache | None
) -> Tensor:
    start = head.keys[0].shape[2] if head else 0

    def attend(number: int, attention: Any, query: Tensor, key: Tensor, value: Tensor, angles: Angles) -> Tensor:
        key, value = _turned(key, attention.k_norm, angles), value.transpose(1, 2)  # (B, h, T, d)
        if head:
            key, value = (
                torch.cat([before[number].expand(len(part), -1, -1, -1), part], 2)
                for before, part in ((head.keys, key), (head.values, value))
            )
        if cache:
            cache.keys[number][:, :, : key.shape[2]].copy_(key)
            cache.values[number][:, :, : value.shape[2]].copy_(value)
        return _causal(_turned(query, attention.q_norm, angles), key, value)

    x = _forward(model, [prompt.parts()[1] if head else prompt for prompt in prompts], attend)
    index = [row * x.shape[1] + place - start for row, some in enumerate(places) for place in some]
    return model.lm_head(x.flatten(0, 1)[torch.tensor(index, device=x.device)]).float()


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of queries (B, H, T, d) that stand at the end of their keys (B, h, L, d): (B, T, H d)."""
    num = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(num, 1) for part in (key, value))
    return _attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def _attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Attention (B, H, T, d), on a GPU by torch's flash kernel: called by its name, because what
    `scaled_dot_product_attention` chooses is a setting of the process, which a user's reward may change.
    """
    if query.is_cuda:  # causal there: the last query sees the last key
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return scaled_dot_product_attention(query, key, value, attn_mask=mask if is_causal else None)


def _attend_picture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, num_patches: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within each picture of (1, H, n, d), `num_patches` each or all of one, as transformers asks for it: (1,
    n, H, d).
    """
    num = num_patches or query.shape[2]
    apart = (part[0].unflatten(1, (-1, num)).transpose(0, 1) for part in (query, key, value))  # (P, H, num, d)
    return _attention(*apart, is_causal=False).transpose(1, 2).flatten(0, 1)[None], None


def _forward(model: Any, prompts: Sequence[Prompt], attend: Attend) -> Tensor:
    """The last states (B, T, E) of prompts, padded on the right."""
    device = model.device
    ids = pad_sequence([prompt.ids for prompt in prompts], batch_first=True)
    positions = pad_sequence([prompt.positions.T for prompt in prompts], batch_first=True).permute(2, 0, 1)
    x = model.model.language_model.embed_tokens(ids.to(device))
    pictures, deep = [picture for prompt in prompts for picture in prompt.pictures], list[tuple[Tensor, Tensor]]()
    if pictures:
        index = torch.cat([row * ids.shape[1] + prompt.places for row, prompt in enumerate(prompts)]).to(device)
        x.flatten(0, 1).index_copy_(0, index, torch.cat([picture.features for picture in pictures]))
        levels = zip(*(picture.deep for picture in pictures), strict=True)
        deep = [(index, torch.cat(level)) for level in levels]
    return states(model, x, positions.to(device), attend, deep)
