"""How far a method's gradients are from backprop's, and which method that chooses for each stage."""
