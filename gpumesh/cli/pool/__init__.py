"""Parts of the command `gpumesh pool`: which pool is meant, and the pool that a plan is made for."""
