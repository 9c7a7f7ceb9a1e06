"""The commands: parse, call the pipeline, print."""

import os

# Read when torch loads GNU OpenMP, whose threads spin for milliseconds while they wait for one another: with
# other work on the cores a solve takes 3 to 10 times longer. So they sleep sooner, which costs an idle
# machine up to 10 % (two cores, SmolLM2 and MiniLM).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
