"""The vLLM plug-in: checkpoints that vLLM quantizes its own way run on qkit's kernels.

vLLM loads `register` through the entry point group `vllm.general_plugins`, in every one of its processes. It puts
our kernels (`kernels`) into the tables that vLLM chooses from: on CPUs, where they were measured, before vLLM's own; on
CUDA after them, so that Machete, Marlin and the like keep what they take, but for cards on which a row of
profiles/vllm.csv says that ours are faster. Layers that ours do not support go to vLLM's own kernels as before. It
changes nothing else: model code, loading, tensor parallelism and the configs of the formats are vLLM's.

What runs on them: integer weights of 4 and 8 bits, symmetric and asymmetric, per group and per channel
(compressed-tensors, symmetric GPTQ without act-order, AWQ), int8 weights with dynamic int8 activations, and on CPUs
the experts of compressed-tensors mixtures (`moe`).
What does not: what vLLM refuses before it looks for a kernel (asymmetric GPTQ, act-order, on CPUs GPTQ's 8 bits), and
other experts, whose kernels vLLM chooses from an enumeration in its own code.

To put ours first on any CUDA card: `QKIT_VLLM=1`. To turn them off: `QKIT_VLLM=0`, or leave "qkit" out of vLLM's own
`VLLM_PLUGINS`. One kind of layer alone: `VLLM_DISABLED_KERNELS=QkitLinearKernel` or `QkitInt8LinearKernel`.
"""

from __future__ import annotations

import os

SWITCH = "QKIT_VLLM"


def register() -> None:
    """Put qkit's kernels in line; called by vLLM, any number of times. Raises nothing: a vLLM whose interface
    is another runs without them and says so."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    from vllm.logger import init_logger

    # vLLM's own name is the prefix: shown, and formatted, as vLLM's own lines are.
    log = init_logger("vllm.plugins.qkit")
    try:
        from vllm.model_executor.kernels import linear
        from vllm.platforms import PlatformEnum

        from .kernels import QkitInt8LinearKernel, QkitLinearKernel
        from .measured import faster_on

        card = _card()

        for kernel, kind, table in (
            (QkitLinearKernel, "mp", linear._POSSIBLE_KERNELS),
            (QkitInt8LinearKernel, "int8", linear._POSSIBLE_INT8_KERNELS),
        ):
            for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
                if kernel not in table.get(platform, ()):
                    linear.register_linear_kernel(kernel, platform, kind)  # vLLM takes the first that can
                    first = platform is PlatformEnum.CPU or os.environ.get(SWITCH) == "1"
                    if first or (card is not None and faster_on(card, kernel.__name__)):
                        table[platform].insert(0, table[platform].pop())
    except (ImportError, AttributeError) as error:
        log.warning("qkit's kernels are not used: this vLLM offers no place for them (%s)", error)
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .moe import QkitCompressedTensorsConfig

        register_quantization_config("compressed-tensors")(QkitCompressedTensorsConfig)
    except (ImportError, AttributeError) as error:
        log.warning("qkit's kernels do not serve experts: this vLLM offers no place for them (%s)", error)


def _card() -> str | None:
    """The name of the first CUDA card, as vLLM tells it without starting CUDA; None where there is none."""
    from vllm.platforms import current_platform

    try:
        return str(current_platform.get_device_name()) if current_platform.is_cuda() else None
    except Exception:  # drivers fail in ways of their own: then nothing is known of the card
        return None
