"""What pip makes of the project: with a compiler, without one, and what an import costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from offprin_kernels import _native

ROOT = Path(__file__).resolve().parents[2]


def copy_of_sources(target: Path) -> Path:
    """What a source distribution would hold, so that builds leave no trace here."""
    keep = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "offprin_kernels")
    target.mkdir()
    for name in keep:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(tmp_path: Path, **environment: str) -> list[str]:
    """Names in a wheel that is built in isolation: pip's own build environment has no torch."""
    source = copy_of_sources(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        return archive.namelist()


def run(code: str, site: Path, **environment: str) -> str:
    """Run Python code against an unpacked wheel, outside the source tree.

    Without site (-S), whose .pth files would let an editable install lend the modules that this wheel lacks.
    """
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tools_without_compilers(folder: Path) -> str:
    """A PATH with everything but compilers."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for tool in Path(directory).glob("*") if Path(directory).is_dir() else ():
            compiler = any(part in tool.name for part in ("cc", "c++", "g++", "gcc", "clang", "nvcc", "cpp"))
            if not compiler and not (folder / tool.name).exists():
                (folder / tool.name).symlink_to(tool)
    return str(folder)


CHECK = (
    "import torch, offprin_kernels as ok\n"
    "from offprin_kernels._env import environment\n"
    "a = torch.zeros(3, 70); b = a.clone(); b[1, 2] = 1\n"
    "print(ok.__file__, ok.update_mask(a, b).count(), environment()['default_backend'])\n"
)


def test_with_a_compiler_but_no_nvcc(tmp_path) -> None:
    names = build_wheel(tmp_path, OFFPRIN_CUDA="0", OFFPRIN_CPU="1")
    assert any("_cpu." in name and name.endswith(".so") for name in names)
    assert not any("_cuda." in name for name in names)
    file, count, backend = run(CHECK, tmp_path / "site").split()
    assert file.startswith(str(tmp_path)) and (count, backend) == ("1", "cpu")


def test_without_any_compiler(tmp_path) -> None:
    names = build_wheel(tmp_path, PATH=tools_without_compilers(tmp_path / "tools"), CUDA_HOME="", CUDA_PATH="", CXX="")
    assert not any(name.endswith(".so") for name in names)
    file, count, backend = run(CHECK, tmp_path / "site").split()
    assert file.startswith(str(tmp_path)) and (count, backend) == ("1", "reference")
    forced = "import torch, offprin_kernels as ok\nok.update_mask(torch.zeros(2), torch.zeros(2), backend='cpu')"
    with pytest.raises(AssertionError, match="the cpu library was not built; install a C\\+\\+17 compiler"):
        run(forced, tmp_path / "site")


def test_this_installation_has_what_its_tools_allow() -> None:
    """The suite must not go green because a library silently went missing."""
    assert not isinstance(_native.load("cpu"), str), _native.load("cpu")
    if shutil.which("nvcc") or os.environ.get("CUDA_HOME"):
        assert not isinstance(_native.load("cuda"), str), _native.load("cuda")


def test_import_is_quick_and_needs_neither_triton_nor_libraries() -> None:
    code = (
        "import sys, time, torch\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'triton' or name in ('offprin_kernels._cpu', 'offprin_kernels._cuda'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "before = set(sys.modules)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "start = time.perf_counter()\n"
        "import offprin_kernels as ok\n"
        "print(time.perf_counter() - start)\n"
        "assert ok.update_mask(torch.zeros(3), torch.ones(3)).count() == 3\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('pyarrow', 'transformers', 'triton')])\n"
    )
    seconds, loaded = run(code, ROOT).splitlines()
    assert float(seconds) < 1.0
    assert loaded == "[]"


FLOORS = (
    "_version _native",
    "packing output numerics numerics_triton _backend _launch _library _env",
    "ops",
    "bitmask checkpoint",
    "updates nulls masks geometry intervene optim watch",
    "analysis training integrations",
    "experiments",
    "commands",
    "cli __main__",
)


def test_imports_point_downward() -> None:
    """The floors of the house: nothing imports a floor above its own."""
    import ast

    floors = {}
    for height, names in enumerate(FLOORS):
        floors |= dict.fromkeys(names.split(), height)
    package = ROOT / "offprin_kernels"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        here = floors[parts[0]]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            module = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            targets = [module[0]] if module[0] else [alias.name for alias in node.names]
            for target in targets:
                assert floors[target] <= here, f"{path.relative_to(ROOT)} imports {target} from above"
                assert {parts[0], target} != {"training", "analysis"}, path
