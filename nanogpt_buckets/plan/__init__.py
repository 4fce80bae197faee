"""Which buckets to build and what one step in each costs."""
