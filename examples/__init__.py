"""Complete programs that use fastprompt; run them from the root of the repository: `python -m examples.NAME`."""
