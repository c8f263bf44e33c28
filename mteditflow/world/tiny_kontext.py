"""A small FluxKontextPipeline in FLUX.1-Kontext's diffusers format, with random weights.

Everything but the sizes is as in FLUX.1-Kontext-dev: the same classes, the same scheduler constants, the same file
layout, so that the code that drives the miniature drives the real editor. The one departure is the tokenizers. CLIP's
and T5's own classes are BPE and unigram over tens of thousands of pieces; an editor whose language has a few dozen
words needs none, so both are word-level `PreTrainedTokenizerFast`: in transformers 5 another name of
`TokenizersBackend`, which is what `model_index.json` records and stock `from_pretrained` loads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

PAD, UNKNOWN = "<pad>", "<unk>"
T5_END = "</s>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


def _tokenizer(tokens: Sequence[str], max_tokens: int, *, end: str, start: str = "") -> PreTrainedTokenizerFast:
    """Make a lower-casing tokenizer that splits at white space; a token's id is its place in `tokens`."""
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        repeated = sorted({token for token in tokens if tokens.count(token) > 1})
        raise ValueError(f"vocabulary has words more than once: {', '.join(repeated)}")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{start} $A {end}".strip(), special_tokens=[(token, ids[token]) for token in (start, end) if token]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=end, unk_token=UNKNOWN, model_max_length=max_tokens,
        padding_side="right", **({"bos_token": start} if start else {}),
    )  # fmt: skip


def t5_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Make T5's: words, `</s>`, padding; at most `max_tokens` with `</s>`. Ids as in T5: <pad> 0, </s> 1, <unk> 2."""
    return _tokenizer([PAD, T5_END, UNKNOWN, *vocabulary], max_tokens, end=T5_END)


def clip_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Make CLIP's: start token, words, end token, then padding; at most `max_tokens` with both; the end token's id is
    the largest, as CLIP's pooling wants it.
    """
    return _tokenizer([PAD, UNKNOWN, *vocabulary, CLIP_START, CLIP_END], max_tokens, start=CLIP_START, end=CLIP_END)


def _clip(tokenizer: Any, width: int) -> CLIPTextModel:
    """Make CLIP with one layer; its pooled output is the state at the end token, unless that token's id were 2."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def _t5(tokenizer: Any, width: int) -> T5EncoderModel:
    """Make T5 v1.1 (gated GELU) with one layer."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return T5EncoderModel(config)


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make FLUX.1-Kontext-dev's scheduler, constant for constant."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


def build_pipeline(
    *,
    vocabulary: Sequence[str],
    vae: Mapping[str, Any],
    transformer: Mapping[str, Any],
    max_text_tokens: int,
    seed: int,
) -> FluxKontextPipeline:
    """Make a pipeline with random float32 weights, a function of `seed`; the global random state is left as it was.

    vocabulary: words, lower case, without white space; others become <unk>.
    vae, transformer: keywords of AutoencoderKL and FluxTransformer2DModel; the text encoders take the latter's widths.
    max_text_tokens: T, T5 tokens of an instruction with </s>; CLIP has one more, its start token.
    """
    tokenizer, tokenizer_2 = clip_tokenizer(vocabulary, max_text_tokens + 1), t5_tokenizer(vocabulary, max_text_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxKontextPipeline(
            scheduler=flux_scheduler(),
            vae=AutoencoderKL(**vae),
            text_encoder=_clip(tokenizer, transformer["pooled_projection_dim"]),
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            text_encoder_2=_t5(tokenizer_2, transformer["joint_attention_dim"]),
            tokenizer_2=tokenizer_2,  # pyright: ignore[reportArgumentType]
            transformer=FluxTransformer2DModel(**transformer),
        )
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        module.eval()
    return pipeline
