"""Training: our part only; the loop is the Transformers Trainer on Accelerate."""
