"""What the small judge learns: batches of sessions as tokens and patches, and the losses.

The lesson that counts is the answer: cross-entropy at the digits, and lightly at the tags around them. From nothing
that alone is not learnt on a CPU, since a grade is one number for four places in two pictures. So linear heads, thrown
away afterwards, are asked for the steps to it: the vision part what is in each place; the text part, layer by layer,
what was in that place before and what the instruction wants (both are copied by attention), how far the place has
changed (now the two can be compared), and how far the edit was carried out. What a head must know, later layers use.

Digits of other turns that the judge sees in its own answer are random in half of the batches, so that it scores every
turn by the pictures and `expected` may put what it likes in their places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import cross_entropy

from mteditflow.judge.sessions import Judged, draw_cells
from mteditflow.judge.small import IMAGE, VISION_END
from mteditflow.pictures import to_uint8
from mteditflow.reward.vlm import Question
from mteditflow.reward.vlm_local import messages
from mteditflow.world.edits import EDIT_TYPES, Edit
from mteditflow.world.render import atlas, compose
from mteditflow.world.scenes import BACKGROUNDS, COLORS, COUNTS, KINDS, MATERIALS, TEXTS
from mteditflow.world.verify import Reading, differences, find_outcome

PATCH, CELLS = 16, 4  # pixels of a patch; tokens of a picture
DAMAGED = len(KINDS) + 1  # among kinds: 0 empty, 1 to 9 as in KINDS
SIZES = (len(KINDS) + 2, len(COLORS), len(MATERIALS), len(COUNTS), len(TEXTS), len(BACKGROUNDS), CELLS)
KNOWN = {  # what an instruction says of what it wants, by place in SIZES; the last is the place in the picture
    "subject_add": (0, 1, 2, 3, 4, 6), "subject_remove": (), "subject_replace": (0, 1, 2, 3, 4), "color_alter": (1,),
    "material_alter": (2,), "count_change": (3,), "text_change": (4,), "background_change": (5,),
    "position_change": (6,),
}  # fmt: skip
COPIED, COMPARED, JUDGED = 1, 2, 3  # layers of the text part whose outputs are asked
OUTCOMES = ("done", "partly", "tried", "no")
WANTED, JUDGEMENT = (len(EDIT_TYPES), len(KINDS) + 1, *SIZES), (len(OUTCOMES), 5)  # classes of such heads
CLEAN_SHARE = 0.7  # of composed sessions, whose source is clean, as in a run
NOTHING = -100  # a target that is not asked for
WORDS = ("is done", "is half done", "is done wrongly", "is not done")
"""Of a thought, by OUTCOMES."""


def to_patches(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, 64, 64) uint8 as Qwen3-VL's processor cuts them: (16 N, 1536) float32, every frame twice."""
    scaled = (pictures.float() / 255 - 0.5) / 0.5
    cut = rearrange(scaled, "n c (y i h) (x j w) -> (n y x i j) c h w", i=2, j=2, h=PATCH, w=PATCH)
    return cut[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)


