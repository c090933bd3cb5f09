"""What benchmarks run inside tasks and templates. Needs nothing of Herder: any interpreter can import it."""
