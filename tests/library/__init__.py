"""The library as programs use it: ``gpumesh.connect`` and what it returns."""
