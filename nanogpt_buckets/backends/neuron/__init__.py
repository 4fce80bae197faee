"""AWS Trainium and Inferentia. Proof level N1, the graph N2, see the README above: no real compiler, no device yet."""
