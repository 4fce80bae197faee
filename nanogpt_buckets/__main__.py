"""`python -m nanogpt_buckets` is the command line."""

from nanogpt_buckets.cli import main

if __name__ == "__main__":
    main()
