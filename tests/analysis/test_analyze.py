"""`offprin analyze` from end to end, on real files: numbers, files, exit codes, interruptions."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels import BitMask, update_mask
from offprin_kernels.analysis import measure, plan, run, store
from offprin_kernels.cli import main

from .checkpoints import base_weights, files, offprin, save


def test_numbers_are_those_of_plain_torch(pair, tmp_path) -> None:
    base, runs, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist()
    assert len(rows) == 2 * len(base)
    for row in rows:
        a, b = base[row["name"]], runs[["one", "two"].index(row["run"])][row["name"]]
        changed = a != b
        update = b.double() - a.double()
        assert row["total"] == a.numel() and row["shape"] == list(a.shape)
        assert row["changed"] == int(changed.sum()) and row["sparsity"] == 1 - row["changed"] / row["total"]
        assert row["changed_atol(1e-05)"] == int((update.float().abs() > torch.tensor(1e-5)).sum())
        assert row["sign_flips"] == int((a.sign() * b.sign() < 0).sum())
        assert row["base_norm"] == pytest.approx(float(a.double().norm()), rel=1e-12)
        assert row["update_norm"] == pytest.approx(float(update.norm()), rel=1e-12)
        assert row["base_dot_update"] == pytest.approx(float((a.double() * update).sum()), rel=1e-9)
        assert sum(row["exponent_changed"]) == row["changed"] and sum(row["ulp_histogram"]) == row["total"]
    stripes = pq.read_table(tmp_path / "out" / "stripes.parquet").to_pylist()
    for row in stripes:
        changed = base[row["name"]] != runs[["one", "two"].index(row["run"])][row["name"]]
        assert row["counts"] == changed.sum(1 if row["axis"] == "row" else 0).tolist()


def test_pairs_and_consensus(pair, tmp_path) -> None:
    base, (one, two), paths = pair
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [row["name"] for row in rows] == list(dict.fromkeys(row["name"] for row in rows))
    for row in rows:
        a, b = base[row["name"]] != one[row["name"]], base[row["name"]] != two[row["name"]]
        both, either = int((a & b).sum()), int((a | b).sum())
        assert (row["intersection"], row["union"]) == (both, either)
        assert row["jaccard"] == (both / either if either else 1.0)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    pooled = summary["pairs"][0]["pooled"]
    assert pooled["intersection"] == sum(row["intersection"] for row in rows)
    coordinates = summary["consensus"]["coordinates"]
    assert coordinates[2] == pooled["intersection"] and coordinates[1] + coordinates[2] == pooled["union"]
    for null in ("expected_uniform", "expected_exponent"):
        assert sum(summary["consensus"][null]) == pytest.approx(sum(coordinates))
    assert summary["mean_jaccard"]["jaccard"] == pytest.approx(sum(row["jaccard"] for row in rows) / len(rows))
    assert sum(coordinates) == summary["consensus"]["total"] == sum(t.numel() for t in base.values())


def test_summary_says_what_is_in_the_denominator(pair, tmp_path) -> None:
    base, _, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    first = summary["runs"][0]
    linear = [t for name, t in base.items() if "proj" in name]
    assert first["linear"]["tensors"] == len(linear) and first["linear"]["total"] == sum(t.numel() for t in linear)
    assert first["all"]["tensors"] == len(base)
    assert sum(group["changed"] for group in first["by_kind"].values()) == first["all"]["changed"]
    assert set(first["by_layer"]) == {"0", "1"}
    assert summary["provenance"]["command"][:2] == ["offprin", "analyze"]
    for ledger in summary["ledger"].values():
        assert sorted(e["name"] for e in ledger["entries"] if e["side"] == "base") == sorted(base)
        assert sorted(e["name"] for e in ledger["entries"] if e["side"] == "tuned") == sorted(base)


def test_masks_are_update_masks(pair, tmp_path) -> None:
    base, runs, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out", "--save-masks") == 0
    for name, weights in (("one", runs[0]), ("two", runs[1])):
        masks = BitMask.load(tmp_path / "out" / "masks" / f"{name}.safetensors")
        assert masks == {key: update_mask(base[key], weights[key]) for key in base}


def test_slabs_do_not_show(pair, tmp_path, monkeypatch) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    monkeypatch.setattr(plan, "SLAB_ELEMENTS", 300)
    assert offprin(*paths, "--out", tmp_path / "slabs", "--save-masks") == 0
    whole, slabs = files(tmp_path / "whole"), files(tmp_path / "slabs")
    same = [name for name in whole if name.startswith(("masks", "pairs", "consensus", "stripes"))]
    assert len(same) == 5 and all(whole[name] == slabs[name] for name in same)
    a, b = (pq.read_table(tmp_path / d / "tensors.parquet").to_pydict() for d in ("whole", "slabs"))
    for column, values in a.items():
        rounded = ("norm" in column or "dot" in column or "relative" in column) and "uncast" not in column
        assert values == (pytest.approx(b[column], rel=1e-12) if rounded else b[column]), column


class Stopped(RuntimeError):
    pass


@pytest.mark.parametrize("stop_at", [0, 1, 3, 6])
def test_interrupted_run_resumes_to_the_same_bytes(pair, tmp_path, monkeypatch, stop_at) -> None:
    *_, paths = pair
    monkeypatch.setattr(plan, "PART_BYTES", 20_000)  # several parts even here
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    real, calls = measure.Work.result, []

    def stopping(self):
        calls.append(self.unit)
        if len(calls) > stop_at:
            raise Stopped
        return real(self)

    monkeypatch.setattr(measure.Work, "result", stopping)
    with pytest.raises(Stopped):
        offprin(*paths, "--out", tmp_path / "whole2", "--save-masks")
    assert not (tmp_path / "whole2" / "summary.json").exists()
    monkeypatch.setattr(measure.Work, "result", real)
    assert offprin(*paths, "--out", tmp_path / "whole2", "--save-masks") == 0
    first, second = files(tmp_path / "whole"), files(tmp_path / "whole2")
    command = "summary.json"  # holds the command line, which names the directory
    assert second.pop(command).replace(b"whole2", b"whole") == first.pop(command)
    assert first == second


def test_masks_lost_between_two_attempts_are_made_again(pair, tmp_path, monkeypatch) -> None:
    *_, paths = pair
    monkeypatch.setattr(plan, "PART_BYTES", 20_000)
    real = store.Store.write_summary

    def dying(self, summary):
        raise Stopped

    # all parts are done and the masks have their final names, but nothing says that the analysis is finished
    monkeypatch.setattr(store.Store, "write_summary", dying)
    with pytest.raises(Stopped):
        offprin(*paths, "--out", tmp_path / "out", "--save-masks")
    monkeypatch.setattr(store.Store, "write_summary", real)
    assert offprin(*paths, "--out", tmp_path / "out", "--save-masks") == 0
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    for name in ("one", "two"):
        masks = [BitMask.load(tmp_path / d / "masks" / f"{name}.safetensors") for d in ("out", "whole")]
        assert masks[0] == masks[1] and sum(mask.count() for mask in masks[0].values()) > 0


def test_killed_process_resumes(pair, tmp_path) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "whole") == 0
    script = (
        "import os, sys\n"
        "from offprin_kernels.analysis import plan, run, store\n"
        "from offprin_kernels.cli import main\n"
        "plan.PART_BYTES = 20_000\n"
        "real = store.Parts.write\n"
        "def write(self, partial, index, tables):\n"
        "    real(self, partial, index, tables)\n"
        "    if index == 1 and '--die' in sys.argv: os.kill(os.getpid(), 9)\n"
        "store.Parts.write = write\n"
        "sys.exit(main([a for a in sys.argv[1:] if a != '--die']))\n"
    )
    arguments = [sys.executable, "-c", script, "analyze", *paths, "--out", str(tmp_path / "out"), "--quiet"]
    assert subprocess.run([*arguments, "--die"]).returncode == -9
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "out" / "run_log.jsonl").read_text())
    assert log["resumed_parts"] == 2
    one, two = (pq.read_table(tmp_path / d / "tensors.parquet") for d in ("whole", "out"))
    assert one.equals(two)


def test_finished_run_is_not_repeated(pair, tmp_path, monkeypatch, capsys) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(run, "measure", None)
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out == first


def test_full_disk_keeps_what_is_there(pair, tmp_path, monkeypatch, capsys) -> None:
    *_, paths = pair
    monkeypatch.setattr(plan, "PART_BYTES", 20_000)
    assert offprin(*paths, "--out", tmp_path / "whole") == 0
    real, written = pq.write_table, []

    def full(table, path, **options):
        written.append(path)
        if len(written) > 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(table, path, **options)

    monkeypatch.setattr(pq, "write_table", full)
    capsys.readouterr()
    assert offprin(*paths, "--out", tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert "No space left on device" in message and "finished parts are kept" in message and message.count("\n") == 1
    kept = len(list((tmp_path / "out" / "parts").iterdir()))
    assert kept >= 1
    monkeypatch.setattr(pq, "write_table", real)
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out")["tensors.parquet"] == files(tmp_path / "whole")["tensors.parquet"]


def test_memory_stays_small_whatever_the_tensor(tmp_path) -> None:
    """A pair of 1 GiB tensors (sparse on disk) within 300 MB over the interpreter with its libraries."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [16384, 32768], "data_offsets": [0, 1 << 30]}}).encode()
    header += b" " * (-len(header) % 8)
    for name in ("a.safetensors", "b.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + (1 << 30))
    script = (
        "import resource, sys\n"
        "import torch, pyarrow.parquet, offprin_kernels\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "from offprin_kernels.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "sys.exit(code)\n"
    )
    arguments = [
        "analyze",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--out",
        tmp_path / "out",
        "--quiet",
        "--device",
        "cpu",
    ]
    for io in ("mmap", "read"):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments), "--io", io, "--overwrite"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        unit = 1 if sys.platform == "darwin" else 1024
        grown = int(done.stdout.splitlines()[-1]) * unit
        assert grown < 300e6, f"{io}: {grown / 1e6:.0f} MB"


