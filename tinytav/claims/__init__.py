"""The paper's claims, measured in the toy world, where the true answer to every edit is known."""
