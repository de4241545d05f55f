"""What is right: the fp64 reference, the yardstick, the rule and the table of cases."""
