"""Proof of the export: the control vector, the same vectors in every file, the warning."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import scans
from data.golden import export

HERE = ROOT / "data" / "golden"
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def method():
    return scans.Scans.load(device="cpu")


def command(*words):
    """The exit status and the output of the command, run as a user runs it."""
    words = [sys.executable, "-m", "data.golden.export", *map(str, words), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new"
    done = command(folder, "--alpha", "2.5", "--steer-layers", "0,3-4,6")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    return folder


def test_the_control_vector_is_what_the_gguf_package_reads(exported, method):
    reader = gguf.GGUFReader(exported / "vectors.gguf")
    L, D = method.v_r.shape
    field = {name: field.contents() for name, field in reader.fields.items()}
    assert (field["GGUF.version"], field["general.architecture"]) == (3, "controlvector")
    assert (field["controlvector.model_hint"], field["controlvector.layer_count"]) == ("llama", L - 1)
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{l}" for l in range(1, L)]
    for l, tensor in enumerate(reader.tensors, 1):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tuple(tensor.shape) == (D,)
        np.testing.assert_array_equal(tensor.data, method.v_r[l] if l in (3, 4, 6) else np.zeros(D))


def test_json_and_native_file_hold_the_same_vectors(exported, method):
    plain = json.loads((exported / "vectors.json").read_text())
    native = load_file(exported / "vectors.safetensors")
    for name in ("v_r", "d_harm"):
        np.testing.assert_array_equal(np.array(plain[name], np.float32), native[name])
        torch.testing.assert_close(native[name], getattr(method.vectors, name), rtol=0, atol=1e-5)
    assert (plain["alpha"], plain["steer_layers"]) == (2.5, [0, 3, 4, 6])
    assert (plain["r_pos"], plain["format"]) == (" Sure", "llama-2")
    assert plain["T"] == method.settings.T and plain["classify_layers"] == method.settings.classify
    again = scans.Scans.load(device="cpu", vectors=exported / "vectors.safetensors")
    torch.testing.assert_close(again.vectors.v_r, method.vectors.v_r, rtol=0, atol=1e-5)


def test_the_files_are_documented_and_the_warning_stands_there(exported):
    page, note = (HERE / "stacks.md").read_text(encoding="utf-8"), (exported / "README.txt").read_text()
    with safe_open(exported / "vectors.safetensors", "pt") as file:
        names = [*file.keys(), *file.metadata()]
    for name in [*names, *json.loads((exported / "vectors.json").read_text())]:
        assert f"`{name}`" in page, f"{name} is not documented"
    for text in (page, note):
        assert "remove the model's refusals altogether" in text
        assert "--control-vector-scaled vectors.gguf:-" in text
    assert "vectors.gguf:2.5 " in note and "0,3-4,6" in note


def test_the_folder_holds_the_four_files_and_nothing_half_written(exported):
    names = {"README.txt", "vectors.gguf", "vectors.json", "vectors.safetensors"}
    assert {path.name for path in exported.iterdir()} == names


def test_an_export_that_fails_leaves_the_old_files(exported, tmp_path):
    (tmp_path / "vectors.json").write_text("old")
    done = command(tmp_path, "--steer-layers", "99")
    assert done.returncode == 2 and "layers" in done.stderr.splitlines()[-1]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_missing_gguf_is_one_line_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        export.export(SimpleNamespace(folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_export_to_a_file_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("")
    done = command(tmp_path / "taken")
    assert done.returncode == 2 and "taken" in done.stderr and done.stderr.count("\n") == 1
