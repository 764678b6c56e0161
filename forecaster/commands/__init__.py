"""What each command does: one module each, `run(arguments) -> exit code`. Imported when it is called, not before."""
