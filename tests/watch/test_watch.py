"""UpdateWatch on one process, against direct computation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offprin_kernels import UpdateWatch, topk_svd, update_energy
from offprin_kernels.checkpoint import Checkpoint, save_safetensors_atomic
from offprin_kernels.optim.local import bare
from offprin_kernels.watch import summary

K = 4
SIZES = (24, 40, 12)
# an angle of e degrees between subspaces turns a share of energy by at most 2 sin(e) a side
TURNED = 4 * math.sin(math.radians(0.05))


def model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Module:
    """Two linear layers with biases, a norm and an embedding."""
    torch.manual_seed(seed)
    net = torch.nn.Module()
    net.embed_tokens = torch.nn.Embedding(10, SIZES[0])
    net.up_proj = torch.nn.Linear(SIZES[0], SIZES[1])
    net.norm = torch.nn.LayerNorm(SIZES[1])
    net.down_proj = torch.nn.Linear(SIZES[1], SIZES[2])
    return net.to(dtype)


def move(net: torch.nn.Module, scale: float = 2e-3, seed: int = 1) -> None:
    """What training would do, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            param.add_((torch.randn(param.shape, generator=generator) * scale).to(param.dtype))


def direct(base: torch.nn.Module, tuned: torch.nn.Module, only=lambda name: True) -> dict[str, float]:
    """The sums, in numpy on bf16 values."""
    changed = total = flips = 0
    update = norm = largest = 0.0
    for (name, p), q in zip(base.named_parameters(), tuned.parameters(), strict=True):
        if not only(name):
            continue
        a, b = (x.detach().bfloat16().double().numpy() for x in (p, q))
        changed, total = changed + int((a != b).sum()), total + a.size
        flips += int((a * b < 0).sum())
        update, norm = update + ((b - a) ** 2).sum(), norm + (a**2).sum()
        largest = max(largest, np.abs(b - a).max())
    return {
        "changed": changed, "total": total, "visible_fraction": changed / total, "sparsity": 1 - changed / total,
        "relative_update": math.sqrt(update / norm), "update_max": largest, "sign_flips": flips, "nonfinite": 0,
    }  # fmt: skip


