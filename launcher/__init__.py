"""Start here: command line, recipe, plan, run folder, status. Decides; never computes tensors."""
