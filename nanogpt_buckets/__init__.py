"""nanogpt-buckets."""
