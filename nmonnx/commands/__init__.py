"""One file per command: argv to a call, the result to a report."""
