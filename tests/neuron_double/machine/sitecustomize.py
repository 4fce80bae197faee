"""The rest of a Neuron host, for child processes: device files under NEURON_DOUBLE_ROOT, where the product looks."""

import os
from pathlib import Path

if "NEURON_DOUBLE_ROOT" in os.environ:
    from nanogpt_buckets.backends.neuron import device

    device.ROOT = Path(os.environ["NEURON_DOUBLE_ROOT"])
