"""Text <-> token ids, and which tokenizer goes with a model. Nothing here uses the network or writes a file."""
