"""What accelerators have, by the figures that their vendors publish.

Figures are those of a device as JAX counts it: of a TPU7x chip there are two. The memory is what
the vendor names, of which systems keep a small part for themselves.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A device.

    Attributes:
        name: its name in JAX's topologies (TPUs), or that of the vendor (GPUs).
        memory: bytes of its main memory (HBM).
        bandwidth: bytes a second of that memory.
        flops: floating-point operations a second of bfloat16 products with float32 sums, dense.
        links: bytes a second that it sends to other devices of a slice or machine, over all links
            and in one direction.
        source: where the figures are from.
        gpu: description for XLA's compiler for GPUs; None for a TPU.
        cores: how the compiler for TPUs is told to take the cores of a chip as one device, as JAX
            does on a real one; None where that is what it does.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    links: float
    source: str
    gpu: str | None = None
    cores: str | None = None

    @property
    def platform(self) -> str:
        """The name of its compiler in JAX."""
        return "tpu" if self.gpu is None else "cuda"


_GIB = 1 << 30
_TPU = "cloud.google.com/tpu/docs/"


def _tpu(
    name: str,
    page: str,
    gib: float,
    gbps: float,
    tflops: float,
    links: float,
    devices: int = 1,
    cores: str | None = None,
) -> Chip:
    """A TPU from the figures of its chip, with the links in Gbit/s in both directions."""
    return Chip(
        name,
        int(gib * _GIB) // devices,
        gbps * 1e9 / devices,
        tflops * 1e12 / devices,
        links * 1e9 / 8 / 2 / devices,
        _TPU + page,
        cores=cores,
    )


def _gpu_config(name: str, capability: int, feature: str, numbers: str) -> str:
    """A device in the text form of XLA's GpuTargetConfigProto."""
    return f"""
platform_name: "CUDA"
device_description_str: "{name}"
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: {capability} minor: 0 feature_extension: {feature} }}
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  {numbers}
  runtime_version: "12.9.0"  driver_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
"""


_H100 = _gpu_config(
    "NVIDIA H100 80GB HBM3",
    9,
    "ACCELERATED_FEATURES",
    "shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472  core_count: 132 "
    "fpus_per_core: 128  clock_rate_ghz: 1.98  memory_bandwidth: 3352320000000 "
    "l2_cache_size: 52428800  device_memory_size: 84942979072",
)
_A100 = _gpu_config(
    "NVIDIA A100-SXM4-80GB",
    8,
    "NONE",
    "shared_memory_per_block_optin: 166912  shared_memory_per_core: 167936  core_count: 108 "
    "fpus_per_core: 64  clock_rate_ghz: 1.41  memory_bandwidth: 2039040000000 "
    "l2_cache_size: 41943040  device_memory_size: 85100068864",
)

CHIPS = {
    "v4": _tpu("v4", "v4", 32, 1228, 275, 2400, cores="megacore"),
    "v5e": _tpu("v5e", "v5e", 16, 819, 197, 1600),
    "v5p": _tpu("v5p", "v5p", 95, 2765, 459, 4800),
    "v6e": _tpu("v6e", "v6e", 32, 1600, 918, 3200),
    "tpu7x": _tpu("TPU7x", "tpu7x", 192, 7380, 2307, 9600, devices=2),
    "a100": Chip(
        "A100 SXM 80GB",
        85_100_068_864,
        2.039e12,
        312e12,
        300e9,
        "NVIDIA A100 datasheet (SXM, 80 GB); memory as CUDA reports it",
        _A100,
    ),
    "h100": Chip(
        "H100 SXM",
        84_942_979_072,
        3.35e12,
        989e12,
        450e9,
        "NVIDIA H100 datasheet (SXM; without sparsity); memory as CUDA reports it",
        _H100,
    ),
}
"""The devices that the command line knows, by name."""
