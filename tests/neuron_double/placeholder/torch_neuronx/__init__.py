"""Stand-in for the placeholders that AWS publishes on the public index under its package names."""

raise ImportError("WRONG PACKAGE. Please install the package from Neuron Repository - pip.repos.neuron.amazonaws.com")
