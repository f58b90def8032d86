"""How the packaged priors were made."""