def positions(ids: Tensor, image: int) -> Tensor:
    """Qwen3-VL's three positions of tokens (B, T), (3, B, T), for pictures of 2 x 2 tokens and padding on the right."""
    is_image = (ids == image).long()
    place = (is_image.cumsum(1) - 1) % CELLS * is_image  # within its picture
    texts, pictures = (1 - is_image).cumsum(1), (is_image.cumsum(1) - is_image) // CELLS  # before, texts with this one
    base = texts - (1 - is_image) + 2 * pictures
    return torch.stack([base, base + place // 2, base + place % 2])


def answer_text(judged: Judged, readout: str) -> str:
    """The answer that is right, with a thought before it where the read-out is 'thinking'."""
    scores = "\n".join(f"<Turn{turn}Score>{grade}</Turn{turn}Score>" for turn, grade in enumerate(judged.grades, 1))
    if readout != "thinking":
        return scores
    thoughts = [
        f"Turn {turn} {WORDS[OUTCOMES.index(outcome)]}, {min(damage, 9)} lost."
        for turn, (outcome, damage) in enumerate(outcomes(judged), 1)
    ]
    return f"<Thought>{' '.join(thoughts)}</Thought>\n{scores}"


def outcomes(judged: Judged) -> list[tuple[str, int]]:
    """How far each turn's edit was carried out, and the damage."""
    return [find_outcome(*turn) for turn in zip(judged.edits, judged.readings[:-1], judged.readings[1:], strict=True)]


def prompt_text(tokenizer: Any, judged: Judged, readout: str) -> str:
    """The question as the judge reads it, each picture four tokens; what the pictures show does not matter."""
    none = torch.zeros(0)
    question = Question(
        images=(none,) * (len(judged.edits) + 1), instructions=tuple(edit.instruction for edit in judged.edits),
        readout=readout, key=none,
    )  # fmt: skip
    text = tokenizer.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)
    return text.replace(IMAGE, IMAGE * CELLS)


def item_targets(readings: Sequence[Reading]) -> Tensor:
    """What is in each place of N pictures, (N, 4, 7) int64: classes of SIZES, NOTHING where it has none.

    The place itself is among them, so that a token says where it is and can be compared with that place's in another
    picture.
    """
    return torch.tensor([[[*_cell_target(cell, r.background), p] for p, cell in enumerate(r.cells)] for r in readings])


def wanted_target(edit: Edit) -> list[int]:
    """What an instruction says, (9,): the edit type, the kind that it names, and of SIZES what it wants."""
    wanted = [*_cell_target(edit.after.cells[edit.place], edit.after.background), edit.place]
    known = [value if i in KNOWN[edit.edit_type] else NOTHING for i, value in enumerate(wanted)]
    return [EDIT_TYPES.index(edit.edit_type), KINDS.index(edit.kind) + 1 if edit.kind else 0, *known]


def _cell_target(cell: Any, background: str) -> list[int]:
    behind = BACKGROUNDS.index(background)
    if cell is None or isinstance(cell, str):
        return [DAMAGED if cell else 0, *[NOTHING] * 4, behind]
    text = TEXTS.index(cell.text) if cell.text else NOTHING
    count = NOTHING if cell.text else COUNTS.index(cell.count)
    kind = KINDS.index(cell.kind) + 1
    return [kind, COLORS.index(cell.color), MATERIALS.index(cell.material), count, text, behind]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B sessions of K turns, T tokens with padding on the right."""

    ids: Tensor  # (B, T)
    pixels: Tensor  # (B (K+1) 16, 1536)
    answer: Tensor  # (B, A) places of the answer's tokens in `ids`
    weight: Tensor  # (B, A) of each of them in the loss
    target: Tensor  # (B, A)
    is_digit: Tensor  # (B, A) bool
    items: Tensor  # (B (K+1), 4, 7): what is in the places
    change: Tensor  # (B, K+1, 4): how far the places have changed since the picture before; NOTHING for the source
    before: Tensor  # (B, K+1, 4, 7): what was in the places; NOTHING for the source
    wanted: Tensor  # (B, K+1, 4, 9): what the instruction says, the same for all places; NOTHING for the source
    outcome: Tensor  # (B, K+1)
    damage: Tensor  # (B, K+1): 0, 1, 2 to 4, 5 to 7, more


def draw_pictures(judged: Sequence[Judged], cells: Tensor, random: Random) -> Tensor:
    """The pictures of sessions of K turns, (B (K+1), 3, 64, 64) uint8; a composed session begins clean or not."""
    drawn = []
    for session in judged:
        if session.pictures is not None:
            drawn.append(session.pictures)
            continue
        pictures = draw_readings(cells, session.readings)
        if random.random() < CLEAN_SHARE:
            pictures[0] = draw_readings(None, session.readings[:1])[0]
        drawn.append(pictures)
    return torch.cat(drawn)


def draw_readings(cells: Tensor | None, readings: Sequence[Reading]) -> Tensor:
    """Draw what is read, (N, 3, 64, 64) uint8: of the editor's cells, or clean."""
    backgrounds = torch.tensor([BACKGROUNDS.index(reading.background) for reading in readings])
    items = atlas().rows(readings)  # pyright: ignore[reportArgumentType]
    return to_uint8(compose(items, backgrounds)) if cells is None else draw_cells(cells, items, backgrounds)


def make_batch(tokenizer: Any, judged: Sequence[Judged], pictures: Tensor, readout: str, random: Random) -> Batch:
    """Make a batch of sessions of one length. In half of the rows the digits that are shown are random."""
    texts = [prompt_text(tokenizer, session, readout) for session in judged]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = tokenizer([f"{answer_text(s, readout)}<|im_end|>" for s in judged], add_special_tokens=False)["input_ids"]
    digits = set(tokenizer.convert_tokens_to_ids(list("12345")))
    length, num = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)), max(map(len, answers))
    ids = torch.full((len(judged), length), tokenizer.pad_token_id)
    answer, target = torch.zeros(len(judged), num, dtype=torch.int64), torch.full((len(judged), num), NOTHING)
    num_turns = len(judged[0].edits)
    is_digit = torch.zeros(len(judged), num, dtype=torch.bool)
    for row, (prompt, words) in enumerate(zip(prompts, answers, strict=True)):
        places = [i for i, token in enumerate(words) if token in digits][-num_turns:]
        target[row, : len(words)] = torch.tensor(words)
        is_digit[row, places] = True
        answer[row, : len(words)] = torch.arange(len(prompt) - 1, len(prompt) + len(words) - 1)
        shown = list(words)
        if random.random() < 0.5:
            for place in places:
                shown[place] = tokenizer.convert_tokens_to_ids(random.choice("12345X"))
        ids[row, : len(prompt) + len(words)] = torch.tensor(prompt + shown)
    readings = [reading for session in judged for reading in session.readings]
    found = [outcomes(session) for session in judged]
    first = [NOTHING]
    items = item_targets(readings)
    before = items.unflatten(0, (len(judged), -1)).roll(1, 1)
    before[:, 0] = NOTHING
    wanted = torch.tensor([[[NOTHING] * 9, *(wanted_target(edit) for edit in s.edits)] for s in judged])
    return Batch(
        ids=ids, pixels=to_patches(pictures), answer=answer, target=target, is_digit=is_digit,
        weight=is_digit + 0.1 * ~is_digit, items=items,
        before=before, wanted=wanted[:, :, None].expand(-1, -1, CELLS, -1),
        change=torch.tensor([[first * 4, *map(_changes, s.readings[:-1], s.readings[1:])] for s in judged]),
        outcome=torch.tensor([first + [OUTCOMES.index(outcome) for outcome, _ in turns] for turns in found]),
        damage=torch.tensor([first + [sum(d > most for most in (0, 1, 4, 7)) for _, d in turns] for turns in found]),
    )  # fmt: skip


