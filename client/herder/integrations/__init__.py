"""Other libraries on a Herder cluster. Each module is imported by name; none by the package itself."""
