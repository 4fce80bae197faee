"""Stand-in for libneuronxla; only its version is of interest."""

__version__ = "2.2.17544.0+double"
