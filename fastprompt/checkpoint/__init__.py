"""Load state dicts of the official code of VPT, GateVPT, CVPT and DA-VPT."""

from fastprompt.checkpoint.load import LoadReport, load_official_state_dict

__all__ = ["LoadReport", "load_official_state_dict"]
