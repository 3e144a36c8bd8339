"""The parts of `gpumesh node`: adding a host, changing the file under its lock, the editor, and telling the mesh."""
