"""The main job `fastprompt demo`: prompt tuning on real handwritten digits, against a linear probe, in minutes."""
