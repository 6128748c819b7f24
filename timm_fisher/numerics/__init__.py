"""Mathematics that two heads or more use."""
