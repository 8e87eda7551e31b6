"""pdae_fast.kernels: the fused operations of the engine, each a torch custom op that runs on the CPU and on
CUDA.

Importing this package imports neither Triton nor anything of CUDA, and compiles nothing; `triton_status()` says
whether kernels can run, `native_status()` and `winograd_status()` whether the CPU's native norms and convolutions do,
and why not.
"""

from ._native import NATIVE_DTYPES
from ._triton import triton_status
from .add_projected import add_projected, add_projected_reference
from .add_upsample import (
    add_upsample,
    add_upsample_reference,
    add_with_stats,
    residual_add,
    residual_add_reference,
    upsample_add,
    upsample_add_reference,
)
from .attention import attention_fits, attention_native, attention_status
from .buffers import Buffers, empty_map
from .convolution import convolution_into
from .ddim_update import ddim_coefficients, ddim_update, ddim_update_reference
from .float8 import conv_float8, float8_codes, float8_obstacle, group_norm_float8, image_scales
from .group_norm import channel_stats, group_norm, group_norm_apply, partial_stats, stats_splits
from .group_norm_native import group_norm_native, native_fits, native_status
from .group_norm_torch import group_norm_reference
from .head_convolution import head_convolution, head_weights
from .pointwise import pointwise, pointwise_fits, pointwise_status, pointwise_weights
from .winograd import (
    UPSAMPLED,
    winograd,
    winograd_bytes,
    winograd_fits,
    winograd_status,
    winograd_weights,
)

__all__ = [
    "NATIVE_DTYPES",
    "UPSAMPLED",
    "Buffers",
    "add_projected",
    "add_projected_reference",
    "add_upsample",
    "add_upsample_reference",
    "add_with_stats",
    "attention_fits",
    "attention_native",
    "attention_status",
    "channel_stats",
    "conv_float8",
    "convolution_into",
    "ddim_coefficients",
    "ddim_update",
    "ddim_update_reference",
    "empty_map",
    "float8_codes",
    "float8_obstacle",
    "group_norm",
    "group_norm_apply",
    "group_norm_float8",
    "group_norm_native",
    "group_norm_reference",
    "head_convolution",
    "head_weights",
    "image_scales",
    "native_fits",
    "native_status",
    "partial_stats",
    "pointwise",
    "pointwise_fits",
    "pointwise_status",
    "pointwise_weights",
    "residual_add",
    "residual_add_reference",
    "stats_splits",
    "triton_status",
    "upsample_add",
    "upsample_add_reference",
    "winograd",
    "winograd_bytes",
    "winograd_fits",
    "winograd_status",
    "winograd_weights",
]
