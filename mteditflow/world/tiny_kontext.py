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


def _word_level(tokens: Sequence[str], template: str, specials: Sequence[str]) -> Tokenizer:
    """A lower-casing tokenizer that splits at white space; a token's id is its place in `tokens`."""
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        repeated = sorted({token for token in tokens if tokens.count(token) > 1})
        raise ValueError(f"vocabulary has words more than once: {', '.join(repeated)}")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=template, special_tokens=[(token, ids[token]) for token in specials]
    )
    return tokenizer


def t5_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Words, then `</s>`, then padding; at most `max_tokens` with `</s>`. Ids as in T5: <pad> 0, </s> 1, <unk> 2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level([PAD, T5_END, UNKNOWN, *vocabulary], f"$A {T5_END}", [T5_END]),
        pad_token=PAD,
        eos_token=T5_END,
        unk_token=UNKNOWN,
        model_max_length=max_tokens,
        padding_side="right",
    )


def clip_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Start token, words, end token, then padding; at most `max_tokens` with both; the end token's id is largest."""
    tokens = [PAD, UNKNOWN, *vocabulary, CLIP_START, CLIP_END]
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(tokens, f"{CLIP_START} $A {CLIP_END}", [CLIP_START, CLIP_END]),
        pad_token=PAD,
        bos_token=CLIP_START,
        eos_token=CLIP_END,
        unk_token=UNKNOWN,
        model_max_length=max_tokens,
        padding_side="right",
    )


def _clip(tokenizer: PreTrainedTokenizerFast, width: int) -> CLIPTextModel:
    """One layer; the pooled output is the state at the end token (an eos_token_id of 2 would mean another rule)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.get_vocab()[PAD],
        bos_token_id=tokenizer.get_vocab()[CLIP_START],
        eos_token_id=tokenizer.get_vocab()[CLIP_END],
    )
    return CLIPTextModel(config)


def _t5(tokenizer: PreTrainedTokenizerFast, width: int) -> T5EncoderModel:
    """One layer of T5 v1.1 (gated GELU)."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.get_vocab()[PAD],
        eos_token_id=tokenizer.get_vocab()[T5_END],
    )
    return T5EncoderModel(config)


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-Kontext-dev's own scheduler, constant for constant."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_pipeline(
    *,
    vocabulary: Sequence[str],
    vae: Mapping[str, Any],
    transformer: Mapping[str, Any],
    text_width: int,
    pooled_width: int,
    max_text_tokens: int,
    seed: int,
) -> FluxKontextPipeline:
    """A pipeline with random float32 weights, a function of `seed`; the global random state is left as it was.

    vocabulary: words, lower case, without white space; others become <unk>.
    vae, transformer: keywords of AutoencoderKL and FluxTransformer2DModel; the latter's text widths are filled in.
    text_width, pooled_width: E of T5's embeddings (N, T, E) and E' of CLIP's (N, E').
    max_text_tokens: T, T5 tokens of an instruction with </s>; CLIP has one more, its start token.
    """
    widths = {"joint_attention_dim": text_width, "pooled_projection_dim": pooled_width}
    for name, width in widths.items():
        assert transformer.get(name, width) == width, f"transformer[{name!r}] must be {width}"
    tokenizer, tokenizer_2 = clip_tokenizer(vocabulary, max_text_tokens + 1), t5_tokenizer(vocabulary, max_text_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxKontextPipeline(
            scheduler=flux_scheduler(),
            vae=AutoencoderKL(**vae),
            text_encoder=_clip(tokenizer, pooled_width),
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            text_encoder_2=_t5(tokenizer_2, text_width),
            tokenizer_2=tokenizer_2,  # pyright: ignore[reportArgumentType]
            transformer=FluxTransformer2DModel(**{**transformer, **widths}),
        )
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        module.eval()
    return pipeline
