"""Model cards, and the way to the Hub."""

from cab_hf.hub.adapters import adapter_card, write_adapter_card
from cab_hf.hub.card import build_card, write_card
from cab_hf.hub.publish import check_access, publish_folder
from cab_hf.hub.sources import describe_teacher


__all__ = [
    "adapter_card",
    "build_card",
    "check_access",
    "describe_teacher",
    "publish_folder",
    "write_adapter_card",
    "write_card",
]
