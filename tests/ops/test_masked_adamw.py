"""masked_adamw: every backend gives the reference's bits; the reference gives PyTorch's, and a scalar loop's."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from offprin_kernels import numerics
from offprin_kernels._backend import interpreting
from offprin_kernels.ops import mask_algebra
from offprin_kernels.ops import masked_adamw as op
from offprin_kernels.ops.masked_adamw import Part, Rounding, Setting, Stepper

BACKENDS = op.BACKENDS
KINDS = [
    (torch.float32, torch.float32, "nearest"),
    (torch.float32, torch.bfloat16, "nearest"),
    (torch.bfloat16, torch.float32, "nearest"),
    (torch.bfloat16, torch.float32, "stochastic"),
    (torch.bfloat16, torch.float32, "kahan"),
    (torch.bfloat16, torch.float32, "master"),
    (torch.bfloat16, torch.bfloat16, "master"),
]
SIZES = [0, 1, 63, 65, 1024, 1025] if interpreting() else [0, 1, 63, 64, 65, 1023, 1024, 1025, 5000, 20_011]
SETTING = Setting(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
SETTINGS = [
    SETTING,
    SETTING._replace(beta1=0.4, weight_decay=0.0),
    SETTING._replace(beta1=0.0, maximize=True),
    SETTING._replace(scale=65536.0),
    SETTING._replace(scale=3.0, eps=0.0),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(numel: int, density: float | str | None, seed: int) -> torch.Tensor | None:
    """bool [numel]; None is no mask at all."""
    if density is None:
        return None
    if density == "blocks":
        return (torch.arange(numel) // 700) % 3 == 1
    if density == "words":
        return (torch.arange(numel) // 128) % 3 == 1
    return torch.rand(numel, generator=generator(seed)) < density


def flat(mask: torch.Tensor) -> torch.Tensor:
    """Packed flat and padded."""
    words = torch.zeros(op.padded_words(len(mask)), dtype=torch.uint8)
    packed = mask_algebra.pack(mask[None], backend="reference")[0][: len(words)]
    words[: len(packed)] = packed
    return words


def values(numel: int, seed: int) -> torch.Tensor:
    """fp32 of many sizes, with what is awkward among them."""
    x = torch.randn(numel, generator=generator(seed)) * 10 ** torch.randn(numel, generator=generator(seed + 1))
    awkward = torch.tensor([0.0, -0.0, 1e-40, -1e-44, 3e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 1e-30])
    at = torch.randperm(numel, generator=generator(seed + 2))[: len(awkward)]
    x[at] = awkward[: len(at)]
    return x


def make(numel: int, kind, mask: torch.Tensor | None, *, cohorts: int = 1, track: bool = True, seed: int = 0) -> Part:
    param_dtype, state_dtype, rounding = kind
    count = numel if mask is None else int(mask.sum())
    extra = {
        "kahan": lambda: (torch.randn(count, generator=generator(seed + 3)) * 1e-4).bfloat16(),
        "master": lambda: torch.randint(-(2**15), 2**15, (count,), generator=generator(seed + 3)).to(torch.int16),
    }.get(rounding)
    words = None if mask is None else flat(mask)
    return Part(
        param=values(numel, seed).to(param_dtype),
        exp_avg=(torch.randn(count, generator=generator(seed + 4)) * 0.1).to(state_dtype),
        exp_avg_sq=(torch.rand(count, generator=generator(seed + 5)) * 0.01).to(state_dtype),
        extra=extra() if extra and param_dtype == torch.bfloat16 else None,
        words=words,
        prefix=None if words is None else op.block_prefix(words),
        cohort=None if cohorts == 1 else torch.randint(0, cohorts, (count,), generator=generator(seed + 6)).byte(),
        changed=torch.zeros((count + 63) // 64 * 8, dtype=torch.uint8) if track else None,
        offset=12345678901 if seed % 2 else 0,
        ordinal=seed,
    )


def moved(part: Part, device: torch.device) -> Part:
    """A copy on a device."""
    fields = {
        name: value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in vars(part).items()
    }
    return Part(**fields)


def same_bits(found: torch.Tensor | None, expected: torch.Tensor | None, what: str) -> None:
    """The same bits; of NaN, that it is one."""
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    found, expected = found.cpu(), expected.cpu()
    if found.dtype.is_floating_point:
        nan = found.isnan()
        assert torch.equal(nan, expected.isnan()), what
        integers = torch.int32 if found.dtype == torch.float32 else torch.int16
        found, expected = found.view(integers).masked_fill(nan, 0), expected.view(integers).masked_fill(nan, 0)
    wrong = (found != expected).nonzero().flatten()
    assert wrong.numel() == 0, f"{what}: {wrong.numel()} of {found.numel()} differ, first at {wrong[:5].tolist()}"


def compare(backend: str, device, parts: list[Part], rounding: str, settings, steps, *, rounds: int = 3) -> None:
    """Steps copies of the parts with a backend and with the reference; everything in memory must agree."""
    for group, part in enumerate(parts):
        part.group = group
    ours, theirs = [moved(p, device) for p in parts], [moved(p, torch.device("cpu")) for p in parts]
    tested, oracle = Stepper(ours, rounding, backend), Stepper(theirs, rounding, "reference")
    for turn in range(rounds):
        grads = [values(p.param.numel(), 50 + turn + i).to(p.param.dtype) for i, p in enumerate(parts)]
        given = [g.to(device) for g in grads]
        kept = [g.clone() for g in given]
        taken = [tuple(s + turn for s in each) for each in steps]
        found = tested.step(given, settings, taken, seed=7, track=True)
        expected = oracle.step(grads, settings, taken, seed=7, track=True)
        assert [m for m, _ in found] == [m for m, _ in expected]
        for (_, a), (_, b) in zip(found, expected, strict=True):
            assert a.tolist() == b.tolist(), "visible counts"
        for a, b in zip(given, kept, strict=True):
            same_bits(a, b, "gradient")
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            for name, value in vars(a).items():
                if isinstance(value, torch.Tensor):
                    same_bits(value, getattr(b, name), f"{name} of part {index} ({a.param.numel()}) after {turn + 1}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(str(x).removeprefix("torch.") for x in k))
@pytest.mark.parametrize("density", [None, 0.0, 0.02, 0.5, 1.0, "blocks", "words"])
def test_bits_are_the_references(backend, device, kind, density) -> None:
    sizes = SIZES if not interpreting() else SIZES[::2]
    parts = [make(n, kind, bits(n, density, n), seed=i) for i, n in enumerate(sizes)]
    compare(backend, device, parts, kind[2], [SETTING] * len(parts), [(1,)] * len(parts))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]], ids=["fp32", "master"])
def test_settings(backend, device, kind, setting) -> None:
    parts = [make(1500, kind, bits(1500, density, 1), seed=3) for density in (None, 0.3)]
    compare(backend, device, parts, kind[2], [setting] * 2, [(1,), (900,)])


@pytest.mark.parametrize("density", [None, 0.3])
def test_cohorts(backend, device, density) -> None:
    parts = [make(1500, KINDS[0], bits(1500, density, 1), cohorts=n, seed=n) for n in (1, 3, 256)]
    steps = [(5,), (100, 7, 1), tuple(range(1000, 744, -1))]
    compare(backend, device, parts, "nearest", [SETTING, SETTINGS[1], SETTING], steps)


def test_kinds_may_be_mixed(backend, device) -> None:
    parts = [make(700, kind, bits(700, 0.2, 1), seed=i) for i, kind in enumerate((KINDS[0], KINDS[5], KINDS[0]))]
    compare(backend, device, parts, "master", [SETTING] * 3, [(1,)] * 3)


def test_unaligned_and_strided_parameters(backend, device) -> None:
    """Shards begin anywhere in their storage; others are stepped through a contiguous twin."""
    for cut in (lambda x: x[3:1203], lambda x: x[:1200].view(40, 30).T):
        whole = [torch.randn(1300, generator=generator(1)).to(d) for d in (device, "cpu")]
        parts = [Part(cut(x), torch.zeros(1200, device=x.device), torch.zeros(1200, device=x.device)) for x in whole]
        grads = [cut(x.clone() * 3) for x in whole]
        for part, grad, chosen in zip(parts, grads, (backend, "reference"), strict=True):
            Stepper([part], backend=chosen).step([grad], [SETTING], [(1,)])
        same_bits(whole[0], whole[1], "the storage around it included")


def test_nothing_outside_the_mask_is_touched(backend, device) -> None:
    mask = bits(5000, 0.3, 2)
    part = moved(make(5000, KINDS[5], mask), device)
    before = part.param.clone()
    Stepper([part], "master", backend).step([torch.randn(5000).bfloat16().to(device)], [SETTING], [(1,)])
    same_bits(part.param[~mask], before[~mask], "outside")
    assert bool((part.param[mask] != before[mask]).any())


# ---- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.3, 0.99), (0.0, 0.95)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reference_is_pytorchs(betas, weight_decay) -> None:
    """Within a unit in the last place of the largest intermediate, whatever the processor fuses; see the next test."""
    own = torch.randn(3000, generator=generator(0))
    theirs = torch.nn.Parameter(own.clone())
    part = Part(own, torch.zeros(3000), torch.zeros(3000))
    peer = torch.optim.AdamW([theirs], lr=1e-2, betas=betas, weight_decay=weight_decay, foreach=False)
    stepper = Stepper([part], backend="reference")
    for step in range(1, 8):
        theirs.grad = torch.randn(3000, generator=generator(step))
        setting = Setting(1e-2, *betas, 1e-8, weight_decay)
        stepper.step([theirs.grad], [setting], [(step,)])
        peer.step()
        state = peer.state[theirs]
        # one rounding more or less per step and operation
        for found, expected in (
            (own, theirs.data),
            (part.exp_avg, state["exp_avg"]),
            (part.exp_avg_sq, state["exp_avg_sq"]),
        ):
            bound = 2 * step * torch.finfo(torch.float32).eps * expected.abs().clamp_min(1e-3)
            assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="PyTorch fuses multiply-adds there only"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_fused_kernel_bit_for_bit(dtype) -> None:
    """Whole vectors of it, moments in the parameter's dtype as it has them. PyTorch steps the last few elements one by
    one, without fused multiply-adds."""
    size = 1 << 15
    for betas in ((0.9, 0.999), (0.3, 0.99)):
        own = torch.randn(size, generator=generator(0)).to(dtype)
        theirs = torch.nn.Parameter(own.clone())
        part = Part(own, torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype))
        peer = torch.optim.AdamW([theirs], lr=1e-2, betas=betas, weight_decay=0.1, fused=True)
        stepper = Stepper([part], backend="reference")
        for step in range(1, 20):
            theirs.grad = torch.randn(size, generator=generator(step)).to(dtype)
            stepper.step([theirs.grad], [Setting(1e-2, *betas, 1e-8, 0.1)], [(step,)])
            peer.step()
        same_bits(own, theirs.data, "param")
        same_bits(part.exp_avg, peer.state[theirs]["exp_avg"], "exp_avg")
        same_bits(part.exp_avg_sq, peer.state[theirs]["exp_avg_sq"], "exp_avg_sq")


def test_fma_rounds_once() -> None:
    """Against libm, on products and sums of all sizes, and where the two roundings of fp64 and fp32 would meet."""
    libm = ctypes.CDLL(None)
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = (torch.randn(20_000, generator=generator(i)) * 10 ** (4 * torch.randn(20_000, generator=generator(i + 9)))
               for i in range(3))  # fmt: skip
    a[:4], b[:4] = 1 + 2.0**-12, 1 - 2.0**-12
    c[:4] = torch.tensor([2.0**-60, -(2.0**-60), 2.0**24, -(2.0**24)])
    found = numerics.fma(a, b, c)
    for x, y, z, f in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        expected = libm.fmaf(x, y, z)
        assert f == expected or (math.isnan(f) and math.isnan(expected))


def test_masters_are_taken_apart_and_joined_exactly() -> None:
    """All low halves, for every kind of top half: each sign, subnormal, at the edge of a binade, overflow, Inf, NaN."""
    low = torch.arange(1 << 16, dtype=torch.int64)
    for top in (0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3FFF, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF):
        for sign in (0, 0x8000):
            wide = ((top | sign) << 16) + low
            x = torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32).view(torch.float32)
            codes, kept = numerics.split_master(x)
            assert (
                int(codes.min()) >= 0
                and int(codes.max()) <= 0xFFFF
                and 0 <= int(kept.min()) <= int(kept.max()) <= 0xFFFF
            )
            back = numerics.join_master(codes, kept)
            nan = x.isnan()
            same_bits(back[~nan], x[~nan], hex(top))
            stored = numerics.codes_to_fp32(codes)
            assert (
                bool(stored[nan].isnan().all())
                and bool(back[nan].isnan().all())
                and not bool(stored[~nan].isnan().any())
            )
            # to nearest: where ties-to-even differs, x lies exactly between two neighbours and went away from zero
            even = numerics.codes_to_fp32(numerics.round_to_bf16_codes(x))
            differ = ~nan & (stored != even)
            assert bool(((low == 0x8000) | ~differ).all())
            assert bool((stored.abs() >= even.abs())[differ].all())


def test_stochastic_rounding_is_unbiased_and_exact_on_bf16() -> None:
    x = torch.tensor([1.0 + 2.0**-9, -(1.0 + 3 * 2.0**-9), 3.0e-41]).repeat_interleave(1 << 16)
    noise = torch.arange(1 << 16).repeat(3)
    got = numerics.codes_to_fp32(numerics.round_stochastic(x, noise)).double().view(3, -1).mean(1)
    # every noise value once: the mean is exact
    assert torch.equal(got, x.view(3, -1)[:, 0].double())
    codes = torch.arange(1 << 16, dtype=torch.int32)
    exact = numerics.codes_to_fp32(codes)
    again = numerics.round_stochastic(exact, torch.full_like(codes, 0xFFFF))
    finite = ~numerics.is_nan_code(codes)
    assert torch.equal(again[finite], codes[finite]) and bool(numerics.is_nan_code(again[~finite]).all())


def test_kahan_gives_lost_digits_back() -> None:
    """Steps far below half a unit in the last place move the weight in the end, and do not without compensation."""
    found = {}
    for rounding in ("nearest", "kahan"):
        part = Part(torch.ones(4).bfloat16(), torch.zeros(4), torch.zeros(4),
                    extra=torch.zeros(4).bfloat16() if rounding == "kahan" else None)  # fmt: skip
        stepper = Stepper([part], rounding, "reference")
        for step in range(1, 101):
            stepper.step([torch.ones(4).bfloat16()], [Setting(1e-4, 0.9, 0.999, 1e-8, 0.0)], [(step,)])
        found[rounding] = part.param.float()
    assert torch.equal(found["nearest"], torch.ones(4))
    # 100 steps of 1e-4; bf16 resolves 0.99 to half of 2^-8
    assert bool(((found["kahan"] - 0.99).abs() <= 2.0**-9).all())


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="float16"):
        Part(torch.zeros(3).half(), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="prefix"):
        Part(torch.zeros(3), torch.zeros(3), torch.zeros(3), words=torch.zeros(128, dtype=torch.uint8))
    with pytest.raises(ValueError, match="master"):
        Stepper([Part(torch.zeros(3).bfloat16(), torch.zeros(3), torch.zeros(3))], "master", "reference")
    stepper = Stepper([Part(torch.zeros(3), torch.zeros(3), torch.zeros(3))], backend="reference")
    for grad in (torch.zeros(4), torch.zeros(3).double(), torch.zeros(3, device="meta")):
        with pytest.raises(ValueError, match="gradient"):
            stepper.step([grad], [SETTING], [(1,)])


def test_rounding_codes() -> None:
    assert [r.name for r in Rounding] == ["NEAREST", "STOCHASTIC", "KAHAN", "MASTER"]
