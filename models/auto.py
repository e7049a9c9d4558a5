"""Where a config of one's own registers itself and its presets."""

from ..nets import AutoConfig, AutoModel, list_models, register_config, register_presets

__all__ = ["AutoConfig", "AutoModel", "list_models", "register_config", "register_presets"]
