"""Where compiled buckets are kept: manifests, the blobs they name, and who may be believed."""
