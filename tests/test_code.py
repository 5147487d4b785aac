"""What the sources never do, whatever a file or a client says: load code, run a shell, or unpickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = sorted([*(ROOT / "ldmrt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
COMPILER = sorted((ROOT / "export").rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "code", "pty", "xmlrpc"}  # fmt: skip
BUILDERS = {"diffusers", "transformers", "onnx", "yaml", "huggingface_hub"}
BUILTINS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
CALLS = {
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.execve", "os.spawnv", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("tempfile.mktemp", "ctypes.pythonapi", "onnx.hub.load", "importlib.reload", "runpy.run_path", "numpy.fromfile"),
}  # fmt: skip
# The one place that reads pickles: with torch's restricted unpickler, in a process of its own.
CONVERT = ROOT / "export" / "convert.py"
# What other runtimes are measured with runs in processes of its own.
PEER = ROOT / "ldmrt" / "bench" / "peer.py"


def faults(source: str, *, modules: set[str]) -> Iterator[str]:
    """Everything in a source that is not allowed, calls with their lines."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in modules:
                yield f"imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in BUILTINS or called in CALLS:
                yield f"line {node.lineno}: calls {called}"
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and on:
                    yield f"line {node.lineno}: {keyword.arg}"
                if called == "torch.load" and keyword.arg == "weights_only" and not on:
                    yield f"line {node.lineno}: torch.load without weights_only"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from pickle import loads", "imports pickle"),
        ("import torch\ntorch.load('x')", "calls torch.load"),
        ("eval('1')", "calls eval"),
        ("import subprocess\nsubprocess.run('a', shell=True)", "shell"),
        ("import subprocess\nsubprocess.run('a', shell=x)", "shell"),
        ("np.load(x, allow_pickle=True)", "allow_pickle"),
        ("os.system('ls')", "calls os.system"),
        ("yaml.load(x)", "calls yaml.load"),
    ],
)
def test_what_is_not_allowed_is_found(source: str, found: str) -> None:
    assert [fault for fault in faults(source, modules=MODULES) if found in fault]


@pytest.mark.parametrize(
    "source", ["module.eval()", "re.compile('a')", "f(shell=False)", "import torch", "yaml.safe_load(x)"]
)
def test_what_is_allowed_is_not(source: str) -> None:
    assert not list(faults(source, modules=MODULES))


@pytest.mark.parametrize(
    ("paths", "modules"), [(RUNTIME, MODULES | BUILDERS), (COMPILER, MODULES)], ids=["runtime", "compiler"]
)
def test_no_source_loads_code_runs_a_shell_or_unpickles(paths: list[Path], modules: set[str]) -> None:
    assert len(paths) > 25
    found = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in paths
        if path not in (CONVERT, PEER)
        for fault in faults(path.read_text(encoding="utf-8"), modules=modules)
    ]
    assert found == []


def test_the_one_place_that_reads_pickles_lets_them_make_tensors_alone() -> None:
    found = list(faults(CONVERT.read_text(encoding="utf-8"), modules=MODULES))
    assert sorted(fault.rpartition(": ")[2] for fault in found) == ["calls torch.load", "imports pickle"]
    assert "weights_only=True" in CONVERT.read_text(encoding="utf-8")
