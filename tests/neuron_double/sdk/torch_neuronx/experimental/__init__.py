"""Core placement lived here until SDK 2.25 and is still called by this name."""

from torch_neuronx.placement import multicore_context, neuron_cores_context, set_multicore, set_neuron_cores

__all__ = ["multicore_context", "neuron_cores_context", "set_multicore", "set_neuron_cores"]
