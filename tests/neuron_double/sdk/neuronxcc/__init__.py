"""Stand-in for the Neuron compiler package. Standard library only: it starts fast and needs no torch.

NEURON_DOUBLE_CC_VERSION makes it another version, in `__version__`, in `neuronx-cc --version` and in artifacts.
"""

import os

__version__ = os.environ.get("NEURON_DOUBLE_CC_VERSION", "2.26.6360.0+6f180f47")
