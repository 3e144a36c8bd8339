"""The report of `gpumesh doctor`."""
