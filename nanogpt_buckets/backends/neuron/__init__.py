"""AWS Trainium and Inferentia. Proof level N1: passes a test double; nothing here has run on a device."""
