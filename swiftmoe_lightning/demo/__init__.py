"""What `swiftmoe train` runs: a small GPT of MoE layers, trained on real text, with a table and a picture."""
