"""How fast a device reads a model's weights while it decodes: from a table of NVIDIA's cards, or from a measured rate.

Decoding one token reads all weights once, so that the bandwidth of the memory decides. The bandwidths are those of
NVIDIA's data sheets. docs/internals/pools.md has the measurements from which the reached shares are.
"""

from __future__ import annotations

from collections.abc import Mapping

# GB/s by the name that nvidia-smi shows, without "NVIDIA ". A laptop's GPU has another name, and another bandwidth.
_GDDR_GB_PER_S = {
    "GeForce RTX 5090": 1792,
    "GeForce RTX 5090 D": 1792,
    "GeForce RTX 5080": 960,
    "GeForce RTX 5070 Ti": 896,
    "GeForce RTX 5070": 672,
    "GeForce RTX 5060 Ti": 448,
    "GeForce RTX 5060": 448,
    "GeForce RTX 4090": 1008,
    "GeForce RTX 4090 D": 1008,
    "GeForce RTX 4090 Laptop GPU": 576,
    "GeForce RTX 4080 SUPER": 736,
    "GeForce RTX 4080": 717,
    "GeForce RTX 4070 Ti SUPER": 672,
    "GeForce RTX 4070 Ti": 504,
    "GeForce RTX 4070 SUPER": 504,
    "GeForce RTX 4070": 504,
    "GeForce RTX 4060 Ti": 288,
    "GeForce RTX 4060": 272,
    "GeForce RTX 3090 Ti": 1008,
    "GeForce RTX 3090": 936,
    "GeForce RTX 3080 Ti": 912,
    "GeForce RTX 3080": 760,
    "GeForce RTX 3070 Ti": 608,
    "GeForce RTX 3070": 448,
    "GeForce RTX 3060 Ti": 448,
    "GeForce RTX 3060": 360,
    "GeForce RTX 2080 Ti": 616,
    "GeForce RTX 2080 SUPER": 496,
    "GeForce RTX 2080": 448,
    "GeForce RTX 2070 SUPER": 448,
    "GeForce RTX 2070": 448,
    "GeForce RTX 2060": 336,
    "GeForce GTX 1080 Ti": 484,
    "GeForce GTX 1080": 320,
    "TITAN RTX": 672,
    "RTX PRO 6000 Blackwell Workstation Edition": 1792,
    "RTX PRO 6000 Blackwell Server Edition": 1597,
    "RTX 6000 Ada Generation": 960,
    "RTX 5000 Ada Generation": 576,
    "RTX 4500 Ada Generation": 432,
    "RTX 4000 Ada Generation": 360,
    "RTX A6000": 768,
    "RTX A5500": 768,
    "RTX A5000": 768,
    "RTX A4500": 640,
    "RTX A4000": 448,
    "RTX A2000 12GB": 288,
    "Quadro RTX 8000": 672,
    "Quadro RTX 6000": 672,
    "Quadro RTX 5000": 448,
    "L40S": 864,
    "L40": 864,
    "L4": 300,
    "A40": 696,
    "A10": 600,
    "A10G": 600,
    "A2": 200,
    "Tesla T4": 320,
    "Tesla P40": 347,
}
_HBM_GB_PER_S = {
    "B200": 8000,
    "GH200 480GB": 4000,
    "H200": 4800,
    "H200 NVL": 4800,
    "H100 80GB HBM3": 3350,
    "H100 NVL": 3938,
    "H100 PCIe": 2039,
    "A100-SXM4-80GB": 2039,
    "A100 80GB PCIe": 1935,
    "A100-SXM4-40GB": 1555,
    "A100-PCIE-40GB": 1555,
    "A30": 933,
    "Tesla V100-SXM2-32GB": 900,
    "Tesla V100-SXM2-16GB": 900,
    "Tesla V100-PCIE-32GB": 900,
    "Tesla V100-PCIE-16GB": 900,
    "Tesla P100-PCIE-16GB": 732,
}
# The shares that llama.cpp reaches with one stream of a large dense model, and the most that it reaches on any card.
GDDR_SHARE = 0.75
HBM_SHARE = 0.45
MOST_BYTES_PER_S = 1.25e12


def find_bytes_per_s(device_name: str) -> float | None:
    """The bytes of weights per second that llama.cpp reads on this GPU while it decodes. ``None``: not in the table.

    ``device_name`` is the one that nvidia-smi shows, with or without "NVIDIA ".
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    if name in _GDDR_GB_PER_S:
        return min(_GDDR_GB_PER_S[name] * 1e9 * GDDR_SHARE, MOST_BYTES_PER_S)
    if name in _HBM_GB_PER_S:
        return min(_HBM_GB_PER_S[name] * 1e9 * HBM_SHARE, MOST_BYTES_PER_S)
    return None


def learn_bytes_per_s(model_bytes: Mapping[str, int], token_s: Mapping[str, float | None]) -> float | None:
    """The bytes per second that a host's device reads, from what the host's own server has decoded with one stream.

    For a CPU, and for a GPU that is not in the table. ``model_bytes`` and ``token_s`` (seconds for a token) are by the
    models' names. The fastest model counts: others may have been partly in another memory. ``None``: nothing is known.
    """
    rates = [size / seconds for model, size in model_bytes.items() if (seconds := token_s.get(model)) and size > 0]
    return max(rates, default=None)
