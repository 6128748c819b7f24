"""The built-in heads: one file each, named like its entry point."""
