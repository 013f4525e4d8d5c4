"""Language models: loading, the policy and its log-probs, generation, the frozen reference.

Import what you need from the submodules: this file loads nothing, so that a data or reward script
does not pay for transformers.
"""
