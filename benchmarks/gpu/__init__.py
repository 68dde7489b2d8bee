"""What only a GPU can tell: phases, a module each, run by the suite as processes of their own."""
