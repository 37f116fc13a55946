"""ComfyUI custom nodes of fewstep: put this folder into ``custom_nodes``, with the package installed in ComfyUI's Python."""

from fewstep.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