def test_two_runs_same_bytes(pair, tmp_path) -> None:
    *_, paths = pair
    for _ in range(2):
        assert offprin(*paths, "--out", tmp_path / "out", "--overwrite", "--save-masks") == 0
        found = files(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"seen{len(list(tmp_path.glob('seen*')))}")
    assert found == files(tmp_path / "seen0")


def test_nan_and_inf_are_counted_and_flagged(pair, tmp_path, capsys) -> None:
    _, runs, paths = pair
    name = "model.layers.0.mlp.down_proj.weight"
    runs[0][name][3, 5], runs[0][name][4, 4] = float("nan"), float("inf")
    broken = save(tmp_path / "broken", runs[0])
    assert offprin(paths[0], broken, "--out", tmp_path / "out") == 0
    row = next(r for r in pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist() if r["name"] == name)
    assert (row["nan_tuned"], row["inf_tuned"], row["nan_base"], row["flagged_nonfinite"]) == (1, 1, 0, True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"][0]["flagged_nonfinite"] == [name]
    assert summary["runs"][0]["all"]["update_norm"] > 0
    assert "WARNING: NaN or Inf in 1 tensors" in capsys.readouterr().out


def test_cast_sources_report_both_comparisons(pair, tmp_path, capsys) -> None:
    base = base_weights(torch.float32)
    after = {name: tensor * (1 + 1e-4) for name, tensor in base.items()}
    paths = [save(tmp_path / "base32", base), save(tmp_path / "after32", after)]
    assert offprin(*paths, "--out", tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist()
    for row in rows:
        assert row["status"] == "cast" and row["base_dtype"] == "F32"
        assert row["changed_uncast_bitwise"] == int((base[row["name"]] != after[row["name"]]).sum())
        assert row["changed"] == int((base[row["name"]].bfloat16() != after[row["name"]].bfloat16()).sum())
    assert "(un-cast 0.000 %" in capsys.readouterr().out


def test_partial_when_something_has_no_partner(pair, tmp_path, capsys) -> None:
    _, runs, paths = pair
    less = {name: t for name, t in runs[0].items() if "layers.1" not in name}
    assert offprin(paths[0], save(tmp_path / "less", less), "--out", tmp_path / "out") == 3
    assert "2 unmatched" in capsys.readouterr().out


def test_a_run_of_another_base_is_warned_of(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    generator = torch.Generator().manual_seed(9)
    other = {
        name: torch.randn(t.shape, generator=generator).bfloat16() * t.float().std().bfloat16()
        for name, t in pair[0].items()
    }
    assert offprin(*paths, save(tmp_path / "stranger", other), "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert text.count("does not look tuned from this base") == 1
    assert "between base and stranger" in text
    runs = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert runs[0]["all"]["cosine"] > 0.999 > 0.2 > abs(runs[2]["all"]["cosine"])


def test_include_exclude_and_names(pair, tmp_path) -> None:
    *_, paths = pair
    options = ("--include", "*proj*", "--exclude", "*layers.1*", "--names", "left", "right")
    assert offprin(*paths, "--out", tmp_path / "out", *options) == 0
    rows = pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist()
    assert {row["run"] for row in rows} == {"left", "right"}
    assert {row["name"] for row in rows} == {
        f"model.layers.0.{m}.weight" for m in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_dry_run_reads_no_weight_and_writes_nothing(pair, tmp_path, capsys, monkeypatch) -> None:
    base, _, paths = pair
    monkeypatch.setattr(run, "measure", None)
    assert offprin(*paths, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    size = 2 * sum(t.numel() for t in base.values())
    assert found["bytes"] == 3 * size and [r["bytes"] for r in found["runs"]] == [size, size]
    assert offprin(*paths, "--dry-run") == 0
    assert "read once" in capsys.readouterr().out


def test_json_is_the_summary(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_progress_goes_to_stderr(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    assert main(["analyze", *paths, "--out", str(tmp_path / "out"), "--json"]) == 0
    seen = capsys.readouterr()
    json.loads(seen.out)
    assert "B/s" in seen.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--rule", "nearly"], "unknown rule 'nearly'"),
        (["--rule", "atol", "--threshold", "-1"], "not negative"),
        (["--also", "ulp"], "--also ulp: rule 'ulp' needs a threshold"),
        (["--names", "just-one"], "as many different names"),
        (["--include", "nothing*"], "no tensor of"),
        (["--device", "gpu0"], "--device gpu0: not a device"),
    ],
)
def test_bad_options_get_one_sentence(pair, tmp_path, capsys, change, words) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out", *change) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("offprin: error: ")
    assert not (tmp_path / "out").exists()


def test_bad_input_gets_one_sentence(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    (tmp_path / "empty").mkdir()
    truncated = save(tmp_path / "truncated", base_weights())
    shard = truncated / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    missing = save(tmp_path / "missing", base_weights())
    (missing / "model-00002-of-00002.safetensors").unlink()
    for bad, word in (
        (tmp_path / "nowhere", "nowhere"),
        (tmp_path / "empty", "empty"),
        (truncated, "model-00001-of-00002.safetensors"),
        (missing, "model-00002-of-00002.safetensors"),
    ):
        assert offprin(paths[0], bad, "--out", tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert word in message and message.count("\n") == 1, message
    assert offprin(*paths) == 2
    assert "--out DIR is needed" in capsys.readouterr().err


def test_output_of_another_pair_is_left_alone(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths[:2], "--out", out) == 0
    before = files(out)
    assert offprin(paths[0], paths[2], "--out", out) == 2
    assert "another pair" in capsys.readouterr().err
    assert files(out) == before
    assert offprin(paths[0], paths[2], "--out", out, "--overwrite") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    assert offprin(*paths, "--out", tmp_path / "mine") == 2
    assert "not empty" in capsys.readouterr().err
    assert offprin(*paths, "--out", tmp_path / "mine", "--overwrite") == 0
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear to me"


def test_env_says_why(capsys) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert found["versions"]["torch"] == torch.__version__
    assert main(["env"]) == 0
    assert "instruction set" in capsys.readouterr().out
