"""Messages of the real packages that users meet, where the public record has them."""

# The same text for "no driver" and "core busy"; only stderr tells them apart (optimum-neuron issue 377).
RUNTIME_UNAVAILABLE = (
    "The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged\n"
    "to your system logs. See the Neuron Runtime's troubleshooting guide for help on this\n"
    "topic: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/"
)
# aws-neuron-sdk issues 902 and 910
NO_DEVICE_AT_TRACE = (
    "Bad StatusOr access: INVALID_ARGUMENT: PJRT_Client_Create: error condition nullptr != (args)->client->Error(): "
    "Init: error condition !(num_devices > 0)"
)
# optimum-neuron pull request 961
TARGET_NEEDED = (
    "If you want to compile on CPU, please supply compiler argument target, with one of options trn1, inf2, trn1n, or "
    'trn2. Ex: "--target trn1"'
)
NO_COMPILER = (
    "neuronx-cc is not installed.\nneuronx-cc can be installed using:\npython3 -m pip install "
    "--extra-index-url=https://pip.repos.neuron.amazonaws.com neuronx-cc"
)
NO_COMPILER_BINARY = "neuronx-cc compiler binary does not exist"


def other_arch(neff: str, instance: str) -> str:
    return (
        f"Loading a NEFF compiled for a different arch is not allowed, NEFF arch: {neff}, instance arch: {instance}\n"
        "Please ensure that --target <correct_arch> is passed as a neuronx-cc command line flag.\n"
        "To override, set NEURON_RT_ALLOW_LEGACY_NEFF=1 and restart.\nNRT_INVALID (2)"
    )


def newer_neff(compiler: str) -> str:
    return (
        f"NEFF has been compiled by a newer version of Neuron compiler ({compiler}). Please update the "
        "aws-neuronx-runtime-lib package\nFailed to load NN: graph.neff, err: 10"
    )


def out_of_memory(nbytes: int, device: int, core: int) -> str:
    return f"Failed to allocate {nbytes} bytes (usage: tensors) on ND {device}:NC {core}\nNRT_RESOURCE (4)"
