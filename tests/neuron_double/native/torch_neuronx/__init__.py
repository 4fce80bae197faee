"""Stand-in for the native TorchNeuron package: the same import name as the PyTorch/XLA one, and no `trace`.

AWS Neuron documentation, "Native PyTorch for AWS Trainium": eager mode and torch.compile on Trn2 and Trn3 only.
"""

import os

__version__ = "2.14.0"

# The native package allows NEFFs of older architectures by default.
os.environ.setdefault("NEURON_RT_ALLOW_LEGACY_NEFF", "1")
