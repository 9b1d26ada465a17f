"""Small diffusion models of digits that one trains oneself."""
