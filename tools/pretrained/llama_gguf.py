"""A GGUF file of a Llama as a model folder of transformers: `convert`.

transformers reads such files, too, but the weights only with one more package, and the tokenizer with another end of
text and spaces before digits split otherwise than the model has learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

_OF_THE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_OF_A_LAYER = {
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


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file to a new folder: config, bf16 weights, tokenizer with its chat template.

    It must be a Llama with tied embeddings and the tokenizer of SmolLM, byte-level BPE that takes digits one by one.
    """
    reader = GGUFReader(gguf)
    folder.mkdir()
    config = _config(reader)
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    def llama(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    hidden_size, num_heads = llama("embedding_length"), llama("attention.head_count")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=llama("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=llama("feed_forward_length"),
        num_hidden_layers=llama("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=llama("attention.head_count_kv"),
        head_dim=hidden_size // num_heads,
        max_position_embeddings=llama("context_length"),
        rms_norm_eps=llama("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": llama("rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def _weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")  # blk.7.attn_q.weight, output_norm.weight
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in num_heads:
            weight = _in_halves(weight, num_heads[part])
        name = f"model.layers.{layer[1]}.{_OF_A_LAYER[part]}" if layer else _OF_THE_MODEL[part]
        weights[f"{name}.weight"] = weight.to(torch.bfloat16)
    return weights


def _in_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head, ``[num_heads * head_dim, hidden]``, from llama.cpp's order to that of transformers.

    A rotation turns two rows: llama.cpp has the two side by side, transformers half a head apart.
    """
    pairs = weight.view(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])

    def token(name: str) -> str:
        return tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
