"""Tasks of lm-evaluation-harness through the pruned cache: the model ``knormpress``, and a run beside the full cache.

Needs the extra ``lm-eval``. Importing ``knormpress.lm_eval.model`` registers the model. Imports what stands below.
"""
