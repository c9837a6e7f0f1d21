"""A 70B model's shapes on sparse files: the plan from headers alone, and the whole pipeline on a few layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels.analysis import Options, cost, make_plan
from offprin_kernels.analysis.report import forecast
from offprin_kernels.checkpoint import Checkpoint
from offprin_kernels.cli import main
from offprin_kernels.ops.update_scan import Rule

HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 8192, 28672, 1024, 128256, 80
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
PARAMETERS, MATRICES = 70_553_706_496, 562


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    return found


def sparse(path: Path, layers: int) -> dict[str, tuple[Path, int]]:
    """A checkpoint of holes, a file per layer; where each tensor's bytes are."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes(layers).items():
        part = name.split(".")[2] if "layers" in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    places, index = {}, {}
    for file, tensors in files.items():
        header, position = {}, 0
        for name, shape in tensors.items():
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (path / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + position)
        for name in tensors:
            places[name] = (path / file, 8 + len(text) + header[name]["data_offsets"][0])
            index[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    # the head is not the embedding, as a look at its first rows shows
    fill(places["lm_head.weight"], torch.ones(1, HIDDEN).bfloat16())
    return places


def fill(place: tuple[Path, int], weight: torch.Tensor) -> None:
    """Write the first rows of a tensor; the rest stays a hole."""
    path, offset = place
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(weight.contiguous().view(torch.int16).numpy().tobytes())


def test_dry_run_of_a_70b_pair_from_headers_alone(tmp_path, capsys, monkeypatch) -> None:
    places = sparse(tmp_path / "base", LAYERS)
    sparse(tmp_path / "tuned", LAYERS)
    count = sum(torch.Size(shape).numel() for shape in shapes(LAYERS).values())
    assert count == PARAMETERS and sum(len(shape) == 2 for shape in shapes(LAYERS).values()) == MATRICES
    blocks = sum(path.stat().st_blocks * 512 for path, _ in places.values())
    assert blocks < 64 << 20, "this file system fills holes"
    read = []
    real = Checkpoint.read

    def counted(self, *arguments, **options):
        found = real(self, *arguments, **options)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(Checkpoint, "read", counted)
    arguments = ["analyze", str(tmp_path / "base"), str(tmp_path / "tuned"), "--dry-run", "--metrics"]
    everything = "update,spectrum,masks,energy"
    assert main([*arguments, everything, "--ranks", "8", "--bandwidth", "2", "--gemm-rate", "0.2", "--json"]) == 0
    # a few rows tell the head from the embedding; nothing else
    assert sum(read) < 64 << 20
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 4 * PARAMETERS and found["runs"][0]["tensors"] == len(places)
    assert found["seconds_reading"] == pytest.approx(4 * PARAMETERS / 2e9 / 8)
    loads = found["seconds_of_ranks"]
    assert len(loads) == 8 and found["seconds"] == max(loads) and min(loads) > 0.9 * max(loads)
    # operations at the speed of products are a floor, and full spectra, which reach it, most of all
    floor = found["flops"] / 0.2e12 / 8 + found["seconds_reading"]
    assert floor < found["seconds"] < 1.3 * floor
    # one matrix at a time, whole, with its working copies: far below the model
    largest = HIDDEN * INNER
    assert 12 * largest < found["peak_bytes"] < 30 * largest
    assert main([*arguments, "update"]) == 0
    text = capsys.readouterr().out
    assert "282.215 GB" in text and "to compute: 0.000 TFLOP" in text and "1 process at" in text
    assert main([*arguments, "update", "--bandwidth", "-1"]) == 2
    assert "must be positive" in capsys.readouterr().err


def test_layers_of_a_70b_pair_within_the_memory_bar(tmp_path) -> None:
    """Layer 0 in full, then geometry of its smaller matrices; 1.25 x the largest pair + 300 MB, plus factors."""
    base, tuned = sparse(tmp_path / "base", 1), sparse(tmp_path / "tuned", 1)
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name in (f"model.layers.0.{kind}.weight" for kind in LAYER):
        shape = shapes(1)[name]
        rows = shape[0] if name.endswith(("k_proj.weight", "v_proj.weight")) else 64
        weight = (torch.randn((rows, *shape[1:]), generator=generator) * 0.02).bfloat16()
        after = (weight.float() + torch.randn(weight.shape, generator=generator) * 3e-5).bfloat16()
        fill(base[name], weight)
        fill(tuned[name], after)
        changed[name] = int((weight != after).sum())
    script = (
        "import re, sys, torch, pyarrow.parquet, offprin_kernels\n"
        "torch.set_num_threads(2)\n"
        "def peak():\n"
        "    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "from offprin_kernels.cli import main\n"
        "before = peak()\n"
        "code = main(sys.argv[1:])\n"
        "print(peak() - before)\n"
        "sys.exit(code)\n"
    )

    def analyze(out: str, *options: str) -> int:
        command = ["analyze", str(tmp_path / "base"), str(tmp_path / "tuned"), "--out", str(tmp_path / out)]
        command += ["--quiet", "--device", "cpu"]
        done = subprocess.run([sys.executable, "-c", script, *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])

    largest = 2 * 2 * HIDDEN * INNER
    grown = analyze("update", "--include", "*layers.0.*")
    rows = {row["name"]: row for row in pq.read_table(tmp_path / "update" / "tensors.parquet").to_pylist()}
    assert {name: row["changed"] for name, row in rows.items()} == changed
    assert all(row["total"] == torch.Size(shapes(1)[name]).numel() for name, row in rows.items())
    assert grown < 1.25 * largest + 300e6, f"{grown / 1e6:.0f} MB"
    options = ("--include", "*layers.0.self_attn.[kv]_proj*", "--metrics", "update,spectrum,masks,energy", "--k", "32")
    grown = analyze("all", *options)
    found = pq.read_table(tmp_path / "all" / "geometry.parquet").to_pylist()
    assert len(found) == 2 and all(row["converged"] and row["note"] is None for row in found)
    weight = KEYS * HIDDEN
    factors = 12 * weight + 24 * KEYS**2 + 8 * 4 * 64 * (KEYS + HIDDEN)
    assert grown < 1.25 * 4 * weight + 300e6 + factors, f"{grown / 1e6:.0f} MB"


def test_cost_follows_shapes(tmp_path) -> None:
    sparse(tmp_path / "base", 1)
    base = Checkpoint.open(tmp_path / "base")
    rules = (Rule.parse("bitwise"),)
    plain = make_plan(base, [base], Options(rules))
    assert all(cost.flops(unit, plain.options) == 0 for unit in plain.units)
    full = make_plan(base, [base], Options(rules, metrics=("spectrum",)))
    by_name = {unit.name: cost.flops(unit, full.options) for unit in full.units}
    assert by_name["model.norm.weight"] == by_name["lm_head.weight"] == 0, "no linear layers"
    assert by_name["model.layers.0.mlp.up_proj.weight"] == by_name["model.layers.0.mlp.down_proj.weight"] > 1e12
    twice = make_plan(base, [base, base], Options(rules, metrics=("spectrum",)), ["a", "b"])
    name = "model.layers.0.self_attn.q_proj.weight"
    more = {unit.name: cost.flops(unit, twice.options) for unit in twice.units}[name]
    assert 1.3 * by_name[name] < more < 2 * by_name[name], "the base is factorised once"
    loads = forecast(full, ranks=3)["seconds_of_ranks"]
    assert sum(loads) == pytest.approx(forecast(full)["seconds"])