LINEAR = ("up_proj.weight", "down_proj.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_sums_against_numpy(dtype, keep) -> None:
    net = model(dtype)
    base = copy.deepcopy(net)
    watch = UpdateWatch(net, keep=keep)
    move(net)
    found = watch.measure()
    expected = direct(base, net)
    linear = {f"linear/{key}": value for key, value in direct(base, net, LINEAR.__contains__).items()}
    assert set(found) == {*expected, *linear}
    for key, value in {**expected, **linear}.items():
        exact = isinstance(value, int) or key.endswith(("fraction", "sparsity"))
        assert found[key] == (value if exact else pytest.approx(value, rel=1e-12)), key
    assert 0 < found["changed"] < found["total"] and isinstance(found["changed"], int)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_energies_against_numpy(dtype, exact) -> None:
    net = model(dtype)
    base = copy.deepcopy(net)
    watch = UpdateWatch(net, energies="linear", k=K, exact=exact)
    move(net)
    found = watch.measure()
    for name in LINEAR:
        a, b = (x.get_parameter(name).detach() for x in (base, net))
        if not exact:
            a, b = a.bfloat16(), b.bfloat16()
        a, update = a.double().numpy(), b.double().numpy() - a.double().numpy()
        u, _, vh = np.linalg.svd(a)
        u, v = u[:, :K], vh[:K].T
        for side, part in (("left", u.T @ update), ("right", update @ v), ("both", u.T @ update @ v)):
            share = (part**2).sum() / (update**2).sum()
            assert found[f"energy/{name}/{side}"] == pytest.approx(share, abs=TURNED)
        m, n = a.shape
        assert found[f"energy/{name}/isotropic_left"] == K / m and found[f"energy/{name}/isotropic_right"] == K / n
        assert found[f"energy/{name}/isotropic_both"] == K * K / (m * n)
    pair = [found[f"energy/{name}/both"] for name in LINEAR]
    assert found["energy/mean/both"] == sum(pair) / 2


def test_energies_are_those_of_update_energy() -> None:
    net = model(torch.float32)
    before = net.up_proj.weight.detach().clone()
    watch = UpdateWatch(net, energies=["up_proj.weight"], k=K, exact=True)
    move(net, 1e-6)
    energy = update_energy(topk_svd(before, K), net.up_proj.weight.detach() - before)
    (found,) = [change.energy for change in watch.tensors() if change.energy]
    for share in ("left", "right", "both"):
        assert getattr(found, share) == pytest.approx(getattr(energy, share), rel=1e-5)


def test_unrounded_updates_are_seen_where_bf16_shows_none() -> None:
    """fp32 weights that bf16 holds exactly, and steps far below its half ULP."""
    net = model(torch.bfloat16).float()
    watches = [UpdateWatch(net, exact=exact, include=["up_proj.weight"]) for exact in (False, True)]
    move(net, 1e-7)
    rounded, exact = (watch.measure() for watch in watches)
    assert rounded["changed"] == exact["changed"] == rounded["relative_update"] == 0
    assert exact["relative_update"] == pytest.approx(1e-7 * math.sqrt(12 * SIZES[0] / 4), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_update_gives_zeros(dtype) -> None:
    """Also for fp32 weights that bf16 does not hold: the snapshot's rounding is no update."""
    found = UpdateWatch(model(dtype), energies="linear", k=K).measure()
    for key, value in found.items():
        expected = {"sparsity": 1, "total": value}.get(key.rpartition("/")[2], 0)
        assert value == expected or "isotropic" in key, key


def test_tied_weights_count_once_and_frozen_ones_count() -> None:
    net = model()
    net.lm_head = torch.nn.Linear(SIZES[0], 10, bias=False)
    net.lm_head.weight = net.embed_tokens.weight
    net.norm.requires_grad_(False)
    net.register_buffer("table", torch.ones(7))
    watch = UpdateWatch(net)
    assert watch.measure()["total"] == sum(p.numel() for p in model().parameters())
    some = UpdateWatch(net, include=lambda name, param: param.requires_grad)
    assert some.measure()["total"] == watch.measure()["total"] - 2 * SIZES[1]
    one = UpdateWatch(net, include=["norm.weight"])
    assert one.measure()["total"] == SIZES[1] and "linear/total" not in one.measure()


def test_not_a_number_is_a_change_and_is_reported() -> None:
    net = model()
    watch = UpdateWatch(net, energies=["up_proj.weight"], k=K)
    with torch.no_grad():
        net.up_proj.weight[0, 0] = math.nan
        net.down_proj.weight[0, 0] = math.inf
    found = watch.measure()
    assert found["changed"] == found["nonfinite"] == 2
    assert math.isnan(found["relative_update"]) and math.isnan(found["update_max"])
    up, down = (next(c for c in watch.tensors() if c.name == name) for name in LINEAR)
    assert math.isnan(up.update_max) and down.update_max == math.inf and up.changed == 1


def test_detail_sums_up_and_has_its_null() -> None:
    net = model(torch.bfloat16)
    with torch.no_grad():
        net.up_proj.weight.copy_(torch.randn(SIZES[1], SIZES[0]).bfloat16())
    watch = UpdateWatch(net, energies=["up_proj.weight"], k=K)
    move(net, 3e-3)
    changes = watch.tensors()
    assert summary(changes) == watch.measure()
    assert [c.name for c in changes] == [name for name, _ in net.named_parameters()]
    (up,) = [c for c in changes if c.name == "up_proj.weight"]
    assert up.basis_degrees is not None and up.basis_degrees <= 0.05
    assert up.linear and up.total == up.exponents.sum() == SIZES[0] * SIZES[1]
    # the update is Gaussian, so its null is what was seen, up to the noise of a count
    assert up.expected_changed == pytest.approx(up.changed, abs=4 * math.sqrt(up.changed))
    wide = torch.nn.Linear(8, 8, bias=False)
    watch = UpdateWatch(wide)
    move(wide, 1e-2)
    (change,) = watch.tensors()
    assert change.changed > 0 and math.isnan(change.expected_changed), "fp32 weights do not lie on bf16 values"


def test_views_of_other_strides_and_empty_parameters() -> None:
    net = torch.nn.Module()
    net.first_proj = torch.nn.Linear(6, 5, bias=False)
    net.first_proj.weight = torch.nn.Parameter(torch.randn(6, 5).bfloat16().T)
    net.none = torch.nn.Parameter(torch.empty(0, 3).bfloat16())
    net.scalar = torch.nn.Parameter(torch.tensor(2.0))
    net.experts = torch.nn.Parameter(torch.randn(2, 3, 4).bfloat16().permute(2, 0, 1))
    before = copy.deepcopy(net)
    watch = UpdateWatch(net, energies=["first_proj.weight"], k=2)
    move(net, 1e-2)
    changes = {c.name: c for c in watch.tensors()}
    for name, param in before.named_parameters():
        changed = int((param.bfloat16() != net.get_parameter(name).bfloat16()).sum())
        assert changes[name].changed == changed and changes[name].total == param.numel()
    assert changes["none"].sparsity == 1 and changes["scalar"].total == 1


def test_large_tensors_are_looked_at_in_slabs(monkeypatch) -> None:
    from offprin_kernels.watch import look

    net = model()
    found = []
    watch = UpdateWatch(net, energies="linear", k=K)
    move(net)
    for size in (look.SLABS["cpu"], 100):
        monkeypatch.setitem(look.SLABS, "cpu", size)
        found.append(watch.measure())
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-5), key
        assert not isinstance(value, int) or found[1][key] == value


@pytest.fixture
def checkpoint(tmp_path):
    """Of the model's base, under a wrapper's names."""
    weights = {f"module.{name}": param.detach() for name, param in model().named_parameters()}
    save_safetensors_atomic(tmp_path / "model.safetensors", weights)
    with Checkpoint.open(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("kind", ["checkpoint", "state dict"])
def test_bases_that_are_given(kind, checkpoint) -> None:
    net = model()
    snapshot = UpdateWatch(net, energies="linear", k=K)
    move(net)
    given = checkpoint if kind == "checkpoint" else {name: p.detach() for name, p in model().named_parameters()}
    assert UpdateWatch(net, base=given, energies="linear", k=K).measure() == snapshot.measure()


def test_bases_that_do_not_fit(checkpoint) -> None:
    net = model()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="own memory"):
        UpdateWatch(net, base=net.state_dict())
    wrong = {**state, "up_proj.weight": state["up_proj.weight"].T, "norm.weight": state["norm.weight"].double()}
    del wrong["norm.bias"]
    with pytest.raises(ValueError) as caught:
        UpdateWatch(net, base=wrong)
    said = str(caught.value)
    assert "up_proj.weight: the base is (24, 40)" in said and "norm.bias: the base has no" in said
    assert "norm.weight: the base is torch.float64" in said
    net.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        UpdateWatch(net, base=checkpoint)
    UpdateWatch(net, base=checkpoint, include=lambda name, param: not name.startswith("extra"))


def test_a_basis_is_kept_for_resumed_runs(tmp_path, monkeypatch, checkpoint) -> None:
    from offprin_kernels.watch import basis

    file = tmp_path / "basis.safetensors"
    net = model()
    options = {"energies": "linear", "k": K, "basis": file}
    watch = UpdateWatch(net, **options)
    move(net)
    expected = watch.measure()
    with pytest.raises(ValueError, match=r"another base.*base="):
        UpdateWatch(net, **options)

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(basis, "topk_svd", never)
    assert UpdateWatch(net, base=checkpoint, **options).measure() == expected
    for change, said in (
        ({"k": K + 1}, "has k = 4, not 5"),
        ({"tol_degrees": 0.01}, "computed to 0.05 degrees"),
        ({"energies": ["embed_tokens.weight"]}, "no basis of this layer"),
        ({"exact": True, "base": None}, "another base"),
    ):
        with pytest.raises(ValueError, match=said):
            UpdateWatch(net, **{**options, "base": checkpoint, **change})
    other = model()
    other.up_proj = torch.nn.Linear(SIZES[0], SIZES[1] + 1).bfloat16()
    with pytest.raises(ValueError, match="is of a 40 x 24 weight"):
        UpdateWatch(other, energies=["up_proj.weight"], k=K, basis=file)
    save_safetensors_atomic(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, said in (("other", "no basis of an UpdateWatch"), ("broken", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            UpdateWatch(other, energies="linear", basis=tmp_path / f"{name}.safetensors")


def test_refusals() -> None:
    net = model()
    for options, kind, said in (
        ({"keep": "disk"}, ValueError, "keep must be"),
        ({"k": 0}, ValueError, "k must be"),
        ({"energies": "all"}, ValueError, "'linear'"),
        ({"energies": ["nobody"]}, KeyError, "nobody"),
        ({"include": ["nobody"]}, KeyError, "nobody"),
        ({"energies": ["norm.weight"]}, ValueError, "energies are of matrices"),
        ({"energies": [LINEAR[0]], "include": [LINEAR[1]]}, ValueError, "is not compared"),
    ):
        with pytest.raises(kind, match=said):
            UpdateWatch(net, **options)
    with torch.no_grad():
        net.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"up_proj\.weight.*NaN"):
        UpdateWatch(net, energies="linear")
    with pytest.raises(ValueError, match="meta device"):
        UpdateWatch(model().to("meta"))
    watch = UpdateWatch(net)
    net.up_proj = torch.nn.Linear(SIZES[0], 3)
    with pytest.raises(RuntimeError, match=r"up_proj\.weight is not what it was"):
        watch.measure()


def test_names_lose_what_wrappers_added() -> None:
    assert bare("module._orig_mod.layers.0._fsdp_wrapped_module.q.weight") == "layers.0.q.weight"
    assert bare("submodule.0._checkpoint_wrapped_module.weight") == "submodule.0.weight"
    net = model()
    twice = torch.nn.ModuleDict({"net": net, "module": torch.nn.ModuleDict({"net": model()})})
    with pytest.raises(ValueError, match="but for wrappers"):
        UpdateWatch(twice)
    watch = UpdateWatch(torch.nn.DataParallel(net), energies=["up_proj.weight"], k=K)
    assert watch.measure()["total"] == sum(p.numel() for p in net.parameters())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.numel())
        return found


@pytest.mark.parametrize("energies", [(), "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_measuring_makes_nothing_of_the_size_of_a_weight(monkeypatch, dtype, energies) -> None:
    from offprin_kernels.watch import look

    net = torch.nn.Module()
    net.up_proj = torch.nn.Linear(500, 600, dtype=dtype)
    watch = UpdateWatch(net, energies=energies, k=K)
    move(net)
    monkeypatch.setitem(look.SLABS, "cpu", 10_000)
    with Largest() as seen:
        watch.tensors()
    assert 0 < seen.elements <= 10_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("keep", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_says_what_the_cpu_says(dtype, keep) -> None:
    found = []
    for device in ("cpu", "cuda"):
        net = model(dtype).to(device)
        watch = UpdateWatch(net, energies="linear", k=K, keep=keep)
        tuned = model(dtype)
        move(tuned)
        net.load_state_dict(tuned.state_dict())
        found.append(watch.measure())
    for key, value in found[0].items():
        expected = value if isinstance(value, int) else pytest.approx(value, rel=1e-4)
        assert found[1][key] == expected, key
