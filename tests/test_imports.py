"""What an import pulls in, each in a fresh interpreter, and the runtime without the packages that only building needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "diffusers",
    "matplotlib",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "triton",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "ray",
)

# Put before a script, it makes those packages look as if they were not installed.
BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {HEAVY} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(code: str) -> str:
    """What the code prints. `-P` keeps the working folder off the path; warnings are errors there too."""
    command = [sys.executable, "-P", "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "ldmrt",
        "ldmrt.pipeline",
        "ldmrt.bundle",
        "ldmrt.engines.onnxruntime",
        "ldmrt.engines.plan",
        "ldmrt.cli",
        "ldmrt.bench.run",
        "ldmrt.serving",
    ],
)
def test_the_runtime_imports_no_package_of_the_build(module: str) -> None:
    # torch imports triton by itself where it is installed; torch is loaded first so as to see what we add.
    code = f"import sys, torch; before = set(sys.modules); import {module}; "
    code += "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    found = set(python(code).split())
    assert not found & set(HEAVY)
    assert "ldmrt" in found


def test_the_runtime_imports_nothing_of_export() -> None:
    code = "import sys, ldmrt.pipeline; print(*[name for name in sys.modules if name.startswith('ldmrt.export')])"
    assert python(code) == ""


def test_import_ldmrt_is_light() -> None:
    assert python("import sys, ldmrt; print('torch' in sys.modules)") == "False"


def test_the_command_line_loads_torch_after_it_has_said_how_threads_wait() -> None:
    assert python("import sys, ldmrt.cli; print('torch' in sys.modules)") == "False"


def test_a_bare_install_opens_a_bundle_and_draws(tiny_bundle: Path) -> None:
    code = f"""{BLOCK}
import ldmrt
pipe = ldmrt.Pipeline.from_bundle({str(tiny_bundle)!r}, device="cpu")
result = pipe("a red circle", num_inference_steps=2, seed=0)
print(result.images[0].size, sorted(set({HEAVY}) & set(sys.modules)))
"""
    assert python(code) == "(64, 64) []"


def test_a_bare_install_says_what_building_needs(tiny_model: Path, tmp_path: Path) -> None:
    code = f"""{BLOCK}
import ldmrt
try:
    ldmrt.build_engines({str(tiny_model)!r}, {str(tmp_path / "out")!r})
except ldmrt.BuildError as error:
    print(error)
"""
    message = python(code)
    assert "diffusers" in message
    assert "pip install 'ldmrt[export]'" in message
    assert not (tmp_path / "out").exists()


def test_the_application_for_ray_says_in_one_line_what_it_needs() -> None:
    code = """
import sys
sys.modules["ray"] = None  # as if it were not installed
try:
    import ldmrt.serving.ray_app
except ImportError as error:
    print(error)
"""
    assert python(code) == "ray is not installed: pip install 'ldmrt[ray]'"


def test_every_public_name_is_there() -> None:
    code = "import ldmrt; print(all(getattr(ldmrt, name) is not None for name in ldmrt.__all__))"
    assert python(code) == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import ldmrt

    with pytest.raises(AttributeError, match="module 'ldmrt' has no attribute 'Pipelin'"):
        _ = ldmrt.Pipelin
