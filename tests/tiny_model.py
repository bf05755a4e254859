"""A tiny random Qwen3 with a real tokenizer, built in a second: the model of every test that needs one.

Both vLLM and transformers load it. Its distributions are far from uniform and depend on the whole context, so a shifted
row, a lost token or an ignored temperature shows at once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

VOCAB_SIZE = 304
"""Above the tokenizer's 259 ids on purpose: real models pad their output too."""

LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|role|>' + message['role'] + '\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|role|>assistant\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

LOGITS_STD = 1.25
"""Two ids differ by 1.8 nats at one standard deviation, more than any error a test should miss; and at T = 0.5 the
rarest is at about -15 nats, where float32 still holds 1e-5 after a forward."""


def build_tiny_qwen3(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    max_context_tokens: int = 256,
    vocab_size: int = VOCAB_SIZE,
    tied: bool = False,
) -> Path:
    """A model folder below `folder`; equal arguments give equal weights, and a second call builds nothing.

    Args:
        tied: whether the LM head is the embedding, as in most small models.
    """
    name = f"tiny-qwen3-seed{seed}-layers{num_layers}-context{max_context_tokens}-vocab{vocab_size}"
    path = folder / (f"{name}-tied" if tied else name)
    if path.exists():
        return path
    building = path.with_name(f"{path.name}.{os.getpid()}")
    tokenizer = byte_tokenizer()
    special_ids = tokenizer.get_vocab()
    tokenizer.save_pretrained(building)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_context_tokens,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=special_ids[IM_END],
        pad_token_id=special_ids[EOS],
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                is_head = name == ("model.embed_tokens.weight" if tied else "lm_head.weight")
                scale = LOGITS_STD if is_head else 1.0
                fan_in = 1 if "embed" in name and not tied else weight.shape[-1]
                weight.normal_(std=scale / fan_in**0.5, generator=generator)
    model.save_pretrained(building)
    try:
        building.rename(path)
    except OSError:  # another process was first
        shutil.rmtree(building)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255) and three special tokens: any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (EOS, IM_START, IM_END)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=IM_END, pad_token=EOS)
    fast.chat_template = CHATML
    return fast


SHAPES = ("qwen3-base", "llama", "gemma3")
"""Families whose EOS is not what ends a turn of their chat; two begin with a BOS that their tokenizer adds as well."""


def build_tiny_shape(folder: Path, shape: str, *, tied: bool, template: bool = True) -> Path:
    """A random model of one of SHAPES in a new folder below `folder`, with its family's special tokens and template."""
    path = folder / f"{shape}-{'tied' if tied else 'untied'}-{'chat' if template else 'bare'}"
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    config: PretrainedConfig
    match shape:
        case "qwen3-base":
            tokenizer = _tokenizer((EOS, IM_START, IM_END), bos=None, eos=EOS, template=CHATML)
            config = Qwen3Config(**sizes, bos_token_id=None, eos_token_id=256)
        case "llama":
            specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|role|>", "<|eot_id|>")
            tokenizer = _tokenizer(specials, bos=specials[0], eos=specials[1], template=LLAMA)
            config = LlamaConfig(**sizes, bos_token_id=256, eos_token_id=257)
        case "gemma3":
            specials = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
            tokenizer = _tokenizer(specials, bos=specials[0], eos=specials[1], template=GEMMA)
            layers = ["sliding_attention", "full_attention"]
            config = Gemma3TextConfig(**sizes, sliding_window=8, layer_types=layers, bos_token_id=256, eos_token_id=257)
        case _:
            raise ValueError(shape)
    if not template:
        tokenizer.chat_template = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _tokenizer(specials: tuple[str, ...], *, bos: str | None, eos: str, template: str) -> PreTrainedTokenizerFast:
    """Bytes and `specials`; with a BOS, one that the tokenizer itself puts before every text."""
    base = byte_tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(vocab={t: i for t, i in base.get_vocab().items() if i < 256}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = base.pre_tokenizer, base.decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast
