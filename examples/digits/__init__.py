"""Prompt tuning of a small ViT on handwritten digits, against a linear probe (docs/demo.md)."""
