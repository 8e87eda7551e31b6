"""`import pdae_fast` imports nothing heavy, and still offers everything it names."""

import subprocess
import sys

import pdae_fast


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_and_the_runner_import_without_torch():
    python(
        "import importlib, pkgutil, sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'safetensors', 'PIL', 'tqdm'): sys.modules[name] = None\n"
        "import pdae_fast, pdae_fast.errors, pdae_fast.export.manifest, pdae_fast.export.runtime\n"
        "import pdae_fast.export.staging\n"
        "from pdae_fast.export import backends\n"
        "names = [m.name for m in pkgutil.walk_packages(backends.__path__, backends.__name__ + '.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "assert {name.split('.')[-1] for name in names} >= {'backend', 'onnxruntime', 'openvino', 'tensorrt'}\n"
        "assert pdae_fast.UserError is pdae_fast.errors.UserError and pdae_fast.presets['celeba64']\n"
    )


def test_every_public_name_is_there():
    for name in pdae_fast.__all__:
        assert getattr(pdae_fast, name) is getattr(pdae_fast, name)
    assert set(pdae_fast.__all__) <= set(dir(pdae_fast)) and "sampling" in dir(pdae_fast)
    assert pdae_fast.PDAE.__name__ == "PDAE" and callable(pdae_fast.available)


def test_submodules_are_attributes_as_before():
    out = python(
        "import pdae_fast\n"
        "for name in ('sampling', 'schedule', 'models', 'engine', 'config', 'checkpoints', 'pipeline', 'files'):\n"
        "    assert getattr(pdae_fast, name).__name__ == f'pdae_fast.{name}'\n"
        "namespace = {}\n"
        "exec('from pdae_fast import *', namespace)\n"
        "assert set(pdae_fast.__all__) <= namespace.keys()\n"
        "try: pdae_fast.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    assert "module 'pdae_fast' has no attribute 'nothing'" in out
