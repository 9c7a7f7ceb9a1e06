"""The commands: parse, call the pipeline, print."""
