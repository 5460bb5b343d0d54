"""Legality rules: what makes passes compose. Each looks only at the IR; `elision.ir.verifier` runs them."""
