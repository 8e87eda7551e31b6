from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    for line in (ROOT / "pdae_fast" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("pdae_fast/__init__.py states no __version__")


# Folders at the top of the tree that are installed inside pdae_fast: at the top of an environment, `kernels` would
# collide with a well-known package of that name.
MAPPED = [folder for folder in ("kernels", "export") if (ROOT / folder).is_dir()]


def mapped(folder: str) -> list[str]:
    inner = find_packages(str(ROOT / folder))
    return [f"pdae_fast.{folder}", *(f"pdae_fast.{folder}.{name}" for name in inner)]


extras = {
    # Installs on Linux with an NVIDIA GPU; a CUDA build of torch brings it along already.
    "gpu": ["triton>=3.6"],
    "xformers": ["xformers>=0.0.35"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    # onnxruntime-gpu shares a folder with onnxruntime and breaks it: one or the other, never both.
    "onnx-gpu": ["onnx", "onnxscript", "onnxruntime-gpu"],
    "tensorrt": ["tensorrt", "cuda-bindings"],
    # Pinned: what its build writes about an engine is read from the plan, whose format is that version's.
    "tensorrt-rtx": ["tensorrt-rtx-cu13==1.7.1.116; platform_system == 'Linux'", "cuda-bindings"],
    # The server's published configuration schema.
    "serving": ["tritonclient", "protobuf"],
    "openvino": ["openvino"],
    "plot": ["matplotlib"],
    "experiments": ["scikit-learn>=1.4", "matplotlib", "jinja2"],
    "demo": ["starlette>=1.0", "uvicorn>=0.30", "scikit-learn>=1.4"],
    "parquet": ["pyarrow"],
    "video": ["imageio[ffmpeg]"],
    "train": ["tensorboard"],
    "convert": ["pyyaml"],
    "metrics": ["torchmetrics>=1.9"],
    # Pinned: the avatars' pixels are those of these versions, and a folder's manifest refuses others.
    "data": ["dicebear-core==10.7.0", "dicebear-styles==10.6.0", "resvg-py==0.5.0"],
    "dev": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-xdist>=3.5",
        "hypothesis>=6",
        "ruff>=0.15",
        "pyyaml",
        # Independent implementations that the metrics and the readers of foreign models and files are tested against.
        "lmdb",
        "scipy",
        "torchmetrics>=1.9",
        "diffusers>=0.30",
        # Drives the page in a browser, where the machine has Chromium.
        "selenium>=4.20",
        "triton>=3.6; platform_system == 'Linux'",
    ],
}

# The tests export the bundled model, build engines without a GPU, and check the serving layout against its schema.
extras["dev"] += [*extras["onnx"], *extras["tensorrt-rtx"], *extras["serving"], *extras["experiments"], *extras["data"]]
extras["dev"] += extras["demo"]

setup(
    name="pdae_fast",
    version=version(),
    description="A fast engine for PDAE: turn a pre-trained diffusion model into an autoencoder",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["pdae_fast", "pdae_fast.*"]) + [p for folder in MAPPED for p in mapped(folder)],
    package_dir={"pdae_fast": "pdae_fast", **{f"pdae_fast.{folder}": folder for folder in MAPPED}},
    package_data={
        "pdae_fast": ["py.typed", "pretrained/**/*", "experiments/*.html", "demo/page/*"],
        "pdae_fast.kernels": ["native/*.[ch]"],
    },
    # The upper bound keeps a CPU-only machine from resolving to a newer CUDA build with gigabytes of libraries.
    install_requires=["torch>=2.11,<2.14", "numpy>=1.26", "pillow>=10.1", "safetensors>=0.4", "tqdm>=4.60"],
    extras_require=extras,
)
