"""Models that score an edit, (source, instruction, edit) -> number, as rewards: `model:PATH` and `module:Class:PATH`.

How such models are published, and what becomes of them here:

- CLIP and SigLIP tuned on preferences (PickScore; HPSv2 where somebody has converted it): image and text features and a
  scale. Their own logit of the edit with its turn's instruction.
- An image encoder with a head of one number (quality, aesthetics): the logit of the edit alone.
- A vision-language model with a score head (HPSv3), or one whose answer is read (EditScore): prompt, preparation and
  read-out are the model's own and stand in no config. A few lines of the user's, `Class(path, device)`, say them.

Each of the stock classes here is such a class (`EditModel`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mteditflow.config.errors import first_line
from mteditflow.pictures import to_pil
from mteditflow.reward.user_function import EditModel

TWO_TOWERS = ("clip", "siglip")
HEAD = "ForImageClassification"
SAFE: Any = {"trust_remote_code": False}  # nor asked about on the terminal


class TwoTowers:
    """Logit of a picture with its instruction, by a CLIP or SigLIP."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.images, self.texts = (
            AutoImageProcessor.from_pretrained(path, **SAFE),
            AutoTokenizer.from_pretrained(path, **SAFE),
        )
        self.model = _resident(AutoModel, path, device)
        self.length = self.model.config.text_config.max_position_embeddings
        self.is_masked = self.model.config.model_type == "clip"  # SigLIP was trained to see its padding

    def __call__(self, sources: Tensor, instructions: Sequence[str], pictures: Tensor) -> Tensor:
        """Logits (M,); an instruction longer than the model reads is cut."""
        texts = self.texts(
            list(instructions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(pictures.device)
        mask = {"attention_mask": texts["attention_mask"]} if self.is_masked else {}
        text = self.model.get_text_features(input_ids=texts["input_ids"], **mask).pooler_output
        image = self.model.get_image_features(pixel_values=prepared(self.images, pictures)).pooler_output
        cosine = (normalize(text, dim=1) * normalize(image, dim=1)).sum(1)
        return cosine * self.model.logit_scale.exp() + getattr(self.model, "logit_bias", 0.0)


class ImageHead:
    """The one number that a model has for a picture."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.images = AutoImageProcessor.from_pretrained(path, **SAFE)
        self.model = _resident(AutoModelForImageClassification, path, device)

    def __call__(self, sources: Tensor, instructions: Sequence[str], pictures: Tensor) -> Tensor:
        """Numbers (M,)."""
        return self.model(pixel_values=prepared(self.images, pictures)).logits[:, 0]


def _resident(kind: Any, path: str, device: torch.device) -> Any:
    """Load a model onto its device. ValueError: the folder lacks weights, which would be random."""
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **SAFE)
    if info["missing_keys"]:
        raise ValueError(f"it has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.requires_grad_(False).eval().to(device)


def prepared(processor: Any, pictures: Tensor) -> Tensor:
    """What a stock image processor makes of pictures (M, 3, H, W) in [-1, 1], on their device."""
    values = processor(images=[to_pil(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    return values.to(pictures.device)


def load_model(path: str, device: torch.device, field: str) -> EditModel:
    """The model of a folder or hub name, in float32. ValueError, one line: it is not there, or gives no such number."""
    disable_progress_bar()  # the run has its own
    try:
        config: Any = AutoConfig.from_pretrained(path, **SAFE)
        kind = (config.architectures or ["model without architectures"])[0]
        if config.model_type in TWO_TOWERS and not kind.endswith(HEAD):
            return TwoTowers(path, device)
        if kind.endswith(HEAD) and config.num_labels == 1:
            return ImageHead(path, device)
    except ImportError as error:
        raise ValueError(f"{field}: needs a package that is missing ({first_line(error)}): install it") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}: cannot be loaded ({first_line(error)}): give the folder or hub name of a model with its "
            f"preprocessor_config.json and, of a CLIP, its tokenizer; a module of your own must not be called model"
        ) from error
    is_head = kind.endswith(HEAD)
    what = f"{kind} of {config.num_labels} labels" if is_head else f"{kind} ({config.model_type})"
    raise ValueError(
        f"{field}: is a {what}, must be a {' or '.join(TWO_TOWERS)} or an image classifier of one label; how another "
        f"is asked and read, a class of yours says: module:Class:PATH (docs/judge.md)"
    )
