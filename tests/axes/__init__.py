"""The axis types: the algebra, the rules by an oracle, plans and pruned graphs."""
