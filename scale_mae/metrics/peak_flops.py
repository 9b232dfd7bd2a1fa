"""Peak floating-point operations per second of GPUs, for the model FLOP utilization (MFU)."""

from __future__ import annotations

# Dense TFLOP/s, which is half of the "with sparsity" figures in data sheets. fp32 is without TF32, PyTorch's default. fp16 and
# bf16 accumulate in fp32, which matters for GeForce cards. None: the GPU has no bf16.
# Comments name the source of each group; it is a publication by NVIDIA unless stated otherwise. "Not confirmed" means that we
# could not read the source or a quotation of it; the figure is derived from the chip or commonly used.
# The first match counts, so a longer name must precede a shorter one.
PEAK_TFLOPS: tuple[tuple[str, float, float | None, float], ...] = (
    # name, fp32, bf16, fp16
    # Specifications of "HGX B300" and "HGX B200" (figures of a board, divided by 8 GPUs) and of "GB200 NVL72" (a rack, divided
    # by 72). For fp32 the "Blackwell Architecture Technical Brief" lists 80 for B200, and 90 for GB200 at 1,200 W. B100 is from
    # that brief, not confirmed.
    ("GB200", 80.0, 2500.0, 2500.0),  # fp32 not confirmed
    ("B300", 75.0, 2250.0, 2250.0),
    ("B200", 75.0, 2250.0, 2250.0),
    ("B100", 60.0, 1750.0, 1750.0),
    # "H100 Tensor Core GPU Datasheet" and "H200 Tensor Core GPU Datasheet"; 989.4 is from the white paper "H100 Tensor Core GPU
    # Architecture". Only the PCIe card has HBM2e. PyTorch calls the SXM module "NVIDIA H100 80GB HBM3".
    ("GH200", 67.0, 989.4, 989.4),  # "GH200 Grace Hopper Superchip Datasheet": not confirmed
    ("H200 NVL", 60.0, 835.5, 835.5),  # not confirmed
    ("H200", 67.0, 989.4, 989.4),
    ("H100 80GB HBM2e", 51.0, 756.5, 756.5),
    ("H100 PCIe", 51.0, 756.5, 756.5),
    ("H100 NVL", 60.0, 835.5, 835.5),  # fp32 not confirmed
    ("H100", 67.0, 989.4, 989.4),
    # Not confirmed, no public data sheet. H800 is an H100 with slower links and slower fp64. H20 is from press reports.
    ("H800 PCIe", 51.0, 756.5, 756.5),
    ("H800", 67.0, 989.4, 989.4),
    ("H20", 44.0, 148.0, 148.0),
    # Data sheets "A100", "A40", "A30" and "A10 Tensor Core GPU". A800 has the chip of the A100. A6000: white paper "Ampere
    # GA102 GPU Architecture", appendix C.
    ("A100", 19.5, 312.0, 312.0),
    ("A800", 19.5, 312.0, 312.0),
    ("A40", 37.4, 149.7, 149.7),
    ("A30", 10.3, 165.0, 165.0),  # fp32 not confirmed
    ("A10G", 35.0, 70.0, 70.0),  # data sheet by Amazon; fp32 not confirmed, from 80 SMs at 1.71 GHz
    ("A10", 31.2, 125.0, 125.0),
    ("RTX A6000", 38.7, 154.8, 154.8),  # bf16 and fp16 not confirmed: four times fp32, as on the A40
    # "V100 Tensor Core GPU Datasheet". It does not list SXM3; those figures (not confirmed) follow from the boost clock of
    # 1,597 MHz.
    ("V100-SXM2", 15.7, None, 125.0),
    ("V100-SXM3", 16.4, None, 130.0),
    ("V100S-PCIE", 16.4, None, 130.0),
    ("V100-PCIE", 14.0, None, 112.0),
    # Data sheets "L40S", "L40", "L4" and "T4 Tensor Core GPU". RTX 6000 Ada: white paper "Ada GPU Architecture".
    ("L40S", 91.6, 362.05, 362.05),
    ("L40", 90.5, 181.05, 181.05),
    ("L4", 30.3, 121.0, 121.0),
    ("T4", 8.1, None, 65.0),
    ("RTX 6000 Ada", 91.1, 364.2, 364.2),  # bf16 and fp16 not confirmed: four times fp32
    # White papers "RTX Blackwell", "Ada" and "Ampere GA102 GPU Architecture". fp32 is twice the number of cores times the boost
    # clock. bf16 and fp16 are twice fp32, which is confirmed for the RTX 4090.
    ("RTX 5090", 104.8, 209.5, 209.5),
    ("RTX 4090", 82.6, 165.2, 165.2),
    ("RTX 4080", 48.7, 97.5, 97.5),
    ("RTX 3090 Ti", 40.0, 80.0, 80.0),  # not in the white papers: from its 1,860 MHz boost clock
    ("RTX 3090", 35.6, 71.2, 71.2),
)
DIFFERENT_MODEL_WORDS = frozenset({"MIG", "Laptop", "SUPER", "D", "64GB"})  # a slice of a GPU, or another GPU of a similar name


def peak_flops(name: str, precision: str) -> float | None:
    """Return the peak dense operations per second of a GPU; ``None`` if unknown.

    Args:
        name: Name of the device, as PyTorch reports it.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    words = name.replace("-", " ").split()
    if DIFFERENT_MODEL_WORDS & set(words):
        return None
    for known_name, *peaks in PEAK_TFLOPS:
        if f" {known_name.replace('-', ' ')} " in f" {' '.join(words)} ":  # whole words, so that L4 does not match L40S
            peak = peaks[("fp32", "bf16", "fp16").index(precision)]
            return None if peak is None else peak * 1e12
    return None
