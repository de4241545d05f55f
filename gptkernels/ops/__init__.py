"""The ops: a folder each, with one module or folder an implementation."""
