"""Where ops run: the choice of a backend, and what each needs to take tensors. Knows no op."""
