"""Takes over changes of mesh.yaml while its mesh runs: ``reloader.py`` carries them out."""
