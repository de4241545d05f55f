"""The ops. Each has a folder, with one module or folder for each implementation."""
