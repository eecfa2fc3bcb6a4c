"""Whether the tests notice a change of what they test: every mutant of a module is to be killed, or known."""