def _changes(before: Reading, after: Reading) -> list[int]:
    return [differences(was, seen) for was, seen in zip(before.cells, after.cells, strict=True)]


class Teacher(torch.nn.Module):
    """The judge with the heads that are thrown away."""

    def __init__(self, vlm: Any, tokenizer: Any) -> None:
        super().__init__()
        self.vlm, width = vlm, vlm.config.text_config.hidden_size
        self.items = torch.nn.Linear(width, sum(SIZES))
        self.before, self.wanted = torch.nn.Linear(width, sum(SIZES)), torch.nn.Linear(width, sum(WANTED))
        self.change, self.outcome = torch.nn.Linear(width, 5), torch.nn.Linear(width, sum(JUDGEMENT))
        self.image, self.end = tokenizer.convert_tokens_to_ids([IMAGE, VISION_END])
        self._seen: dict[str, Tensor] = {}
        visual = vlm.model.visual
        for name, module in (("image", visual.merger), ("deep", visual.deepstack_merger_list[0])):
            module.register_forward_hook(self._keep(name))
        for layer in (COPIED, COMPARED, JUDGED):
            vlm.model.language_model.layers[layer].register_forward_hook(self._keep(str(layer)))

    def _keep(self, name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            self._seen[name] = output

        return hook

    def look(self, pixels: Tensor, items: Tensor) -> Tensor:
        """The loss of reading N pictures (16 N, 1536)."""
        self.vlm.model.visual(pixels, grid_thw=torch.tensor([[1, 4, 4]] * len(items)))
        return _losses(self.items(self._seen["image"]), items, SIZES)

    def losses(self, batch: Batch, *, is_looking: bool = True) -> dict[str, Tensor]:
        """The loss of each lesson; the vision part learns where `is_looking`, else it is as it was."""
        with torch.set_grad_enabled(is_looking):
            items = self.look(batch.pixels, batch.items)
        model, is_image = self.vlm.model, batch.ids == self.image
        embeds = model.get_input_embeddings()(batch.ids)
        hidden = model.language_model(
            inputs_embeds=embeds.masked_scatter(is_image[..., None], self._seen["image"]), use_cache=False,
            position_ids=positions(batch.ids, self.image), visual_pos_masks=is_image,
            deepstack_visual_embeds=[self._seen["deep"]],
        ).last_hidden_state  # fmt: skip
        logits = self.vlm.lm_head(hidden.gather(1, batch.answer[..., None].expand(-1, -1, hidden.shape[-1])))
        each = cross_entropy(logits.transpose(1, 2), batch.target, reduction="none", ignore_index=NOTHING)
        copied, compared, judged = (self._seen[str(layer)] for layer in (COPIED, COMPARED, JUDGED))
        found = torch.stack([batch.outcome, batch.damage], -1)
        return {
            "answer": (each * batch.weight).sum() / batch.is_digit.sum(),
            "digits": (each * batch.is_digit).sum().detach() / batch.is_digit.sum(),
            "items": items,
            "before": _losses(self.before(copied[is_image]), batch.before, SIZES),
            "wanted": _losses(self.wanted(copied[is_image]), batch.wanted, WANTED),
            "change": _losses(self.change(compared[is_image]), batch.change[..., None], (5,)),
            "outcome": _losses(self.outcome(judged[batch.ids == self.end]), found, JUDGEMENT),
        }


def _losses(logits: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum of several cross-entropies: logits (M, sum of sizes), targets (..., number of sizes) of M rows."""
    parts = zip(logits.split(list(sizes), dim=-1), target.flatten(0, -2).unbind(-1), strict=True)
    losses = [cross_entropy(part, wanted, ignore_index=NOTHING) for part, wanted in parts if (wanted >= 0).any()]
    return sum(losses, torch.zeros(()))
