"""The command line: one small module per verb, loaded when the verb is used."""
