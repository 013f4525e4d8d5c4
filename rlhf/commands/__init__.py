"""What the verbs of the command line do; `rlhf.cli` only reads the arguments."""
