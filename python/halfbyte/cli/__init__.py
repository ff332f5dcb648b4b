"""The command `halfbyte`."""
