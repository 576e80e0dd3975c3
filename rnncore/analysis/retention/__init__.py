"""How much of a gradient survives how many steps."""
