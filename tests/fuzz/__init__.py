"""Everything that parses what somebody else can write, under a coverage-guided fuzzer: python -m tests.fuzz."""
