"""What `dam train`, `dam generate` and `dam eval` do, a module each."""
