"""The omni-modal language model: conversations in which text, images and sounds are mixed."""
