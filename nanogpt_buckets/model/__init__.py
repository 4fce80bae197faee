"""Where models come from: architecture, network, checkpoints and tokenizers."""
