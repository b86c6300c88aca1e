"""The command line: one thin file per verb, each with one function named after it."""
