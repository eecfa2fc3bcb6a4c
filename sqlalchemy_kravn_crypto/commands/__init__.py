"""The commands of the command line, each from its options to what it prints."""
