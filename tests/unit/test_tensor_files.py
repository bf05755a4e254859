"""safetensors files: found, compared with a model's, and averaged, against numpy and the library itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from protos.errors import InvalidRequest
from teacher_server.tensor_files import TensorFiles, TensorSpec, blend, check_fits_model, max_bytes

MODEL = {"a.weight": TensorSpec("BF16", (2, 3)), "lm_head.weight": TensorSpec("BF16", (5, 2))}


def test_a_tied_tensor_may_be_left_out_and_no_other() -> None:
    without_head = {"a.weight": MODEL["a.weight"]}
    check_fits_model(without_head, MODEL, frozenset({"lm_head.weight"}))
    with pytest.raises(InvalidRequest, match=r"lm_head\.weight is missing; the model has it as BF16 \[5, 2\]"):
        check_fits_model(without_head, MODEL, frozenset())


@pytest.mark.parametrize(
    ("dtype", "taken"), [("F32", True), ("F16", True), ("F64", False), ("I32", False), ("U8", False)]
)
def test_floats_come_as_any_of_three_types(dtype: str, *, taken: bool) -> None:
    incoming = MODEL | {"a.weight": TensorSpec(dtype, (2, 3))}
    if taken:
        check_fits_model(incoming, MODEL, frozenset())
    else:
        with pytest.raises(InvalidRequest, match=rf"a\.weight is {dtype} \[2, 3\]"):
            check_fits_model(incoming, MODEL, frozenset())


def test_the_largest_file_is_the_model_in_float32() -> None:
    assert max_bytes(MODEL) == 100_000_000 + 4 * (2 * 3 + 5 * 2)


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    save_file({"c": torch.zeros(4)}, tmp_path / "consolidated.safetensors")  # beside the index, not in it
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = TensorFiles.find(tmp_path)
    assert found.specs == {"a": TensorSpec("F32", (2,)), "b": TensorSpec("F32", (3,))}

    index.write_text(json.dumps({"weight_map": weight_map | {"d": "../model-3.safetensors"}}))
    with pytest.raises(InvalidRequest, match="files beside it"):
        TensorFiles.find(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"d": "model-3.safetensors"}}))
    with pytest.raises(InvalidRequest, match=r"'model-3\.safetensors', which is not a file"):
        TensorFiles.find(tmp_path)
    index.write_text("[]")
    with pytest.raises(InvalidRequest, match="not an index of shards"):
        TensorFiles.find(tmp_path)


def test_a_file_that_changes_after_it_was_found_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    found = TensorFiles.find(file)
    found.check_unchanged()
    save_file({"a": torch.ones(2)}, file)
    os.utime(file, ns=(0, 0))
    with pytest.raises(InvalidRequest, match="changed or removed"):
        found.check_unchanged()
    file.unlink()
    with pytest.raises(InvalidRequest, match="changed or removed"):
        found.check_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_kept_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Ten small steps: in bfloat16 each would round away; numpy in float32 is the reference."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (), "c": (7,)}

    def tensors() -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(dtype)
            for name, shape in shapes.items()
        }

    first = tensors()
    save_file(first, tmp_path / "0.safetensors")
    current = TensorFiles.find(tmp_path / "0.safetensors")
    expected = {name: tensor.float().numpy() for name, tensor in first.items()}
    decay = 0.999
    for step in range(10):
        incoming = tensors()
        save_file(incoming, tmp_path / "incoming.safetensors")
        theirs = TensorFiles.find(tmp_path / "incoming.safetensors")
        current = blend(current, theirs, decay, tmp_path / f"mean{step}.safetensors")
        for name, tensor in incoming.items():
            expected[name] = np.float32(decay) * expected[name] + np.float32(1 - decay) * tensor.float().numpy()
    for name, tensor in load_file(tmp_path / "mean9.safetensors").items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=2e-6, atol=1e-7)


def test_a_mean_of_integers_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int32)}, tmp_path / "a.safetensors")
    found = TensorFiles.find(tmp_path / "a.safetensors")
    with pytest.raises(InvalidRequest, match=r"a is I32 \[2\]; a mean needs F32"):
        blend(found, found, 0.5, tmp_path / "mean.safetensors")
