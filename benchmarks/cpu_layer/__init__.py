"""The expert layer on a CPU, against transformers."""
